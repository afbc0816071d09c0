"""Zero-shot classification: class names through prompts to weights, images to the nearest.

Works on anything with `get_image_features` and `get_text_features`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


def normalized(embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, E) of length 1, float32."""
    return nn.functional.normalize(embeds.float(), dim=-1)


@torch.no_grad()
def class_embeddings(
    model: Any, tokenizer: Any, class_names: tuple[str, ...], templates: Iterable[str], device: torch.device
) -> torch.Tensor:
    """One embedding a class: the normalised mean of its normalised prompts, as CLIP and FLIP build them.

    Args:
        model: in evaluation mode.
        tokenizer: its `model_max_length` cuts the prompts.
        class_names: C names.
        templates: prompts with `{}` for the name.
        device: where the model lies.

    Returns:
        (C, E), float32.
    """
    total = torch.zeros(())
    for template in templates:
        pieces = []
        for start in range(0, len(class_names), 256):
            prompts = [template.format(name) for name in class_names[start : start + 256]]
            inputs = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
            pieces.append(normalized(model.get_text_features(**inputs).pooler_output))
        total = total.to(device) + torch.cat(pieces)
    return normalized(total)


@dataclass
class ZeroShotCounts:
    """Counts that add up over processes.

    Attributes:
        correct1, correct5: images whose class is first, or among the first five.
        total: images seen.
        refused: images that could not be used, by reason.
    """

    correct1: int = 0
    correct5: int = 0
    total: int = 0
    refused: Counter = field(default_factory=Counter)

    def metrics(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy, in [0, 1]."""
        total = max(1, self.total)
        return {"top1": self.correct1 / total, "top5": self.correct5 / total, "images": float(self.total)}


@torch.no_grad()
def count_zero_shot(
    model: Any, batches: Iterable[dict[str, Any]], weights: torch.Tensor, normalize: nn.Module
) -> ZeroShotCounts:
    """Classifies labelled images.

    Args:
        model: in evaluation mode.
        batches: `{"patches" (B, L, 3 * P * P) uint8, "labels" (B), "refused"}`.
        weights: (C, E), from [`class_embeddings`], on the model's device.
        normalize: uint8 patches to what the model takes.
    """
    counts = ZeroShotCounts()
    for batch in batches:
        counts.refused.update(batch["refused"])
        labels = batch["labels"].to(weights.device)
        if not len(labels):
            continue
        patches = normalize(batch["patches"].to(weights.device))
        embeds = normalized(model.get_image_features(patches=patches).pooler_output)
        ranked = (embeds @ weights.T).topk(min(5, weights.shape[0]), dim=1).indices  # (B, 5)
        hits = ranked == labels[:, None]
        counts.correct1 += int(hits[:, 0].sum())
        counts.correct5 += int(hits.any(dim=1).sum())
        counts.total += len(labels)
    return counts
