"""Zero-shot classification: prompts turn class names into weights, and images go to the nearest.

It works with any model that has `get_image_features` and `get_text_features`.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from flip_hf.data.texts import bound_text

logger = logging.getLogger(__name__)


def normalized(embeds: torch.Tensor) -> torch.Tensor:
    """Normalises embeddings (B, E) to length 1, in float32."""
    return nn.functional.normalize(embeds.float(), dim=-1)


def check_alternatives(model: object) -> None:
    """Checks that a model's labels are alternatives, as CLIP's are.

    Raises:
        ValueError: the model is like SigLIP.
    """
    # A FlipModel's bias only belongs to its loss: as an addend of all logits alike, it changes no softmax.
    if getattr(model, "logit_bias", None) is not None and not hasattr(model, "get_logit_scale"):
        raise ValueError(
            f"{type(model).__name__} gives each label an independent probability (SigLIP). Make a FlipModel of it, "
            "which compares labels with each other: `flip-hf convert siglip MODEL FOLDER`."
        )


def label_probabilities(model: Any, image_embeds: torch.Tensor, label_embeds: torch.Tensor) -> torch.Tensor:
    """Returns probabilities (B, C), float32, of labels that are alternatives; a bias of all logits would change none.

    Args:
        model: the model, for its temperature.
        image_embeds: (B, E), normalised.
        label_embeds: (C, E), normalised.
    """
    scale = model.get_logit_scale() if hasattr(model, "get_logit_scale") else model.logit_scale.exp()
    return (image_embeds @ label_embeds.T * scale.float()).softmax(dim=1)


class TextInputs:
    """Tokenizes texts to a model's ids and mask (B, T), truncated to its context; the output has `.to(device)`.

    Only the beginning of a text of thousands of characters is tokenized, see [`bound_text`].

    Args:
        tokenizer: the model's tokenizer.
        config: the model's configuration, if available.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Any = None):
        self.tokenizer = tokenizer
        context = config.get_text_config().max_position_embeddings if config is not None else tokenizer.model_max_length
        # A tokenizer without a maximum length has 10^30, which no tensor can hold.
        self.max_length = min(tokenizer.model_max_length, context, 2**16)
        # SigLIP reads the last position, padding or not, and was trained on full rows.
        self.padding = "max_length" if "siglip" in getattr(config, "model_type", "") else "longest"

    def __call__(self, texts: Sequence[str]) -> BatchEncoding:
        return self.tokenizer(
            list(map(bound_text, texts)),
            padding=self.padding,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )


def warn_of_confused(model: Any, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], template: str) -> None:
    """Warns of different names with the same tokens, between which a model cannot choose.

    Args:
        model: the model, for its context.
        tokenizer: its tokenizer.
        names: names of classes.
        template: a prompt with `{}` for the name.
    """
    tokens = TextInputs(tokenizer, getattr(model, "config", None))
    read: dict[tuple[int, ...], list[str]] = defaultdict(list)
    ids = tokens([template.format(bound_text(name)) for name in names])["input_ids"]
    for name, row in zip(names, ids.tolist(), strict=True):  # pyright: ignore[reportAttributeAccessIssue]
        read[tuple(row)].append(name)
    confused = [each for each in read.values() if len({name.lower() for name in each}) > 1]
    if confused:
        count = sum(map(len, confused))
        logger.warning(
            "The tokenizer makes the same tokens of %s, so the model cannot tell them apart%s. It does not know their "
            "words, or cuts them off at its context of %d tokens.",
            " and ".join(map(repr, confused[0][:2])),
            f" (nor others: {count} of {len(names)} names)" if count > 2 else "",
            tokens.max_length,
        )


@torch.no_grad()
def prompt_embeddings(
    model: Any, tokenizer: PreTrainedTokenizerBase, class_names: Sequence[str], template: str, device: torch.device
) -> torch.Tensor:
    """Encodes one prompt per class to embeddings (C, E), normalised, float32; see [`class_embeddings`]."""
    pieces = []
    text_inputs = TextInputs(tokenizer, getattr(model, "config", None))
    for start in range(0, len(class_names), 256):
        prompts = [template.format(bound_text(name)) for name in class_names[start : start + 256]]
        pieces.append(normalized(model.get_text_features(**text_inputs(prompts).to(device)).pooler_output))
    return torch.cat(pieces)


def class_embeddings(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    templates: Iterable[str],
    device: torch.device,
) -> torch.Tensor:
    """Computes one embedding per class, the normalised mean of its normalised prompts, as CLIP and FLIP do.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; `model_max_length` truncates the prompts.
        class_names: C names.
        templates: prompts with `{}` for the name.
        device: the model's device.

    Returns:
        (C, E), float32.
    """
    total = torch.zeros((), device=device)
    for template in templates:
        total = total + prompt_embeddings(model, tokenizer, class_names, template, device)
    return normalized(total)
