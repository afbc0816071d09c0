"""What a run's weights are worth, during training, shared out over the processes."""

import logging
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from flip_hf.evaluation.features import extract
from flip_hf.evaluation.reconstruction_error import measure_reconstruction
from flip_hf.evaluation.scoring import top_k_accuracy
from flip_hf.evaluation.zero_shot import class_embeddings, normalized
from flip_hf.training import setup
from flip_hf.training.arguments import Arguments
from flip_hf.training.encoder import PairEncoder

logger = logging.getLogger(__name__)


class Validator:
    """Zero-shot accuracy on whole images, the error of reconstructing masked ones, or both, as the run's objective is.

    Args:
        arguments: of the run.
        evaluation: the images and the names of their classes.
        tokenizer: of the prompts; not read without a contrast.
        normalize: uint8 patches to what the model takes.
        accelerator: each process takes its part of the images.
    """

    def __init__(
        self,
        arguments: Arguments,
        evaluation: setup.Evaluation,
        tokenizer: Any,
        normalize: nn.Module,
        accelerator: Accelerator,
    ):
        self.arguments, self.objective = arguments, arguments.objective
        self.source, self.class_names = evaluation
        self.tokenizer, self.normalize, self.accelerator = tokenizer, normalize, accelerator

    def __call__(self, encoder: PairEncoder) -> dict[str, float]:
        """Measures.

        Args:
            encoder: the model, whole and not wrapped; in training mode again afterwards.

        Returns:
            The number of `images`; `top1` and `top5` in [0, 1]; `reconstruction_error` and the baselines' errors (see
            [`measure_reconstruction`]). Where no image can be used, `images` alone, 0: nothing was measured.
        """
        encoder.eval()
        metrics = self._classify(encoder) if self.objective.contrasts else {}
        if self.objective.reconstructs:
            model: Any = encoder.model
            ratio = self.arguments.model.mask_ratio
            with encoder.autocast():
                found = measure_reconstruction(
                    model, self._batches(encoder), self.accelerator, ratio, to_patches=self.normalize
                )
            metrics |= found if found["images"] else {"images": 0.0}
        encoder.train()
        return metrics

    def _batches(self, encoder: PairEncoder) -> torch.utils.data.DataLoader:
        vision_config = encoder.flip.config.vision_config
        return setup.make_eval_loader(
            self.arguments.data, self.source, self.class_names, vision_config, self.accelerator
        )

    def _classify(self, encoder: PairEncoder) -> dict[str, float]:
        def encode(patches: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
            return normalized(encoder.get_image_features(patches=self.normalize(patches)).pooler_output)

        prompts, device = setup.templates(self.arguments.data), self.accelerator.device
        weights = class_embeddings(encoder, self.tokenizer, self.class_names, prompts, device)
        features = extract(encode, self._batches(encoder), self.accelerator, "zero-shot")
        if features.refused:
            logger.warning("The evaluation skipped images: %s", dict(features.refused))
        if not features.targets:
            return {"images": 0.0}
        scores = features.values @ weights.cpu().numpy().T
        labels = np.array(features.targets)
        top1, top5 = (top_k_accuracy(scores, labels, k) for k in (1, 5))
        return {"top1": top1, "top5": top5, "images": float(len(labels))}


def in_words(metrics: dict[str, float], class_names: tuple[str, ...]) -> str:
    """Says what a [`Validator`] has measured, in a sentence without an end; nothing where there was no evaluation."""
    if metrics.get("images") == 0:
        return "not measured: none of the evaluation's images can be used (the log says why)"
    said = []
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
