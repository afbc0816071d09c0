"""Zero-shot classification: class names through prompts to weights, images to the nearest.

Works on anything with `get_image_features` and `get_text_features`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


def normalized(embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, E) of length 1, float32."""
    return nn.functional.normalize(embeds.float(), dim=-1)


def text_padding(model: Any) -> Any:
    """How a tokenizer pads the model's texts: to the longest; SigLIP, which reads the padding, to its context."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    return "max_length" if model_type.startswith("siglip") else True


@torch.no_grad()
def prompt_embeddings(
    model: Any, tokenizer: Any, class_names: Sequence[str], template: str, device: torch.device
) -> torch.Tensor:
    """Embeddings (C, E), normalised, float32, of one prompt about each class; see [`class_embeddings`]."""
    pieces, padding = [], text_padding(model)
    for start in range(0, len(class_names), 256):
        prompts = [template.format(name) for name in class_names[start : start + 256]]
        inputs = tokenizer(prompts, padding=padding, truncation=True, return_tensors="pt").to(device)
        pieces.append(normalized(model.get_text_features(**inputs).pooler_output))
    return torch.cat(pieces)


def class_embeddings(
    model: Any, tokenizer: Any, class_names: Sequence[str], templates: Iterable[str], device: torch.device
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
    total = torch.zeros((), device=device)
    for template in templates:
        total = total + prompt_embeddings(model, tokenizer, class_names, template, device)
    return normalized(total)
