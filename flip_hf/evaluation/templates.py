"""Labels in words and the prompts that they are put into. Options are checked by it, so that it imports little."""

import string
from collections.abc import Sequence
from functools import cache
from importlib import resources

PROMPT_SETS = ("clip_1", "clip_7", "clip_80")


@cache
def prompt_set(name: str) -> tuple[str, ...]:
    """The templates of a named set: `clip_1`, `clip_7` or `clip_80`."""
    text = (resources.files("flip_hf.evaluation") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def fault_of(template: str) -> str | None:
    """The fault that keeps a template from taking a label, as the end of a sentence; None if it takes one.

    A template has one `{}`; `{{` and `}}` are braces of the text.
    """
    try:
        fields = [(name, conversion, spec) for _, name, spec, conversion in string.Formatter().parse(template)]
    except ValueError:
        return "has a single brace; write {{ and }} for those of the text."
    fields = [field for field in fields if field[0] is not None]
    for name, conversion, spec in fields:
        if name or conversion or spec:
            written = f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
            return (
                f"has {written}, which nothing fills; write {{}} for the label, and {{{{ }}}} for braces of the text."
            )
    if not fields:
        return "has no {} for the label."
    return f"has {{}} {len(fields)} times; write it once, where the label goes." if len(fields) > 1 else None


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates from the name of a set, one template, or several.

    Raises:
        ValueError: there is none, or one does not have exactly one `{}` for the label.
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
    """Checks that there are labels, and that each says something.

    Raises:
        ValueError: there is none, or one is empty or stands twice.
    """
    if not labels:
        raise ValueError("There are no labels: give at least one.")
    seen: set[str] = set()
    for number, label in enumerate(labels, start=1):
        if label in seen:
            raise ValueError(f"The label {label!r} stands there twice: give at least one label, and none twice.")
        seen.add(label)
        if not label.strip():
            raise ValueError(
                f"Label {number} of {len(labels)} is empty: write what may be in the image, or leave it out."
            )
