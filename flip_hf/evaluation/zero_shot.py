"""Zero-shot classification: class names through prompts to weights, images to the nearest.

Works on anything with `get_image_features` and `get_text_features`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from flip_hf.data.texts import bound_text


def normalized(embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, E) of length 1, float32."""
    return nn.functional.normalize(embeds.float(), dim=-1)


def check_alternatives(model: Any) -> None:
    """Checks that a model's labels are alternatives, as CLIP's are.

    Raises:
        ValueError: the model is of SigLIP's kind.
    """
    if getattr(model, "logit_bias", None) is not None:
        raise ValueError(
            f"{type(model).__name__} gives each label a probability of its own (SigLIP); give a model of CLIP's kind, "
            "whose labels are alternatives."
        )


def label_probabilities(model: Any, image_embeds: torch.Tensor, label_embeds: torch.Tensor) -> torch.Tensor:
    """Probabilities (B, C), float32, of labels that are alternatives.

    Args:
        model: knows the temperature.
        image_embeds: (B, E), normalised.
        label_embeds: (C, E), normalised.
    """
    scale = model.get_logit_scale() if hasattr(model, "get_logit_scale") else model.logit_scale.exp()
    return (image_embeds @ label_embeds.T * scale.float()).softmax(dim=1)


class TextInputs:
    """Texts to a model's token ids and mask (B, T), cut at its context; `.to(device)` works on what it returns.

    Of a text of thousands of characters the beginning alone is tokenized, see [`bound_text`].

    Args:
        tokenizer: the model's.
        config: the model's, where it is at hand.
    """

    def __init__(self, tokenizer: Any, config: Any = None):
        self.tokenizer = tokenizer
        context = config.get_text_config().max_position_embeddings if config is not None else tokenizer.model_max_length
        # A tokenizer that was never told a length has 10^30, which no tensor takes.
        self.max_length = min(tokenizer.model_max_length, context, 2**16)
        # SigLIP reads the last position, padding or not, and was trained on full rows.
        self.padding = "max_length" if "siglip" in getattr(config, "model_type", "") else "longest"

    def __call__(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            list(map(bound_text, texts)),
            padding=self.padding,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )


@torch.no_grad()
def prompt_embeddings(
    model: Any, tokenizer: Any, class_names: Sequence[str], template: str, device: torch.device
) -> torch.Tensor:
    """Embeddings (C, E), normalised, float32, of one prompt about each class; see [`class_embeddings`]."""
    pieces = []
    text_inputs = TextInputs(tokenizer, getattr(model, "config", None))
    for start in range(0, len(class_names), 256):
        prompts = [template.format(bound_text(name)) for name in class_names[start : start + 256]]
        pieces.append(normalized(model.get_text_features(**text_inputs(prompts).to(device)).pooler_output))
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
