"""Steps that are not finite are skipped; a run that diverges returns to its checkpoint and continues from there."""

import json
import math
import shutil

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flip_hf import FlipModel
from flip_hf.training.checkpoint import find_checkpoints
from flip_hf.training.health import Health, RunDiverged
from tests.helpers.logs import records
from tests.helpers.trainers import make_trainer, spoil_steps


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
    assert before and "Skipped steps before 96 samples, as a loss or gradient was not finite: 1" in caplog.text
    losses = [record["loss"] for record in records(tmp_path) if "loss" in record]
    assert len(losses) == 6 and math.isnan(losses[2]) and all(map(math.isfinite, losses[:2] + losses[3:]))
    assert json.loads((tmp_path / "results.json").read_text())["skipped_steps"] == 1
    saved = FlipModel.from_pretrained(tmp_path)
    assert all(torch.isfinite(p).all() for p in saved.parameters())


# Ways in which the host reads a number from a tensor, in Python and below it; on a GPU, each waits for the device.
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
READS_BELOW = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Calls(TorchFunctionMode):
    """Counts the calls of functions in `READS`."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts the operations in `READS_BELOW`, which `item`, `float` and `if` come to."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in READS_BELOW
        return func(*args, **(kwargs or {}))


def host_reads(function, *args):
    """A function's result, and the number of times that the host waited for the device in it."""
    with Calls() as calls, Operations() as operations:
        result = function(*args)
    return result, calls.count + operations.count


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("micro_batch", ["32", "8"])
def test_no_step_waits_for_the_device_between_log_lines(tar_folder, tmp_path, optimizer, micro_batch):
    options = ("--optimizer", optimizer, "--micro_batch_size", micro_batch, "--ema_half_life", "64")
    trainer = make_trainer(tmp_path, tar_folder, *options)
    counts = []
    step = trainer._step

    def watched(phase, batches):
        result, count = host_reads(step, phase, batches)
        counts.append(count)
        assert host_reads(trainer.health.read) == (0, 1) and host_reads(float, result.grad_norm)[1] == 1  # are seen
        return result

    trainer._step = watched
    trainer.run()
    assert counts == [0] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_waits_for_a_gpu(tar_folder, tmp_path, optimizer):
    trainer = make_trainer(tmp_path, tar_folder, "--optimizer", optimizer, "--ema_half_life", "64")
    step = trainer._step

    def watched(phase, batches):
        torch.cuda.set_sync_debug_mode("error" if trainer.state.steps > 1 else "default")  # after the moments are made
        try:
            return step(phase, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer._step = watched
    trainer.run()
    assert trainer.state.steps == 6


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_leaves_weights_moments_and_counts_as_they_are(tar_folder, tmp_path, optimizer):
    trainer = make_trainer(tmp_path, tar_folder, "--optimizer", optimizer, "--ema_half_life", "64")
    spoil_steps(trainer, {2})
    step = trainer._step

    def everything():
        states = trainer.distribution.optimizer.state.values()
        moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return [*trainer.model.parameters(), *trainer.average.state_dict().values(), *moments]

    def watched(phase, batches):
        before = [value.detach().clone() for value in everything()]
        result = step(phase, batches)
        same = [torch.equal(old, new) for old, new in zip(before, everything(), strict=len(before) > 200)]
        assert all(same) == (trainer.state.steps == 2), same
        return result

    trainer._step = watched
    trainer.run()
    assert trainer.state.skipped_steps == 1


def test_a_diverged_run_returns_to_its_checkpoint(tar_folder, tmp_path, capsys):
    """Steps 4, 5 and 6 are spoilt; two in a row are one too many, and the checkpoint is of 96 samples."""
    options = ("--checkpoint_samples", "96", "--max_skipped_steps", "2", "--report_to", "none")
    trainer = make_trainer(tmp_path, tar_folder, *options)
    spoil_steps(trainer, {4, 5})
    trainer.run()
    assert "after 192 samples: 2 steps in a row were not finite; resuming from" in capsys.readouterr().out
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
    health = Health(max_skipped=1, device=torch.device("cpu"), max_restores=1)
    for _ in range(3):
        assert health.judge(torch.tensor(float("inf"))) == 1 and health.read() == 1 and health.is_lost()
        health.resume(in_a_row=0, restores=health.restores)  # the run went back
        health.good_checkpoint_written()
    assert health.judge(torch.tensor(1.0)) == 0 and health.read() == 0 and not health.is_lost()


def test_steps_are_counted_between_readings_and_in_a_row():
    health = Health(max_skipped=3, device=torch.device("cpu"))
    for norm in ("nan", "1", "inf", "nan"):
        health.judge(torch.tensor(float(norm)))
    assert health.read() == 3 and health.in_a_row == 2 and not health.is_lost()
    health.judge(torch.tensor(float("nan")))
    assert health.read() == 1 and health.in_a_row == 3 and health.is_lost()


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
