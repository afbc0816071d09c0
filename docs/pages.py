"""Chooses the pages of the site, for MkDocs (a hook of mkdocs.yml).

The site has the repository's layout, so that a relative link which works in the repository works in the site. Links
to files that are no pages, such as code, lead to the repository.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = (
    "*.md",
    "docs/*.md",
    "docs/figures/*",
    "model_cards/*/*",
    "scripts/results/**/*",
)
SUFFIXES = {".md", ".png", ".svg"}
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?=[)#])")


def on_config(config: MkDocsConfig) -> None:
    """Reads the repository's address where the package has it."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.extra["repository"] = project["urls"]["Repository"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of `docs_dir` by those that are published, each at its path in the repository."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in published():
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    modules = list(public_modules())
    for name in modules:
        path = page_of(name, modules)
        options = "    options: { members: false }\n" if path.endswith("/index.md") else ""
        content = f"---\ntitle: {name}\n---\n\n::: {name}\n{options}"
        files.append(File.generated(config, path, content=content))
    assert config.nav is not None
    config.nav.insert(-1, {"Reference": navigation("flip_hf", modules)})
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to files of the repository that are no part of the site to the repository."""

    def followed(link: re.Match) -> str:
        target = os.path.normpath(Path(page.file.src_uri).parent / link["target"])
        if files.get_file_from_path(target) is not None or not (ROOT / target).exists():
            return link[0]  # MkDocs makes a link of it, or says that nothing is there
        return f"{config.extra['repository']}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}"

    return LINK.sub(followed, markdown)


def published() -> Iterator[Path]:
    """Pages and pictures, in the order of `PUBLISHED`."""
    for pattern in PUBLISHED:
        for path in sorted(ROOT.glob(pattern)):
            if path.suffix in SUFFIXES:
                yield path


def public_modules() -> Iterator[str]:
    """Names of all modules, packages before what is inside them."""
    # `flip_hf/modeling` is a link, which `Path.rglob` does not follow on every Python.
    for folder, subfolders, names in os.walk(ROOT / "flip_hf", followlinks=True):
        subfolders.sort()
        package = Path(folder).relative_to(ROOT).as_posix().replace("/", ".")
        if "__init__.py" in names:
            yield package
            yield from (f"{package}.{name[:-3]}" for name in sorted(names) if re.fullmatch(r"[a-z]\w*\.py", name))


def page_of(name: str, modules: list[str]) -> str:
    """The path of a module's page. A package's is the index of its folder, which no module named `index` may take."""
    path = f"reference/{name.replace('.', '/')}"
    if any(other.startswith(f"{name}.") for other in modules):
        return f"{path}/index.md"
    return f"{path}_.md" if path.endswith("/index") else f"{path}.md"


def navigation(package: str, modules: list[str]) -> list[Any]:
    """The pages of a package and of what is inside it, as MkDocs' `nav` has them."""
    inside = [name for name in modules if name.rpartition(".")[0] == package]
    entries: list[Any] = [page_of(package, modules)]
    for name in inside:
        short = name.rpartition(".")[2]
        below = navigation(name, modules)
        entries.append({short: below if len(below) > 1 else below[0]})
    return entries
