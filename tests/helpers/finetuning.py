"""Fine-tuning on scanned digits, and what each of two processes does of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.utils.data import IterableDataset

from flip_hf.evaluation.finetuning.images import eval_transform, make_test_loader
from flip_hf.evaluation.finetuning.loop import fine_tune
from flip_hf.evaluation.finetuning.model import make_classifier
from flip_hf.evaluation.finetuning.recipe import FineTuneOptions

STATISTICS = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.25, 0.25, 0.25)}
# Nothing at random but the order; digits are neither flipped nor cut.
PLAIN = FineTuneOptions(
    epochs=2,
    batch_size=32,
    base_lr=0.04,
    warmup_epochs=0.5,
    drop_path=0,
    mixup=0,
    cutmix=0,
    crop_area=(1, 1),
    flip=0,
    rand_augment=0,
    random_erasing=0,
    eval_crop=1,
    num_workers=0,
)
SHORT = replace(PLAIN, epochs=1, base_lr=0.01, samples_per_epoch=96)


def digits(start: int, end: int) -> list[tuple[Image.Image, int]]:
    found = load_digits()
    pixels = (found.images[start:end] * 15.9).astype(np.uint8)
    return [(Image.fromarray(p), int(t)) for p, t in zip(pixels, found.target[start:end], strict=True)]


class Stream(IterableDataset):
    """The same samples without length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def tune(model, train, test, options=PLAIN):
    return fine_tune(model, train, test, options, Accelerator(cpu=True), **STATISTICS)


def data():
    """Shuffled, then iterated over; the tests' sizes are odd."""
    return (digits(0, 100), digits(100, 131)), (Stream(digits(0, 100)), Stream(digits(100, 131)))


def tune_one_of_two(folder: Path) -> None:
    """The code of each of two processes."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.manual_seed(accelerator.process_index)  # the heads differ until DistributedDataParallel makes them one
    model = make_classifier(folder / "clip", 10)
    found = [fine_tune(model, train, test, SHORT, accelerator, **STATISTICS).top1 for train, test in data()]
    save_file(model.state_dict(), folder / f"tuned{accelerator.process_index}.safetensors")
    transform = eval_transform(48, SHORT, *STATISTICS.values())
    loaders = [make_test_loader(test, transform, 10, SHORT, accelerator) for _, test in data()]
    labels = [torch.cat([labels for _, labels in loader]).tolist() for loader in loaders]
    (folder / f"found{accelerator.process_index}.json").write_text(json.dumps([found, labels]))
    accelerator.end_training()
