"""MAE's linear probe: its parts, and the command on a tower as MAE leaves it."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("torchvision")

from flip_hf.evaluation.mae_probe import PROBE_RECIPES, make_head, reach, score, train_head
from tests.evaluation.test_evaluate import evaluated, evaluated_by_two
from tests.evaluation.test_towers import colours, pretraining  # noqa: F401

SMALL = replace(PROBE_RECIPES["mae"], epochs=20, batch_size=128, base_lr=20, warmup_epochs=2)


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """1,024 samples to learn from, which stand for images, and their classes."""
    found: Any = load_digits()
    return torch.tensor(found.data[:1024] / 16, dtype=torch.float32), torch.tensor(found.target[:1024])


def features_of(images: torch.Tensor) -> torch.Tensor:
    """A tower's work: no pixel has the mean or the spread that it had."""
    return 30 * images + torch.arange(64)


def trained(options, part: int, shuffle: bool = False) -> tuple[torch.nn.Sequential, float]:
    accelerator = Accelerator(cpu=True)
    images, labels = pixels()
    loader = DataLoader(TensorDataset(images, labels), part, shuffle=shuffle, drop_last=True)
    head = make_head(64, 10, seed=0)
    samples = len(images) // options.batch_size * options.batch_size
    return head, train_head(head, features_of, accelerator.prepare(loader), samples, options, accelerator)


def test_recipes_are_the_papers():
    mae, flip = PROBE_RECIPES["mae"], PROBE_RECIPES["flip"]
    assert (mae.epochs, mae.batch_size, mae.base_lr, mae.min_lr, mae.warmup_epochs) == (90, 16384, 0.1, 0, 10)
    assert (mae.crop_area, mae.flip, mae.rand_augment, mae.random_erasing) == ((0.08, 1), 0.5, 0, 0)
    assert mae.learning_rate(10) == pytest.approx(6.4)  # of main_linprobe.py's log
    assert replace(flip, base_lr=0.1) == mae and flip.base_lr == 0.01


def test_a_head_learns_what_there_is_and_at_imagenets_rate_next_to_nothing():
    images, labels = pixels()
    for base_lr, low, high in ((20, 0.95, 1), (0.1, 0.05, 0.5)):
        head, loss = trained(replace(SMALL, base_lr=base_lr), part=128, shuffle=True)
        test_loader = DataLoader(TensorDataset(images, labels), 100)
        found = score(head, features_of, test_loader, len(images), Accelerator(cpu=True))
        assert low < (found.argmax(axis=1) == labels.numpy()).mean() <= high, base_lr
        assert (loss < 0.2) == (low > 0.5)
    # Each feature is put to mean 0 and spread 1 by all steps' statistics, for the tower does not move.
    features = features_of(images)
    assert torch.allclose(head[0].running_mean, features.mean(dim=0), atol=1e-3)
    assert torch.allclose(head[0].running_var, features.var(dim=0), rtol=0.02, atol=1e-3)


def test_parts_make_the_same_batches():
    options = replace(SMALL, epochs=2)
    whole, parts = (trained(options, part)[0].state_dict() for part in (128, 32))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)
    assert not torch.allclose(whole["1.weight"], make_head(64, 10, seed=0)[1].weight, atol=1e-2)
    # What is left at the end of an epoch makes no batch: 1,024 are two of 384 and 256 more.
    head, _ = trained(replace(options, batch_size=384), 96)
    assert head[0].num_batches_tracked == 2 * 2


def test_reach_is_what_all_steps_add_up_to():
    for options, samples in ((PROBE_RECIPES["mae"], 1_277_952), (SMALL, 1024)):
        steps = samples // options.batch_size
        rates = [options.learning_rate(step / steps) for step in range(options.epochs * steps)]
        assert reach(options, samples) == pytest.approx(sum(rates) * 1e-3 / 0.1, rel=0.02)


def test_the_command_probes_a_tower_on_crops(pretraining, colours, tmp_path, caplog):  # noqa: F811
    argv = [pretraining[1], "--tasks", "linear-probe", "--probe", "mae", *colours, "--train_batch_size", 48]
    # Encoded in parts of 16 images, the largest divisor of 48 that is 20 or less.
    argv += ["--batch_size", 20]
    with caplog.at_level(logging.WARNING):
        report = evaluated(tmp_path / "short", *argv, "--epochs", 1)
    (result,) = report["results"]
    assert result["details"]["epochs"] == 1 and result["details"]["base_lr"] == 0.1 and result["samples"] == 60
    assert result["details"]["train_loss"] == pytest.approx(np.log(4), abs=0.1)
    assert "made for ImageNet: 1 epochs of 96 images" in caplog.text
    assert "| linear-probe (mae) | top1 | " in (tmp_path / "short" / "results.md").read_text()
    argv += ["--epochs", 10, "--train_base_lr", 100, "--num_workers", 0]
    two = evaluated_by_two(tmp_path / "two", *argv)
    assert two["results"][0]["metrics"]["top1"] > 0.6 and two["results"][0]["samples"] == 60  # chance: 0.25


def test_what_makes_no_batch_is_named(pretraining, colours, tmp_path, caplog):  # noqa: F811
    for argv, message in (
        (["--probe", "flip"], "100 training samples make no batch of 16384"),
        (["--probe", "dino"], "--probe is one of clip, mae, flip, not 'dino'"),
    ):
        with pytest.raises(SystemExit) as ended:
            evaluated(tmp_path / "out", pretraining[1], "--tasks", "linear-probe", *colours, *argv)
        assert message in f"{ended.value}\n{caplog.text}"
