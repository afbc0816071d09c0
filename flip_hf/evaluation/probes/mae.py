r"""MAE's linear probe: a linear classifier trained by LARS on augmented images, on top of a frozen tower.

Values are from MAE's Table 10 (He et al., CVPR 2022, arXiv 2111.06377) and FLIP's Table 11, which follows it, and where
neither has them from MAE's repository (main_linprobe.py; its FINETUNE.md finds 50 epochs enough for ViT-L and H).
Every epoch encodes new crops of the images: on features extracted once, LARS would only be another way to the
classifier that CLIP's probe finds (`linear.py`), and no figure would compare with MAE's.

Differences: crops are torchvision's, which redraws a box that does not fit where MAE's code clips it; BatchNorm sees
the whole batch, not each GPU's 512 samples, and is tested with the mean of all steps' statistics instead of the
latest, as the tower is frozen; the head is in float32, and the tower in the evaluation's precision.

The recipe is made for ImageNet. LARS moves the weights by a fraction of their norm each step, which adds up to
`base_lr * epochs * images` for any batch size: see [`reach`]. On small data the rate or the epochs must rise; the bias,
which takes plain steps, tolerates a larger rate only with smaller batches.

Letters: N samples, B per batch, C classes, D width.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from flip_hf.console.json_types import JsonObject
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.finetuning.images import (
    count_samples,
    eval_transform,
    make_test_loader,
    make_train_loader,
    train_transform,
)
from flip_hf.evaluation.finetuning.recipe import FineTuneOptions
from flip_hf.evaluation.finetuning.task import changed_recipe, read_samples
from flip_hf.evaluation.probes.lars import Lars
from flip_hf.evaluation.subject import Subject

logger = logging.getLogger(__name__)

Encode = Callable[[torch.Tensor], torch.Tensor]

HEAD_STD = 0.01
MOMENTUM = 0.9
TRUST_COEFFICIENT = 1e-3
# ImageNet's is 225 with MAE's values and 22 with FLIP's; on scikit-learn's digits, a reach of 2.5 lost a tenth of the
# accuracy and one of 12 nothing.
SMALL_REACH = 10

_MAE = FineTuneOptions(  # a fine-tuning of the head alone; AdamW's options are unused
    epochs=90,
    batch_size=16384,
    base_lr=0.1,
    min_lr=0,
    warmup_epochs=10,
    layer_decay=1,
    weight_decay=0,
    drop_path=0,
    mixup=0,
    cutmix=0,
    label_smoothing=0,
    rand_augment=0,
    random_erasing=0,
)
PROBE_RECIPES = {"mae": _MAE, "flip": replace(_MAE, base_lr=0.01)}


def features_of(encoder: Encoder, recipe: str) -> Encode:
    """Returns the encoding that a recipe probes: for `mae` the class token, as MAE's code (`--cls_token`), though no
    loss trained it; for `flip` the pooled feature, which the contrastive loss trained. FLIP's paper does not say.
    """
    return {"mae": encoder.class_token, "flip": encoder.trunk}[recipe]


def reach(options: FineTuneOptions, samples: int) -> float:
    """Returns how far all steps in one direction would move the weights, in multiples of their norm.

    That is the sum of the learning rates (on average half the peak), through momentum, times LARS' trust coefficient.

    Args:
        options: the probe's options.
        samples: samples of whole batches in an epoch.
    """
    rates = options.base_lr * options.epochs * samples / 256 / 2
    return rates * TRUST_COEFFICIENT / (1 - MOMENTUM)


def make_head(width: int, num_classes: int, seed: int) -> nn.Sequential:
    """Makes the head from (B, D) to logits (B, C): BatchNorm without weights, then a linear layer; same on all."""
    linear = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(linear.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, momentum=None, affine=False), linear)


def _batches(
    loader: DataLoaderShard, encode: Encode, share: int, accelerator: Accelerator
) -> Iterator[list[torch.Tensor]]:
    """Yields features (B, D), float32, and labels (B) of whole batches over all processes, the same on each.

    Args:
        loader: parts that divide this process's `share` of a batch; a whole batch of images would not fit into memory.
        encode: turns images into features.
        share: B divided by the number of processes.
        accelerator: the processes.
    """
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pixel_values, labels in loader:
        with torch.no_grad():
            parts.append((encode(pixel_values).float(), labels))
        if len(parts) * len(labels) == share:
            gathered = [accelerator.gather(torch.cat(tensors)) for tensors in zip(*parts, strict=True)]
            yield gathered  # pyright: ignore[reportReturnType]
            parts = []


def train_head(
    head: nn.Module,
    encode: Encode,
    loader: DataLoaderShard,
    samples: int,
    options: FineTuneOptions,
    accelerator: Accelerator,
) -> float:
    """Trains the head, the same on each process with all features, and returns the last epoch's mean loss.

    Args:
        head: from [`make_head`], on the device.
        encode: turns images (B, 3, S, S) into features (B, D).
        loader: from `make_train_loader`, with parts of batches.
        samples: samples of whole batches in an epoch.
        options: epochs, batch size, learning rates.
        accelerator: the processes; each must call this.

    Raises:
        ValueError: a loss is not finite.
    """
    optimizer = Lars(head.parameters(), lr=0.0, momentum=MOMENTUM, trust_coefficient=TRUST_COEFFICIENT)
    losses: list[float] = []
    total = options.epochs * samples
    share = options.batch_size // accelerator.num_processes
    head.train()
    with tqdm(total=total, desc="linear probe", unit=" images", disable=not accelerator.is_main_process) as bar:
        for epoch in range(options.epochs):
            loader.set_epoch(epoch)
            losses = []
            for step, (features, labels) in enumerate(_batches(loader, encode, share, accelerator), start=1):
                learning_rate = options.learning_rate(epoch + step * options.batch_size / samples)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                loss = nn.functional.cross_entropy(head(features), labels)
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise ValueError(
                        f"The probe's loss is {losses[-1]} in epoch {epoch + 1}, at a learning rate of "
                        f"{learning_rate:.3g}: lower --train_base_lr, or encode with --precision fp32."
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update(options.batch_size)
    return float(np.mean(losses))


@torch.no_grad()
def score(head: nn.Module, encode: Encode, loader: DataLoader, count: int, accelerator: Accelerator) -> np.ndarray:
    """Computes logits (N, C) of all samples, in their order, on every process.

    Args:
        head: the trained head.
        encode: turns images (B, 3, S, S) into features (B, D).
        loader: from `make_test_loader`.
        count: N.
        accelerator: the processes; each must call this.
    """
    head.eval()
    mine = [head(encode(pixel_values.to(accelerator.device)).float()).cpu().numpy() for pixel_values, _ in loader]
    logits = np.empty((count, head[-1].out_features), np.float32)  # pyright: ignore[reportIndexIssue]
    for first, batches in enumerate(gather_object([mine])):
        if batches:
            logits[first :: accelerator.num_processes] = np.concatenate(batches)
    return logits


@dataclass(frozen=True)
class MaeProbe:
    """The result of [`mae_probe`].

    Attributes:
        scores: (N, C), logits of the test set.
        labels: (N,), its classes.
        refused: unusable samples of both splits, by reason.
        details: the recipe, and the last epoch's mean loss.
    """

    scores: np.ndarray
    labels: np.ndarray
    refused: Counter[str]
    details: JsonObject


def _check_reach(options: FineTuneOptions, samples: int) -> None:
    found = reach(options, samples)
    if found < SMALL_REACH:
        logger.warning(
            "The probe's recipe is made for ImageNet: its %d epochs of %d images move the weights by at most %.2g of "
            "their norm, and may end far from the optimum. Increase --epochs or --train_base_lr, together %.0f times; "
            "with a larger rate also use a smaller --train_batch_size.",
            options.epochs,
            samples,
            found,
            SMALL_REACH / found,
        )


def _in_parts(options: FineTuneOptions, largest: int, processes: int) -> FineTuneOptions:
    """Returns options for loaders with batches of at most `largest` images per process that divide the probe's.

    Raises:
        ValueError: the processes do not divide the batch.
    """
    share, left = divmod(options.batch_size, processes)
    if left:
        raise ValueError(f"--train_batch_size ({options.batch_size}) must be a multiple of the {processes} processes.")
    part = next(size for size in range(min(share, largest), 0, -1) if share % size == 0)
    return replace(options, batch_size=part * processes)


def mae_probe(subject: Subject) -> MaeProbe:
    """Trains a probe on the training split and scores the test split; a validation split is not needed.

    Raises:
        ValueError: a split has no usable image of one class, the training split does not fill a batch, the processes do
            not divide it, or a loss is not finite.
    """
    encoder = subject.encoder
    accelerator = subject.accelerator
    asked = subject.options
    encode = features_of(encoder, asked.probe)
    refused = Counter[str]()
    options = changed_recipe(PROBE_RECIPES[asked.probe], subject, warmup=1 / 5)
    parts = _in_parts(options, asked.batch_size, accelerator.num_processes)
    train = read_samples(subject, "train", refused)
    test = read_samples(subject, "test", refused)
    samples = count_samples(train, options)
    classes = len(subject.class_names)
    if accelerator.is_main_process:
        _check_reach(options, samples)

    set_seed(options.seed, device_specific=True)  # no two processes augment alike
    processor = encoder.image_processor
    look = (encoder.vision_config.image_size, options, processor.image_mean, processor.image_std)
    loader = make_train_loader(train, train_transform(*look), classes, parts, accelerator)
    head = make_head(encoder.vision_config.hidden_size, classes, options.seed).to(accelerator.device)
    loss = train_head(head, encode, loader, samples, options, accelerator)
    loader = make_test_loader(test, eval_transform(*look), classes, parts, accelerator)
    scores = score(head, encode, loader, len(test), accelerator)
    details = {
        **{"probe": asked.probe, "train_loss": loss},
        **{name: getattr(options, name) for name in ("epochs", "batch_size", "base_lr", "warmup_epochs")},
    }
    return MaeProbe(scores, np.array([label for _, label in test]), refused, details)
