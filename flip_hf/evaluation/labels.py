"""Labels in words, the prompts that they are put into, and the embeddings that a model gives them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PROMPT_SETS = ("clip_1", "clip_7", "clip_80")
FORMAT = "flip_hf label embeddings 1"


@cache
def prompt_set(name: str) -> tuple[str, ...]:
    """The templates of a named set: `clip_1`, `clip_7` or `clip_80`."""
    text = (resources.files("flip_hf.evaluation") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def fault_of(template: str) -> str | None:
    """What keeps a template with `{}` from taking a label, or None: other braces name what is not there."""
    try:
        template.format("label")
    except (IndexError, KeyError, ValueError, AttributeError):
        return "has braces other than {}; write {{ and }} for those of the text."
    return None


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates from the name of a set, one template, or several.

    Raises:
        ValueError: there is none, or one has no `{}` for the label.
    """
    if isinstance(templates, str):
        templates = prompt_set(templates) if templates in PROMPT_SETS else (templates,)
    for template in templates:
        if "{}" not in template:
            raise ValueError(
                f"The template {template!r} has no {{}} for the label, and is not a set of templates "
                f"({', '.join(PROMPT_SETS)})."
            )
        fault = fault_of(template)
        if fault is not None:
            raise ValueError(f"The template {template!r} {fault}")
    if not templates:
        raise ValueError("Give at least one template.")
    return tuple(templates)


@dataclass(frozen=True)
class LabelEmbeddings:
    """Labels as a model sees them.

    Attributes:
        labels: C names.
        templates: prompts that were averaged.
        weights: (C, E), float32, normalised.
        fingerprint: of the text tower that made them; weights of another are refused.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    weights: Tensor
    fingerprint: str

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        about = {"labels": self.labels, "templates": self.templates, "fingerprint": self.fingerprint}
        metadata = {"format": FORMAT, "about": json.dumps(about)}
        save_file({"weights": self.weights.cpu().contiguous()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "LabelEmbeddings":
        """Reads what [`LabelEmbeddings.save`] wrote.

        Raises:
            ValueError: the file is something else, or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"it is not of the format {FORMAT!r}")
                about, weights = json.loads(metadata["about"]), file.get_tensor("weights")
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} does not hold label embeddings: {error}.") from error
        return cls(tuple(about["labels"]), tuple(about["templates"]), weights, about["fingerprint"])
