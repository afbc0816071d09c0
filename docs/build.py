"""Builds the site: the Markdown pages and the API reference from docstrings. `make docs` writes it into build/docs.

    python docs/build.py build/docs

The site has the repository's layout, so every relative link of a page holds in it; one that leads nowhere is an error.
"""

import html
import importlib
import os
import pkgutil
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pdoc
import pdoc.render
import transformers
from jinja2 import pass_context
from pdoc.render_helpers import formatter, relative_link, to_html, to_markdown_with_context

ROOT = Path(__file__).resolve().parents[1]
START = ("README.md", "CONTRIBUTING.md", "docs/README.md")
API = "api/index.html"
# Everything of this package is in `flip_hf` or in its own modules.
NO_PAGE = {"flip_hf.modeling"}

# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #222; background: white; max-width: 60rem;
  margin: 0 auto; padding: 1rem 1.5rem 4rem; }}
nav {{ border-bottom: 1px solid #ddd; padding-bottom: .6rem; }}
nav a {{ margin-right: 1rem; }}
pre {{ background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 14px; line-height: 1.4; }}
code {{ font-size: 90%; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
td, th {{ border: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; }}
img {{ max-width: 100%; }}
{code_style}
</style>
</head>
<body>
<nav><a href="{up}README.html">flip_hf</a> <a href="{up}docs/README.html">Guides</a> <a href="{up}{api}">API</a>
<a href="{up}CONTRIBUTING.html">Contributing</a></nav>
{body}
</body>
</html>
"""
LINK = re.compile(r'(?P<before>(?:href|src)=")(?P<target>[^"]+)"')
CODE = re.compile(r"(<pre.*?</pre>|<code>.*?</code>)", flags=re.S)


def fill_page(name: Path, title: str, body: str) -> str:
    """A whole page.

    Args:
        name: its path in the site.
        title: its title; tags are dropped.
        body: HTML.
    """
    return PAGE.format(
        title=re.sub(r"<.*?>", "", title),
        code_style=formatter.get_style_defs(".pdoc-code"),  # pyright: ignore[reportAttributeAccessIssue]
        up="../" * (len(name.parts) - 1),
        api=API,
        body=body,
    )


class Site:
    """The pages reached from `START`, written below a folder.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path):
        self.out, self.problems = out, []
        self._bodies: dict[Path, str] = {}
        self._fragments: list[tuple[Path, Path, str]] = []

    def write(self) -> None:
        """Writes the pages and copies the files they link to; what leads nowhere is added to `problems`."""
        waiting = [ROOT / name for name in START]
        while waiting:
            page = waiting.pop()
            if page not in self._bodies:
                body = str(to_html(page.read_text(encoding="utf-8")))
                self._bodies[page] = ""
                # Links inside of code are code.
                parts = CODE.split(body)
                parts[::2] = [
                    LINK.sub(lambda link, page=page: self._follow(page, link, waiting), p) for p in parts[::2]
                ]
                self._bodies[page] = "".join(parts)
        for page, body in self._bodies.items():
            self._write_page(page, body)
        for page, target, fragment in self._fragments:
            if f'id="{fragment}"' not in self._bodies[target]:
                self.problems.append(f"{page.relative_to(ROOT)}: {target.name} has no heading #{fragment}")
        (self.out / "index.html").write_text('<meta http-equiv="refresh" content="0; url=README.html">\n')

    def _follow(self, page: Path, link: re.Match, waiting: list[Path]) -> str:
        target, _, fragment = html.unescape(link["target"]).partition("#")
        if ":" in target:
            return link[0]
        path = Path(os.path.normpath(page.parent / target)) if target else page
        if not path.exists() or not path.is_relative_to(ROOT):
            self.problems.append(f"{page.relative_to(ROOT)}: there is no {target}")
            return link[0]
        if fragment and path.suffix == ".md":
            self._fragments.append((page, path, fragment))
        if path.suffix == ".md":
            waiting.append(path)
            target = re.sub(r"\.md$", ".html", target)
        else:
            self._copy(path)
        return f'{link["before"]}{target}{"#" if fragment else ""}{fragment}"'

    def _copy(self, path: Path) -> None:
        place = self.out / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(path, place)

    def _write_page(self, page: Path, body: str) -> None:
        name = page.relative_to(ROOT).with_suffix(".html")
        title = re.search(r"<h1[^>]*>(.*?)</h1>", body)
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        (self.out / name).write_text(fill_page(name, title[1] if title else name.stem, body), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------------

# [`Name`], as Hugging Face's doc-builder writes it; `~` asks for the last part of the name.
REFERENCE = re.compile(r"\[`(?P<short>~?)(?P<name>[\w.]+)`\]")


class References:
    """Makes links of [`Name`] in docstrings; a name that no page documents is added to `problems`."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __call__(self, docstring: str, module: Any, modules: Mapping[str, Any]) -> str:
        """The docstring, of this module, with links to pages of these modules."""

        def linked(match: re.Match) -> str:
            name = match["name"]
            shown = name.rpartition(".")[2] if match["short"] else name
            found = self._find(name, module, modules)
            if found is None:
                # Docstrings that our classes inherit name classes of Transformers.
                if not hasattr(transformers, name.partition(".")[0]):
                    self.problems.append(f"{module.modulename}: [`{name}`] is documented nowhere")
                return f"`{shown}`"
            where, qualname = found
            if where == module.modulename:
                return f"`{shown}`"  # pdoc's own links do
            return f"[`{shown}`]({relative_link(module.modulename, where)}#{qualname})"

        return REFERENCE.sub(linked, docstring)

    def _find(self, name: str, module: Any, modules: Mapping[str, Any]) -> tuple[str, str] | None:
        """Module and name of what is meant: of this module, else public, else of any other."""
        several = (module.modulename, "flip_hf", *modules)
        for where in several:
            if modules[where].get(name) is not None:
                return where, name
        first, _, rest = name.partition(".")  # papers.published
        return next(((m, rest) for m in several if m.endswith(f".{first}") and modules[m].get(rest) is not None), None)


def left_out() -> list[str]:
    """Modules that cannot be imported because torchvision, an extra of its own, is not installed."""
    if find_spec("torchvision") is not None:
        return []
    missing = []
    for module in pkgutil.walk_packages(importlib.import_module("flip_hf").__path__, "flip_hf."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            if "torchvision" not in str(error):
                raise
            missing.append(module.name)
    return missing


def module_specs() -> Iterator[str]:
    """What pdoc is to walk: a package with `__all__` it takes for one page, so what lies in those is named as well."""
    yield "flip_hf"
    for package in ("flip_hf", "flip_hf.modeling"):
        found = pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
        yield from (module.name for module in found if module.name not in NO_PAGE)
    yield from (f"!{name}" for name in left_out())


def overview(names: list[str]) -> str:
    """A list of modules, each with the first line of its docstring."""
    rows = []
    for name in names:
        first = (importlib.import_module(name).__doc__ or "").strip().partition("\n")[0]
        rows.append(f"| [`{name}`]({name.replace('.', '/')}.html) | {first} |")
    public = "Public names are in [`flip_hf`](flip_hf.html); what they are made of is in the modules."
    return str(to_html("\n".join((f"# Reference\n\n{public}\n\n| module | |\n|---|---|", *rows))))


def write_reference(out: Path) -> list[str]:
    """Writes a page a module into `api`, and an overview; returns what is wrong with docstrings."""
    references, folder = References(), (out / API).parent

    @pass_context
    def to_markdown(context: Any, docstring: str) -> str:
        linked = references(docstring, context["module"], context["all_modules"])
        return to_markdown_with_context(context, linked)

    pdoc.render.env.filters["to_markdown"] = to_markdown
    pdoc.render.configure(docformat="google", footer_text="flip_hf", show_source=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"pdoc\..*")
        pdoc.pdoc(*module_specs(), output_directory=folder)
    pages = (page.relative_to(folder).with_suffix("") for page in folder.rglob("*.html") if page != out / API)
    listed = overview(sorted(".".join(page.parts) for page in pages))
    (out / API).write_text(fill_page(Path(API), "Reference", listed), encoding="utf-8")
    absent = left_out()
    if absent:
        print(f"Without torchvision these have no page, and references are not checked: {', '.join(absent)}")
    problems = [] if absent else references.problems
    told = (str(warning.message) for warning in caught)
    return [*problems, *(message for message in told if not any(name in message for name in absent))]


def main() -> None:
    """Builds everything; ends with an error where a link or a reference leads nowhere."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    out, start = Path(sys.argv[1]), time.monotonic()
    site = Site(out)
    site.write()
    problems = [*site.problems, *write_reference(out)]
    print(f"{out / 'index.html'}: {len(list(out.rglob('*.html')))} pages in {time.monotonic() - start:.0f} s")
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in dict.fromkeys(problems)))


if __name__ == "__main__":
    main()
