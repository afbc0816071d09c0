"""MAE's linear probe: its parts, and the command on a tower as MAE leaves it."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("torchvision")

from flip_hf.evaluation.finetuning.recipe import RECIPES
from flip_hf.evaluation.finetuning.task import recipe_for
from flip_hf.evaluation.probes.mae import PROBE_RECIPES, make_head, reach
from tests.helpers.evaluating import evaluated
from tests.helpers.mae_probing import BRIEF, SMALL, features_of, pixels, scored, trained
from tests.helpers.programs import ROOT, run_program


def test_recipes_are_the_papers():
    mae = PROBE_RECIPES["mae"]
    flip = PROBE_RECIPES["flip"]
    assert (mae.epochs, mae.batch_size, mae.base_lr, mae.min_lr, mae.warmup_epochs) == (90, 16384, 0.1, 0, 10)
    assert (mae.crop_area, mae.flip, mae.rand_augment, mae.random_erasing) == ((0.08, 1), 0.5, 0, 0)
    assert mae.learning_rate(10) == pytest.approx(6.4)  # of main_linprobe.py's log
    assert replace(flip, base_lr=0.1) == mae and flip.base_lr == 0.01


def test_a_head_learns_at_its_own_rate_and_hardly_at_imagenets():
    images, labels = pixels()
    for base_lr, low, high in ((20, 0.95, 1), (0.1, 0.05, 0.5)):
        head, loss = trained(replace(SMALL, base_lr=base_lr), part=128, shuffle=True)
        assert low < (scored(head).argmax(axis=1) == labels.numpy()).mean() <= high, base_lr
        assert (loss < 0.2) == (low > 0.5)
    # Each feature is put to mean 0 and spread 1 by all steps' statistics, for the tower does not move.
    features = features_of(images)
    assert torch.allclose(head[0].running_mean, features.mean(dim=0), atol=1e-3)
    assert torch.allclose(head[0].running_var, features.var(dim=0), rtol=0.02, atol=1e-3)


def test_parts_make_the_same_batches():
    whole, parts = (trained(BRIEF, part)[0].state_dict() for part in (128, 32))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)
    assert not torch.allclose(whole["1.weight"], make_head(64, 10, seed=0)[1].weight, atol=1e-2)
    # What is left at the end of an epoch makes no batch: 1,024 are two of 384 and 256 more.
    head, _ = trained(replace(BRIEF, batch_size=384), 96)
    assert head[0].num_batches_tracked == 2 * BRIEF.epochs


def test_two_processes_train_the_same_head(tmp_path):
    lines = ("import sys", "from pathlib import Path", f"sys.path.insert(0, {str(ROOT)!r})")
    call = f"from tests.helpers.mae_probing import train_one_of_two\ntrain_one_of_two(Path({str(tmp_path)!r}))"
    (tmp_path / "run.py").write_text("\n".join((*lines, call)))
    done = run_program(tmp_path / "run.py", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, _ = trained(BRIEF, part=128)
    for process in range(2):
        found = load_file(tmp_path / f"{process}.safetensors")
        assert np.allclose(found.pop("logits"), scored(alone), atol=1e-3)
        # Its halves of a batch lie one after the other: the same samples in another order.
        assert all(torch.allclose(found[name], tensor, atol=1e-4) for name, tensor in alone.state_dict().items())


def test_reach_is_the_sum_of_all_steps():
    for options, samples in ((PROBE_RECIPES["mae"], 1_277_952), (SMALL, 1024)):
        steps = samples // options.batch_size
        rates = [options.learning_rate(step / steps) for step in range(options.epochs * steps)]
        assert reach(options, samples) == pytest.approx(sum(rates) * 1e-3 / 0.1, rel=0.02)


def test_the_command_probes_and_tunes_a_tower(pretraining, colours, tmp_path, caplog):
    # The probe encodes parts of 16 images, the largest divisor of 48 that is 20 or less.
    argv = [*colours, "--train_batch_size", 48, "--batch_size", 20, "--epochs", 2]
    with caplog.at_level(logging.WARNING):
        report = evaluated(tmp_path, pretraining[1], "--tasks", "linear-probe", "fine-tune", "--probe", "mae", *argv)
    probed, tuned = report["results"]
    expected = {"probe": "mae", "epochs": 2, "batch_size": 48, "base_lr": 0.1, "warmup_epochs": 0.4}
    assert probed["details"] == {**expected, "train_loss": pytest.approx(np.log(4), abs=0.1)}
    assert probed["samples"] == tuned["samples"] == 60 and report["skipped"] == {}
    assert len(tuned["details"]["top1_by_epoch"]) == 2 and tuned["details"]["drop_path"] == RECIPES["mae_b"].drop_path
    assert "made for ImageNet: its 2 epochs of 96 images" in caplog.text
    assert "| linear-probe (mae) | top1 | " in (tmp_path / "results.md").read_text()


def test_maes_towers_are_tuned_by_maes_recipes_and_those_of_the_contrast_by_flips():
    assert [recipe_for(width, False) for width in (384, 768, 1024, 1280)] == ["mae_b", "mae_b", "mae_l", "mae_h"]
    assert [recipe_for(width, True) for width in (768, 1024, 1280)] == ["mae_b", "flip", "flip"]


def test_data_too_small_for_a_batch_are_named(pretraining, colours, tmp_path, caplog):
    for argv, message in (
        (["--probe", "flip"], "100 training samples do not fill a batch of 16384"),
        (["--probe", "dino"], "--probe is one of clip, mae, flip, got 'dino'"),
    ):
        with pytest.raises(SystemExit) as ended:
            evaluated(tmp_path / "out", pretraining[1], "--tasks", "linear-probe", *colours, *argv)
        assert message in f"{ended.value}\n{caplog.text}"
