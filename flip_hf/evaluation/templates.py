"""Labels in words and their prompt templates. It imports little, since options are checked with it."""

import string
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from flip_hf.console.files import read_text

PROMPT_SETS = ("clip_1", "clip_7", "clip_80")


@cache
def prompt_set(name: str) -> tuple[str, ...]:
    """Reads the templates of a named set: `clip_1`, `clip_7` or `clip_80`."""
    return _lines((resources.files("flip_hf.evaluation") / "prompts" / f"{name}.txt").read_text(encoding="utf-8"))


def _lines(text: str) -> tuple[str, ...]:
    """Returns the templates of a file, one a line; empty lines and those that begin with `#` are left out."""
    return tuple(line for line in text.splitlines() if line.strip() and not line.startswith("#"))


def fault_of(template: str) -> str | None:
    """Describes why a template cannot take a label, as the end of a sentence; None if it can.

    A template has one `{}`; `{{` and `}}` are literal braces.
    """
    try:
        fields = [(name, conversion, spec) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError:
        return "has a single brace; write {{ and }} for literal ones."
    fields = [field for field in fields if field[0] is not None]
    for name, conversion, spec in fields:
        if name or conversion or spec:
            written = f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
            return f"has {written}, which nothing fills; write {{}} for the label, and {{{{ }}}} for literal braces."
    if not fields:
        return "has no {} for the label."
    return f"has {{}} {len(fields)} times; write it once, where the label goes." if len(fields) > 1 else None


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Resolves templates from the name of a set, one template, or several.

    Raises:
        ValueError: there are none, or one does not have exactly one `{}` for the label.
    """
    if isinstance(templates, str):
        templates = prompt_set(templates) if templates in PROMPT_SETS else (templates,)
    for template in templates:
        fault = fault_of(template)
        if fault is not None:
            sets = "" if "{" in template else f" Sets of templates are {', '.join(PROMPT_SETS)}."
            raise ValueError(f"The template {template!r} {fault}{sets}")
    if not templates:
        raise ValueError("Give at least one template.")
    return tuple(templates)


def read_templates(given: Sequence[str]) -> tuple[str, ...]:
    """Reads the templates that an option names: sets by name, files with one a line, and templates themselves.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no template, or one does not have exactly one `{}` for the label; or a name is neither a
            set's nor a file's.
    """
    found: list[str] = []
    for each in given:
        if each in PROMPT_SETS:
            found += prompt_set(each)
        elif "{" not in each and "}" not in each and _is_path(each):
            lines = _lines(read_text(each, "prompt templates"))
            if not lines:
                raise ValueError(f"{each} has no templates: write one a line, with {{}} for the label.")
            found += lines
        else:
            found.append(each)
    return resolve_templates(found)


def _is_path(text: str) -> bool:
    try:
        return text.endswith(".txt") or Path(text).is_file()
    except OSError:  # too long for a path
        return False


def check_labels(labels: Sequence[str]) -> None:
    """Checks that there are labels, and that none is empty or repeated.

    Raises:
        ValueError: there are none, they are one text instead of several, or one is empty or repeated.
    """
    if isinstance(labels, str):
        listed = [each.strip() for each in labels.split(",")]
        raise ValueError(f"Labels are a list of texts, got the text {labels!r}: give {listed!r}.")
    if len(labels) == 0:  # also of an array or a table's column
        raise ValueError("There are no labels: give at least one.")
    seen: set[str] = set()
    for number, label in enumerate(labels, start=1):
        if label in seen:
            raise ValueError(f"The label {label!r} is given twice: give each label once.")
        seen.add(label)
        if not label.strip():
            raise ValueError(
                f"Label {number} of {len(labels)} is empty: describe what may be in the image, or leave it out."
            )
