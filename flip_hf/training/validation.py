"""Evaluation during training, distributed over the processes."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from flip_hf.data.class_names import spoken
from flip_hf.data.sources import Source
from flip_hf.data.targets import Captions, ClassIndex, nothing
from flip_hf.evaluation.features import Features, extract, extract_texts
from flip_hf.evaluation.reconstruction_error import measure_reconstruction
from flip_hf.evaluation.scoring import recall_at, retrieval_ranks, top_k_accuracy
from flip_hf.evaluation.zero_shot import class_embeddings, normalized, prompt_embeddings
from flip_hf.modeling.modeling_flip import image_text_sigmoid_loss
from flip_hf.training.arguments import Arguments
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.evaluation_data import Evaluation, make_eval_loader, templates

logger = logging.getLogger(__name__)

RANKS = (1, 5, 10)
_TEXTS = 256  # texts encoded at once


class Validator:
    """Evaluates a run's weights by all measures that its data and objective allow.

    Held-out pairs: loss and retrieval, on whole images. Labelled images: zero-shot accuracy. Where dropped patches are
    reconstructed: the error on masked ones.

    Args:
        arguments: the run's arguments.
        evaluation: its evaluation data.
        tokenizer: for the texts; unused where nothing is contrasted.
        normalize: turns uint8 patches into the model's inputs.
        accelerator: the process layer; each process takes its part of the images.
    """

    def __init__(
        self,
        arguments: Arguments,
        evaluation: Evaluation,
        tokenizer: Any,
        normalize: nn.Module,
        accelerator: Accelerator,
    ):
        self.arguments = arguments
        self.objective = arguments.objective
        self.evaluation = evaluation
        self.tokenizer = tokenizer
        self.normalize = normalize
        self.accelerator = accelerator
        self.prompts = templates(arguments.data)  # read once: their file may be gone later

    def __call__(self, encoder: PairEncoder) -> dict[str, float]:
        """Evaluates a model.

        Args:
            encoder: the model, whole and unwrapped; back in training mode afterwards.

        Returns:
            For pairs: the numbers of `pairs` (images) and `captions`, and the output of [`measure_pairs`]. For labelled
            images: the number of `images`; `top1` and `top5` in [0, 1]. For reconstructions: `reconstruction_error` and
            the baselines' errors (see [`measure_reconstruction`]). Where no image is usable, only the number, 0.
        """
        encoder.eval()
        metrics: dict[str, float] = {}
        images = self.evaluation.images
        pairs = self.evaluation.pairs
        if self.objective.contrasts and pairs is not None:
            metrics |= self._compare(encoder, pairs)
        if self.objective.contrasts and images is not None:
            metrics |= self._classify(encoder, images)
        source = images or pairs
        if self.objective.reconstructs and source is not None:
            model: Any = encoder.model
            ratio = self.arguments.model.mask_ratio
            batches = self._batches(encoder, source, nothing)
            with encoder.autocast():
                found = measure_reconstruction(model, batches, self.accelerator, ratio, to_patches=self.normalize)
            metrics |= found if found["images"] else {"images": 0.0}
        encoder.train()
        return metrics

    def _batches(
        self, encoder: PairEncoder, source: Source, read_target: Callable[[Any], Any]
    ) -> torch.utils.data.DataLoader:
        vision_config = encoder.flip.config.vision_config
        return make_eval_loader(self.arguments.data, source, read_target, vision_config, self.accelerator)

    def _features(self, encoder: PairEncoder, source: Source, read_target: Callable[[Any], Any], name: str) -> Features:
        def encode(patches: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
            return normalized(encoder.get_image_features(patches=self.normalize(patches)).pooler_output)

        features = extract(encode, self._batches(encoder, source, read_target), self.accelerator, name)
        if features.refused:
            logger.warning("The evaluation skipped images: %s", dict(features.refused))
        return features

    def _classify(self, encoder: PairEncoder, source: Source) -> dict[str, float]:
        names = self.evaluation.class_names
        device = self.accelerator.device
        weights = class_embeddings(encoder, self.tokenizer, list(map(spoken, names)), self.prompts, device)
        features = self._features(encoder, source, ClassIndex(names), "zero-shot")
        if not features.targets:
            return {"images": 0.0}
        scores = features.values @ weights.cpu().numpy().T
        labels = np.array(features.targets)
        top1, top5 = (top_k_accuracy(scores, labels, k) for k in (1, 5))
        return {"top1": top1, "top5": top5, "images": float(len(labels))}

    def _compare(self, encoder: PairEncoder, source: Source) -> dict[str, float]:
        features = self._features(encoder, source, Captions(), "held-out pairs")
        if len(features.targets) < 2:
            return {"pairs": 0.0}
        texts = [text for of_image in features.targets for text in of_image]
        counts = [len(of_image) for of_image in features.targets]

        def encode(some: list[str]) -> torch.Tensor:
            return prompt_embeddings(encoder, self.tokenizer, some, "{}", self.accelerator.device)

        values = extract_texts(encode, texts, self.accelerator, _TEXTS)
        scale = float(encoder.flip.get_logit_scale().detach())
        bias = encoder.flip.logit_bias
        bias = None if bias is None else float(bias.detach())
        batch_size = self.arguments.optimization.batch_size
        measured = measure_pairs(features.values, values, np.array(counts), scale, batch_size, bias)
        return {**measured, "pairs": float(len(counts)), "captions": float(len(texts))}


def measure_pairs(
    images: np.ndarray,
    texts: np.ndarray,
    counts: np.ndarray,
    scale: float,
    batch_size: int,
    bias: float | None = None,
) -> dict[str, float]:
    """Measures loss and retrieval on pairs.

    Args:
        images: (I, E), unit length.
        texts: (T, E), unit length, grouped by image, in the order of the images.
        counts: (I,), number of texts per image.
        scale: the factor on the cosines.
        batch_size: the run's. The loss is computed on consecutive batches of about this size, each image with its first
            text, so that it is comparable with the training loss; on a single batch where there are fewer.
        bias: added to the scaled cosines, for the sigmoid loss; None for the softmax loss.

    Returns:
        `validation_loss`; the six recalls of retrieval among all images and all texts, where any of an image's texts is
        a hit; and their mean, `mean_recall`. Empty where a number is not finite.
    """
    of_logits = [scale] if bias is None else [scale, bias]
    if not all(np.isfinite(values).all() for values in (images, texts, of_logits)):
        return {}
    image_of_text = np.repeat(np.arange(len(images)), counts)
    first_texts = texts[np.cumsum(counts) - counts]  # (I, E)
    pieces = np.array_split(np.arange(len(images)), max(1, round(len(images) / batch_size)))
    losses = [len(piece) * _loss(images[piece], first_texts[piece], scale, bias) for piece in pieces]
    of_images, of_texts = retrieval_ranks(images, texts, image_of_text)
    recalls = {
        f"{what}_retrieval_recall@{k}": recall_at(ranks, k)
        for what, ranks in (("text", of_images), ("image", of_texts))
        for k in RANKS
    }
    mean_recall = sum(recalls.values()) / len(recalls)
    return {"validation_loss": sum(losses) / len(images), "mean_recall": mean_recall, **recalls}


def _loss(images: np.ndarray, texts: np.ndarray, scale: float, bias: float | None) -> float:
    """Computes the contrastive loss of a batch of images (B, E) and their texts (B, E)."""
    logits = scale * torch.from_numpy(images) @ torch.from_numpy(texts).T  # (B, B)
    if bias is not None:
        return float(image_text_sigmoid_loss(logits + bias))
    labels = torch.arange(len(logits))
    losses = nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)
    return float(losses) / 2


def as_logged(metrics: dict[str, float], prefix: str = "") -> dict[str, float]:
    """Returns the metrics of a [`Validator`] under their names in the log, without the numbers of images and texts."""
    names = {"top1": "zero_shot_top1", "top5": "zero_shot_top5"}
    counts = ("images", "pairs", "captions")
    return {f"{prefix}{names.get(name, name)}": value for name, value in metrics.items() if name not in counts}


def in_words(metrics: dict[str, float], class_names: tuple[str, ...]) -> str:
    """Puts the metrics of a [`Validator`] into words, without a full stop; empty where there was no evaluation."""
    said = []
    if metrics.get("images") == 0:
        said.append("not measured: no evaluation image can be used (the log says why)")
    if metrics.get("pairs") == 0:
        said.append("not measured: fewer than two of the held-out pairs can be used (the log says why)")
    elif "pairs" in metrics:
        said.append(_pairs_in_words(metrics))
    if "top1" in metrics:
        said.append(
            f"zero-shot top-1 {metrics['top1']:.1%}, top-5 {metrics['top5']:.1%} on {metrics['images']:.0f} images of "
            f"{len(class_names)} classes (chance {1 / len(class_names):.1%})"
        )
    if "reconstruction_error" in metrics:
        error, mean, nearest = (metrics[f"{n}_error"] for n in ("reconstruction", "patch_mean", "nearest_patch"))
        said.append(
            f"reconstruction error {error:.3f} on {metrics['images']:.0f} images (each patch's mean colours "
            f"{mean:.3f}, the nearest visible patch {nearest:.3f})"
        )
    return "; ".join(said)


def _pairs_in_words(metrics: dict[str, float]) -> str:
    count = metrics["pairs"]
    if "mean_recall" not in metrics:
        return f"not measured on {count:,.0f} held-out images: the model's numbers are not finite"
    of_images = metrics["text_retrieval_recall@1"]
    of_texts = metrics["image_retrieval_recall@1"]
    return (
        f"held-out loss {metrics['validation_loss']:.3f}, R@1 {of_images:.1%} image to text and {of_texts:.1%} text to "
        f"image, mean R@1/5/10 {metrics['mean_recall']:.1%} on {count:,.0f} held-out images with "
        f"{metrics['captions']:,.0f} captions (chance R@1 {1 / count:.1%})"
    )
