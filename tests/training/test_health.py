"""Steps that are not finite are skipped; a run that diverges returns to its checkpoint and continues from there."""

import json
import math
import shutil

import pytest
import torch

from flip_hf import FlipModel
from flip_hf.training.checkpoint import find_checkpoints
from flip_hf.training.health import Health, RunDiverged
from tests.helpers.trainers import make_trainer, spoil_steps


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_is_skipped_and_counted(tar_folder, tmp_path, caplog):
    trainer = make_trainer(tmp_path, tar_folder)
    spoil_steps(trainer, {2})
    before = {}
    step = trainer._step

    def watched(phase, batches):
        if trainer.state.steps == 2:
            before.update({name: p.detach().clone() for name, p in trainer.flip.named_parameters()})
        result = step(phase, batches)
        if trainer.state.steps == 2:
            assert all(torch.equal(before[name], p) for name, p in trainer.flip.named_parameters())
        return result

    trainer._step = watched
    trainer.run()
    assert before and "Skipped the step after 64 samples" in caplog.text
    losses = [record["loss"] for record in records(tmp_path) if "loss" in record]
    assert len(losses) == 6 and math.isnan(losses[2]) and all(map(math.isfinite, losses[:2] + losses[3:]))
    assert json.loads((tmp_path / "results.json").read_text())["skipped_steps"] == 1
    saved = FlipModel.from_pretrained(tmp_path)
    assert all(torch.isfinite(p).all() for p in saved.parameters())


def test_a_diverged_run_returns_to_its_checkpoint(tar_folder, tmp_path, capsys):
    """Steps 4, 5 and 6 are spoilt; two in a row are one too many, and the checkpoint is of 96 samples."""
    options = ("--checkpoint_samples", "96", "--max_skipped_steps", "2", "--report_to", "none")
    trainer = make_trainer(tmp_path, tar_folder, *options)
    spoil_steps(trainer, {4, 5})
    trainer.run()
    assert "after 160 samples: 2 steps in a row were not finite; resuming from" in capsys.readouterr().out
    logged = records(tmp_path)
    assert [record["samples"] for record in logged] == [32, 64, 96, 128, 160, 192]
    assert all(math.isfinite(record["loss"]) for record in logged)
    assert trainer.state.skipped_steps == 2 and trainer.state.samples == 192


def test_a_run_that_cannot_be_saved_names_possible_fixes(tar_folder, tmp_path):
    trainer = make_trainer(tmp_path / "none", tar_folder, "--max_skipped_steps", "2", "--checkpoint_samples", "0")
    spoil_steps(trainer, {1, 2})
    with pytest.raises(RunDiverged, match="no checkpoint to go back to. Lower --base_lr"):
        trainer.run()
    trainer = make_trainer(tmp_path / "one", tar_folder, "--max_skipped_steps", "1", "--checkpoint_samples", "32")
    spoil_steps(trainer, set(range(1, 1000)))
    with pytest.raises(RunDiverged, match="went back to its last checkpoint 3 times.*--max_grad_norm 1"):
        trainer.run()


def test_a_new_checkpoint_allows_going_back_again():
    health = Health(max_skipped=1, max_restores=1)
    for _ in range(3):
        assert not health.is_good(float("inf")) and health.is_lost()
        health.good_checkpoint_written()
    assert health.is_good(1.0) and not health.is_lost()


def test_the_average_is_evaluated_and_saved(tar_folder, tmp_path):
    """A half-life of one batch, computed again from the weights after each step."""
    trainer = make_trainer(tmp_path / "a", tar_folder, "--ema_half_life", "32", "--checkpoint_samples", "96")
    expected = {}
    step = trainer._step

    def watched(phase, batches):
        result = step(phase, batches)
        for name, p in trainer.flip.named_parameters():
            value = p.detach().double()
            expected[name] = value if name not in expected else (expected[name] + value) / 2
        return result

    trainer._step = watched
    trainer.run()
    saved = FlipModel.from_pretrained(tmp_path / "a")
    for name, p in saved.named_parameters():
        assert (p.double() - expected[name]).abs().max() < 1e-6, name
    assert not torch.equal(saved.visual_projection.weight, trainer.flip.visual_projection.weight)

    # As if it had been killed after its checkpoint at 96 samples.
    (tmp_path / "a" / "results.json").unlink()
    shutil.rmtree(find_checkpoints(tmp_path / "a")[-1])
    resumed = make_trainer(tmp_path / "a", tar_folder, "--ema_half_life", "32", "--resume_from_checkpoint", "latest")
    assert resumed.state.samples == 96
    resumed.run()
    again = FlipModel.from_pretrained(tmp_path / "a")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), again.parameters(), strict=True))
