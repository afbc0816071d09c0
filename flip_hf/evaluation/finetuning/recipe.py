"""MAE's recipe to fine-tune a ViT end to end: hyper-parameters, layer-wise learning rates, and drop path.

Values are from MAE's Table 9 (He et al., CVPR 2022, arXiv 2111.06377) and FLIP's Table 12, and where neither has them
from MAE's repository (FINETUNE.md, util/lr_decay.py, util/lr_sched.py). FLIP tunes the learning rate for each entry.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from flip_hf.data.rendering import WHITE, Colour
from flip_hf.evaluation.finetuning.layers import layer_of
from flip_hf.modeling import FlipForImageClassification

try:
    from torchvision.ops import stochastic_depth  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "Fine-tuning needs torchvision, in the build of the installed torch: pip install flip_hf[finetune]"
    ) from error


@dataclass(frozen=True)
class FineTuneOptions:
    """Options of a fine-tuning; the defaults are MAE's for ViT-B, see [`RECIPES`].

    Attributes:
        epochs: passes over the training data.
        batch_size: samples per step, over all processes.
        base_lr: the head's peak learning rate at 256 samples a step; the actual one is `base_lr * batch_size / 256`.
        min_lr: the head's learning rate at the end; other layers' are scaled down by the same factors as their peaks.
        warmup_epochs: length of the linear warm-up from zero; a half cosine follows.
        layer_decay: factor on the learning rate for each layer further from the head.
        weight_decay: weight decay of matrices; biases, norms, the class token and positions have none.
        betas: AdamW's betas.
        drop_path: drop probability of the last block's branches, decreasing linearly to 0 at the first block.
        mixup, cutmix: alphas of their Beta distributions; each batch uses one of the two; 0 disables it.
        label_smoothing: share of the target that is spread over all classes.
        crop_area: smallest and largest fraction of an image's area in a training crop.
        flip: probability of a horizontal flip; 0 where left and right matter.
        rand_augment: magnitude in tenths of each operation's range; 0 disables RandAugment.
        random_erasing: probability that a random box of an image becomes noise.
        mask_ratio: fraction of the patches dropped in training; evaluation is on whole images.
        eval_crop: side of the centre crop over the resized image's short side; MAE's is 224 / 256, above 224 pixels 1.
        num_workers: loader workers of each training process.
        background: colour behind transparent parts of images, as the tower was trained with.
        samples_per_epoch: length of an iterable data set without one, for the schedule.
        seed: seed of order, augmentation, drop path and masks; [`make_classifier`] draws the head's weights.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    epochs: int = 100
    batch_size: int = 1024
    base_lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_epochs: float = 5
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    crop_area: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    rand_augment: int = 9
    random_erasing: float = 0.25
    mask_ratio: float = 0.0
    eval_crop: float = 224 / 256
    num_workers: int = 8
    background: Colour = WHITE
    samples_per_epoch: int | None = None
    seed: int = 0

    def __post_init__(self):
        ranges = {
            "a whole number, 1 or more": (("epochs", "batch_size"), lambda value: value >= 1 and value == int(value)),
            "0 or more": (
                ("base_lr", "min_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix", "num_workers"),
                lambda value: value >= 0,
            ),
            "more than 0 and at most 1": (("layer_decay", "eval_crop"), lambda value: 0 < value <= 1),
            "in [0, 1)": (("drop_path", "label_smoothing", "mask_ratio"), lambda value: 0 <= value < 1),
            "in [0, 1]": (("flip", "random_erasing"), lambda value: 0 <= value <= 1),
            "a whole number from 0 to 10": (("rand_augment",), lambda value: value in range(11)),
        }
        for must_be, (names, is_good) in ranges.items():
            for name in names:
                if not is_good(getattr(self, name)):
                    raise ValueError(f"{name} must be {must_be}, got {getattr(self, name)!r}.")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area must be two fractions of the area, the smaller first, got {self.crop_area}.")

    def learning_rate(self, epoch: float) -> float:
        """Returns the head's learning rate after a fractional number of epochs."""
        peak = self.base_lr * self.batch_size / 256
        if epoch < self.warmup_epochs:
            return peak * epoch / self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


RECIPES = {
    "mae_b": FineTuneOptions(epochs=100, drop_path=0.1),
    "mae_l": FineTuneOptions(epochs=50, drop_path=0.1),
    "mae_h": FineTuneOptions(epochs=50, drop_path=0.2),
    "flip": FineTuneOptions(epochs=50, drop_path=0.2, base_lr=5e-5),  # L and H
}


# ---------------------------------------------------------------------------------------------------------------------
# Parameter groups
# ---------------------------------------------------------------------------------------------------------------------


def layer_groups(model: FlipForImageClassification, options: FineTuneOptions) -> list[dict[str, Any]]:
    """Makes AdamW's groups of the parameters that require a gradient, each with the `lr_scale` of its layer."""
    vision = model.config.vision_config
    head = vision.num_hidden_layers + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, vision.num_hidden_layers)
        is_decayed = parameter.ndim > 1 and "position_embedding" not in name
        group = {
            "params": [],
            "lr_scale": options.layer_decay ** (head - layer),
            "weight_decay": options.weight_decay if is_decayed else 0.0,
        }
        groups.setdefault((layer, is_decayed), group)["params"].append(parameter)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------------------------
# Drop path
# ---------------------------------------------------------------------------------------------------------------------


def _drop(rate: float, branch: nn.Module, _: object, output: Any) -> Any:
    """Forward hook that drops a branch's output per sample at this rate, and otherwise divides it by 1 - rate."""
    if isinstance(output, tuple):  # attention: (B, T, D) and its weights
        return _drop(rate, branch, _, output[0]), *output[1:]
    return stochastic_depth(output, rate, "row", branch.training)


@contextmanager
def drop_path(model: FlipForImageClassification, rate: float) -> Iterator[None]:
    """Context in which a model in training mode has drop path (stochastic depth, Huang et al. 2016).

    It hooks both branches of each block, so that the model itself and what it saves do not change.

    Args:
        model: the blocks of its vision tower get rates from 0 to `rate`, in equal steps.
        rate: drop rate of the last block.
    """
    layers: Any = model.vision_model.encoder.layers
    hooks = []
    for layer_rate, layer in zip(torch.linspace(0, rate, len(layers)).tolist(), layers, strict=True):
        for branch in (layer.self_attn, layer.mlp):
            hooks.append(branch.register_forward_hook(partial(_drop, layer_rate)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
