"""MAE's linear probe on the pixels of scanned digits, and what each of two processes does of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Subset, TensorDataset

from flip_hf.evaluation.probes.mae import PROBE_RECIPES, make_head, score, train_head

# Of 1,024 samples: 160 steps, and 16.
SMALL = replace(PROBE_RECIPES["mae"], epochs=20, batch_size=128, base_lr=20, warmup_epochs=2)
BRIEF = replace(SMALL, epochs=2)


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """1,024 samples to learn from, which stand for images, and their classes."""
    found: Any = load_digits()
    return torch.tensor(found.data[:1024] / 16, dtype=torch.float32), torch.tensor(found.target[:1024])


def features_of(images: torch.Tensor) -> torch.Tensor:
    """A tower's work: no pixel has the mean or the spread that it had."""
    return 30 * images + torch.arange(64)


def trained(options, part: int, shuffle: bool = False) -> tuple[torch.nn.Sequential, float]:
    """A head, and its last loss; each process has its share of parts of so many samples."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    images, labels = pixels()
    loader = DataLoader(TensorDataset(images, labels), part, shuffle=shuffle, drop_last=True)
    head = make_head(64, 10, seed=0)
    samples = len(images) // options.batch_size * options.batch_size
    return head, train_head(head, features_of, accelerator.prepare(loader), samples, options, accelerator)


def scored(head: torch.nn.Sequential) -> np.ndarray:
    """Logits of all samples; each process encodes every `num_processes`-th."""
    accelerator = Accelerator(cpu=True)
    images, labels = pixels()
    mine = Subset(TensorDataset(images, labels), range(accelerator.process_index, 1024, accelerator.num_processes))
    return score(head, features_of, DataLoader(mine, 100), 1024, accelerator)


def train_one_of_two(folder: Path) -> None:
    """The code of each of two processes."""
    head, _ = trained(BRIEF, part=64)
    tensors = {**head.state_dict(), "logits": torch.from_numpy(scored(head))}
    save_file(tensors, folder / f"{Accelerator().process_index}.safetensors")
