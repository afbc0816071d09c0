"""End-to-end fine-tuning of a vision tower as an image classifier, by MAE's recipe, which FLIP's paper uses too."""

import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import DistributedType, set_seed
from torch import nn
from tqdm.auto import tqdm

from flip_hf.evaluation.finetuning.images import (
    Data,
    count_samples,
    eval_transform,
    make_mixing,
    make_test_loader,
    make_train_loader,
    train_transform,
)
from flip_hf.evaluation.finetuning.recipe import FineTuneOptions, drop_path, layer_groups
from flip_hf.modeling import FlipForImageClassification


@dataclass(frozen=True)
class FineTuneResult:
    """The result of fine-tuning.

    Attributes:
        accuracies: top-1 on the test data after each epoch, in [0, 1].
        seconds: total time, evaluation included.
    """

    accuracies: tuple[float, ...]
    seconds: float

    @property
    def top1(self) -> float:
        """Top-1 accuracy of the trained model, in [0, 1]."""
        return self.accuracies[-1]


class _Logits(nn.Module):
    """The model from images to logits; Accelerate's hooks go onto this wrapper and not onto the model."""

    def __init__(self, model: FlipForImageClassification, mask_ratio: float):
        super().__init__()
        self.model = model
        self.mask_ratio = mask_ratio

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes logits (B, classes) of images (B, C, S, S)."""
        mask_ratio = self.mask_ratio if self.training else 0.0
        return self.model(pixel_values=pixel_values, mask_ratio=mask_ratio).logits


def _check(model: FlipForImageClassification, accelerator: Accelerator) -> None:
    if model.num_labels < 2:
        raise ValueError(
            f"The model has num_labels={model.num_labels}; make one with make_classifier(..., num_labels)."
        )
    if model.dtype != torch.float32:
        raise ValueError(
            f"The weights are {model.dtype}. Load them with dtype=torch.float32, and compute in another precision with "
            "Accelerator(mixed_precision=...)."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "Fine-tuning needs whole weights on each process; launch it by `accelerate launch --multi_gpu`, or in one "
            "process."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("Fine-tuning does not accumulate gradients; leave gradient_accumulation_steps at 1.")


def _bar(samples: int, accelerator: Accelerator) -> tqdm:
    return tqdm(
        total=samples,
        unit=" samples",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 20,  # few lines in a log file
        disable=not accelerator.is_main_process,
    )


class _FineTuning:
    """The state of a fine-tuning; the arguments are [`fine_tune`]'s."""

    def __init__(
        self, model: FlipForImageClassification, samples: int, options: FineTuneOptions, accelerator: Accelerator
    ):
        self.options = options
        self.accelerator = accelerator
        self.samples = samples
        vision = model.config.vision_config
        if not vision.normalizes_tokens:
            # It serves only the pooled feature, and DistributedDataParallel refuses parameters without a gradient.
            model.vision_model.post_layernorm.requires_grad_(False)
        optimizer = torch.optim.AdamW(layer_groups(model, options), lr=0.0, betas=options.betas, fused=True)
        self.network, self.optimizer = accelerator.prepare(_Logits(model, options.mask_ratio), optimizer)
        self.mix = make_mixing(options, model.num_labels)

    def train(self, epoch: int, loader: DataLoaderShard, bar: tqdm) -> None:
        """Trains one epoch.

        Raises:
            FloatingPointError: a loss, averaged over the processes, is not finite.
        """
        options = self.options
        self.network.train()
        loader.set_epoch(epoch)
        for step, (pixel_values, labels) in enumerate(loader, start=1):
            learning_rate = options.learning_rate(epoch + min(1.0, step * options.batch_size / self.samples))
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]
            pixel_values, targets = self.mix(pixel_values, labels)
            # Not the model's own loss, which reads targets (B, classes) as several labels per image.
            loss = nn.functional.cross_entropy(
                self.network(pixel_values), targets, label_smoothing=options.label_smoothing
            )
            mean_loss = float(self.accelerator.reduce(loss.detach(), "mean"))  # pyright: ignore[reportArgumentType]
            if not math.isfinite(mean_loss):
                raise FloatingPointError(
                    f"The loss is {mean_loss} in step {step} of epoch {epoch + 1}, at a learning rate of "
                    f"{learning_rate:.3g}. Lower base_lr, or compute in float32 or bfloat16."
                )
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            bar.update(options.batch_size)
            bar.set_postfix({"loss": f"{mean_loss:.3g}", "lr": f"{learning_rate:.3g}"}, refresh=False)

    @torch.no_grad()
    def accuracy(self, loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Measures top-1 accuracy over all processes' samples, in [0, 1].

        Raises:
            ValueError: there are no samples.
        """
        device = self.accelerator.device
        network = self.accelerator.unwrap_model(self.network).eval()
        counts = torch.zeros(2, dtype=torch.long, device=device)  # right, all
        for pixel_values, labels in loader:
            right = network(pixel_values.to(device)).argmax(dim=1) == labels.to(device)  # (B)
            counts += torch.stack([right.sum(), right.new_tensor(len(right), dtype=torch.long)])
        total: Any = self.accelerator.reduce(counts, "sum")
        right, count = total.tolist()
        if count == 0:
            raise ValueError("There are no test data.")
        return right / count


def fine_tune(
    model: FlipForImageClassification,
    train: Data,
    test: Data,
    options: FineTuneOptions,
    accelerator: Accelerator,
    *,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> FineTuneResult:
    r"""Trains a classifier end to end, in place, and leaves it in evaluation mode.

    Each process calls it. It sets the process's seeds, and releases what the accelerator had prepared before.

    Args:
        model: from `make_classifier` (`model.py`); parameters without `requires_grad` stay frozen.
        train, test: map-style or iterable torch data sets of (PIL image or encoded image, label). An iterable one must
            have the same order on every process and divide itself among a loader's workers, as torch requires.
        options: see [`RECIPES`].
        accelerator: one process, or several with DistributedDataParallel; sets the precision.
        image_mean, image_std: statistics of three channels in [0, 1], as the tower was trained with.

    Raises:
        ValueError: options, data, model and accelerator do not fit together, or a sample cannot be used.
        FloatingPointError: the loss is not finite.

    Example:

    ```python
    >>> model = make_classifier("runs/vit_b16", num_labels=1000)
    >>> result = fine_tune(model, train, test, RECIPES["mae_b"], Accelerator(), image_mean=mean, image_std=std)
    >>> result.top1, model.save_pretrained("runs/vit_b16-imagenet")
    ```
    """
    _check(model, accelerator)
    started = time.perf_counter()
    vision = model.config.vision_config
    samples = count_samples(train, options)
    side = vision.image_size
    # One seed per process, so that no two augment, drop or mix alike.
    set_seed(options.seed, device_specific=True)
    transform = train_transform(side, options, image_mean, image_std)
    train_loader = make_train_loader(train, transform, model.num_labels, options, accelerator)
    transform = eval_transform(side, options, image_mean, image_std)
    test_loader = make_test_loader(test, transform, model.num_labels, options, accelerator)
    accuracies = []
    try:
        run = _FineTuning(model, samples, options, accelerator)
        bar = _bar(options.epochs * samples, accelerator)
        with drop_path(model, options.drop_path), bar:
            for epoch in range(options.epochs):
                run.train(epoch, train_loader, bar)
                accuracies.append(run.accuracy(test_loader))
                if accelerator.is_main_process:
                    bar.write(f"epoch {epoch + 1}: top-1 {accuracies[-1]:.1%}")
    finally:
        accelerator.free_memory()
    return FineTuneResult(tuple(accuracies), time.perf_counter() - started)
