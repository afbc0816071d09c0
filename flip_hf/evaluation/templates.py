"""Labels in words and their prompt templates. It imports little, since options are checked with it."""

import string
from collections.abc import Sequence
from functools import cache
from importlib import resources

PROMPT_SETS = ("clip_1", "clip_7", "clip_80")


@cache
def prompt_set(name: str) -> tuple[str, ...]:
    """Reads the templates of a named set: `clip_1`, `clip_7` or `clip_80`."""
    text = (resources.files("flip_hf.evaluation") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


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


def check_labels(labels: Sequence[str]) -> None:
    """Checks that there are labels, and that none is empty or repeated.

    Raises:
        ValueError: there are none, or one is empty or repeated.
    """
    if not labels:
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
