"""Zero-shot accuracy during training, shared out over the processes."""

import logging
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from flip_hf.data.sources import Source
from flip_hf.evaluation.zero_shot import class_embeddings, count_zero_shot
from flip_hf.training import setup
from flip_hf.training.arguments import DataArguments

logger = logging.getLogger(__name__)


def validate(
    encoder: nn.Module,
    evaluation: tuple[Source, tuple[str, ...]],
    data: DataArguments,
    *,
    tokenizer: Any,
    vision_config: Any,
    normalize: nn.Module,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Classifies the evaluation data on whole images.

    Args:
        encoder: has `get_image_features` and `get_text_features`; in training mode again afterwards.
        evaluation: the labelled data and its class names.
        data: prompts and batch size.
        tokenizer: of the prompts.
        vision_config: the model's, for the size of images and patches.
        normalize: uint8 patches to what the model takes.
        accelerator: each process takes its part of the images.

    Returns:
        `top1` and `top5` in [0, 1], and the number of `images`.
    """
    source, class_names = evaluation
    encoder.eval()
    weights = class_embeddings(encoder, tokenizer, class_names, setup.templates(data), accelerator.device)
    loader = setup.make_eval_loader(data, source, class_names, vision_config, accelerator)
    counts = count_zero_shot(encoder, loader, weights, normalize)
    encoder.train()
    if counts.refused:
        logger.warning("The evaluation skipped images: %s", dict(counts.refused))
    local = torch.tensor([counts.correct1, counts.correct5, counts.total], device=accelerator.device)
    total: Any = accelerator.reduce(local, "sum")
    counts.correct1, counts.correct5, counts.total = total.tolist()
    return counts.metrics()
