"""A model's embeddings of labels, saved as safetensors."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "flip_hf label embeddings 2"


@dataclass(frozen=True)
class LabelEmbeddings:
    """A model's embeddings of labels.

    Attributes:
        labels: C names.
        templates: the prompts that were averaged.
        weights: (C, E), float32, normalised.
        fingerprint: digest of the text tower that made them; those of another tower are refused.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    weights: Tensor
    fingerprint: str

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        weights = self.weights.cpu().contiguous()
        about = {
            "labels": self.labels,
            "templates": self.templates,
            "fingerprint": self.fingerprint,
            "sha256": _digest(weights),
        }
        save_file({"weights": weights}, path, metadata={"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "LabelEmbeddings":
        """Reads a file that [`LabelEmbeddings.save`] wrote.

        Raises:
            ValueError: the file is something else, or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is not {FORMAT!r}")
                about = json.loads(metadata["about"])
                weights = file.get_tensor("weights")
            found = cls(tuple(about["labels"]), tuple(about["templates"]), weights, about["fingerprint"])
            if weights.ndim != 2 or len(weights) != len(found.labels) or weights.dtype != torch.float32:
                raise ValueError("its numbers have another shape or type")
            if about["sha256"] != _digest(weights):
                raise ValueError("its numbers have changed since it was written")
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} does not hold label embeddings: {error}.") from error
        return found


def _digest(weights: Tensor) -> str:
    return hashlib.sha256(weights.numpy().data).hexdigest()
