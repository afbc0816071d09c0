"""Zero-shot accuracy during training, shared out over the processes."""

import logging
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from flip_hf.data.sources import Source
from flip_hf.evaluation.features import extract
from flip_hf.evaluation.scoring import top_k_accuracy
from flip_hf.evaluation.zero_shot import class_embeddings, normalized
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

    def encode(patches: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
        return normalized(encoder.get_image_features(patches=normalize(patches)).pooler_output)  # pyright: ignore

    encoder.eval()
    weights = class_embeddings(encoder, tokenizer, class_names, setup.templates(data), accelerator.device)
    loader = setup.make_eval_loader(data, source, class_names, vision_config, accelerator)
    features = extract(encode, loader, accelerator, "zero-shot")
    encoder.train()
    if features.refused:
        logger.warning("The evaluation skipped images: %s", dict(features.refused))
    if not features.targets:
        return {"top1": 0.0, "top5": 0.0, "images": 0.0}
    scores, labels = features.values @ weights.cpu().numpy().T, np.array(features.targets)
    top1, top5 = (top_k_accuracy(scores, labels, k) for k in (1, 5))
    return {"top1": top1, "top5": top5, "images": float(len(labels))}
