"""Whatever ends a run, every process of it ends, one message says why, and what was good before is there still.

Real processes with loader workers: a step that raises, a worker or a process that is killed, a folder that goes away, a
disk that is full, a server that says nothing, weights that are no longer finite, two runs in one folder.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flip_hf.console.lock import FolderInUse, lock_folder
from flip_hf.training.build import build_trainer
from flip_hf.training.checkpoint import find_checkpoints, newest_good_checkpoint, read_state
from flip_hf.training.health import RunDiverged
from flip_hf.training.recipes import parse_arguments
from flip_hf.training.resume import RunFinished
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import PRETRAIN, TINY
from tests.helpers.programs import ROOT, run_program
from tests.helpers.trainers import make_trainer, spoil_steps
from tests.helpers.watched import Watched, serve, words


@pytest.fixture(scope="module")
def data(samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("failures") / "tars"
    folder.mkdir()
    for shard in range(4):
        write_tar(folder / f"{shard}.tar", samples[32 * shard : 32 * (shard + 1)])
    return folder


# -- every process ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 0, 1], ids=["alone", "the first of two", "the second of two"])
def test_an_unexpected_error_ends_every_process(rank, data, tmp_path):
    """One traceback, and one line that says why, of the process that failed."""
    settings = {"FAIL_AT": "5", "FAIL_RANK": str(rank or 0)}
    run = Watched(tmp_path, words(data, tmp_path / "run"), 1 if rank is None else 2, **settings)
    run.wait_for_steps(1)
    assert run.assert_all_end(run.family()) == 1
    (error,) = run.errors()
    assert "RuntimeError: injected, as a full device is." in error and "--resume_from_checkpoint auto" in error
    assert ("process" in error) == (rank is not None) and run.text().count("Traceback") == 1


def test_an_error_of_evaluation_ends_every_process_after_the_model_is_saved(data, tmp_path):
    """The evaluation data are gone when the run comes to them: the trained model is there."""
    labelled = tmp_path / "labelled"
    for name in ("a", "b"):
        (labelled / "test" / name).mkdir(parents=True)
        shutil.copy(ROOT / "docs" / "figures" / "masks.png", labelled / "test" / name / "1.png")
    argv = words(data, tmp_path / "run", "--eval_data", str(labelled), "--eval_samples", "100000", workers=2)
    run = Watched(tmp_path, argv, STEP_SECONDS="0.03")
    run.wait_for_steps(2)
    shutil.rmtree(labelled)
    run.assert_all_end(run.family())
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert find_checkpoints(tmp_path / "run")[-1].name.endswith("400")
    assert "top1" not in json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_within_an_evaluation_ends_every_process(processes, data, tmp_path):
    """While its loader's workers are at work; the model is saved already."""
    labelled = tmp_path / "labelled"
    for name in ("a", "b"):
        (labelled / "test" / name).mkdir(parents=True)
        for number in range(8):
            shutil.copy(ROOT / "docs" / "figures" / "masks.png", labelled / "test" / name / f"{number}.png")
    argv = words(data, tmp_path / "run", "--eval_data", str(labelled), "--eval_batch_size", "1", workers=2)
    argv += ["--train_samples", "48", "--eval_samples", "100000"]
    run = Watched(tmp_path, argv, processes, FAIL_EVALUATION="1")
    run.wait_for_steps(1)
    assert run.assert_all_end(run.family()) == 1
    assert all("injected into the evaluation" in error for error in run.errors()) and run.errors()
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_data_that_end_in_an_error_leave_a_checkpoint(processes, data, tmp_path):
    """Shards that vanish: nothing is found in whole passes, and what was trained until then is saved first."""
    shards = tmp_path / "shards"
    shutil.copytree(data, shards)
    argv = words(shards, tmp_path / "run", "--train_samples", "100000", "--checkpoint_samples", "0")
    run = Watched(tmp_path, argv, processes, STEP_SECONDS="0.01")
    run.wait_for_steps(3)
    family = run.family()
    for shard in shards.iterdir():
        shard.unlink()
    assert run.assert_all_end(family) == 1
    (error,) = run.errors()
    assert "no usable sample in 3 whole epochs" in error
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    assert int(checkpoint.name[-12:]) == 8 * run.steps() and checkpoint.name in error


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_worker_ends_the_run_with_a_checkpoint_or_before_one(processes, data, tmp_path):
    run = Watched(tmp_path, words(data, tmp_path / "run"), processes)
    run.wait_for_steps(6)
    family = run.family()
    run.workers()[0].kill()
    assert run.assert_all_end(family) == 1
    (error,) = run.errors()
    assert "A loader worker was killed" in error and "Use fewer --num_workers" in error
    assert newest_good_checkpoint(tmp_path / "run")


def test_a_killed_process_ends_the_other(data, tmp_path):
    run = Watched(tmp_path, words(data, tmp_path / "run"), 2)
    run.wait_for_steps(6)
    family = run.family()
    os.kill(run.program.processes[1].pid, signal.SIGKILL)
    assert run.assert_all_end(family) != 0
    assert "Process 0 of 2 ends: it lost another one" in run.text() and not run.errors()


def test_workers_end_with_a_process_that_is_killed(data, tmp_path):
    run = Watched(tmp_path, words(data, tmp_path / "run", workers=2))
    run.wait_for_steps(2)
    family = run.family()
    os.kill(run.program.processes[0].pid, signal.SIGKILL)
    run.assert_all_end(family)


def test_a_folder_that_is_deleted_ends_the_run_in_one_line(data, tmp_path):
    run = Watched(tmp_path, words(data, tmp_path / "run"))
    run.wait_for_steps(3)
    family = run.family()
    # At once: the run would write into a folder while its files are removed one by one.
    (tmp_path / "run").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    assert run.assert_all_end(family) == 1
    (error,) = run.errors()
    assert "No such file or directory" in error and str(tmp_path / "run") in error and "Traceback" not in run.text()


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_its_checkpoints(data, tmp_path):
    """A limit on the size of files stands for the disk: a checkpoint's optimizer no longer fits."""
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"
    size = max(path.stat().st_size for path in _checkpoint_of(data, tmp_path / "before").iterdir())
    (tmp_path / "full.py").write_text(
        script.format(size // 2) + f"import runpy, sys; sys.path.insert(0, {str(PRETRAIN.parent)!r})\n"
        f"runpy.run_path({str(PRETRAIN)!r}, run_name='__main__')"
    )
    out = tmp_path / "run"
    shutil.copytree(tmp_path / "before", out)
    argv = words(data, out, "--resume_from_checkpoint", "auto")
    run = run_program(tmp_path / "full.py", *argv, prepare=_ignore_file_size_signal)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr[-3000:]
    (error,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "File too large" in error and "--resume_from_checkpoint auto" in error
    assert newest_good_checkpoint(out) == find_checkpoints(out)[-1]


def _ignore_file_size_signal() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _checkpoint_of(data: Path, folder: Path) -> Path:
    """A run that was stopped on its way: its last checkpoint."""
    trainer = make_trainer_of(data, folder)
    _stop_after(trainer, 4)
    trainer.run()
    return find_checkpoints(folder)[-1]


def make_trainer_of(data: Path, folder: Path, *more: str):
    return build_trainer(parse_arguments(words(data, folder, *more, workers=0), ROOT / "flip_hf" / "recipes", "shapes"))


def _stop_after(trainer, steps: int) -> None:
    """As SIGTERM does, after so many steps of this trainer."""
    step = trainer._step
    taken = []

    def counted(*batch):
        taken.append(batch)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*batch)

    trainer._step = counted


# -- SIGTERM while the data hang --------------------------------------------------------------------------------------


@pytest.fixture
def silent_server(data):
    """A web server that gives the first shard, and of the second one three quarters and then nothing more."""
    size = (data / "1.tar").stat().st_size
    with serve(data, lambda name: size * 3 // 4 if name == "1.tar" else None) as address:
        yield f"{address}/{{0..1}}.tar"


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 1), (2, 1)])
def test_a_run_that_waits_for_a_silent_server_saves_when_asked_to_stop(
    processes, workers, silent_server, tokenizer, tmp_path
):
    """At once, not when the server answers."""
    out = tmp_path / "run"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    argv = words(silent_server, out, "--checkpoint_samples", "0", "--shuffle_block", "1", workers=workers)
    argv += ["--tokenizer", str(tmp_path / "tokenizer"), "--special_tokens", "true"]
    run = Watched(tmp_path, argv, processes, STEP_SECONDS="0")
    run.wait_for_steps(1)
    before = -1
    while run.steps() != before:  # until it waits
        before = run.steps()
        time.sleep(2)
    family = run.family()
    for process in run.program.processes:
        os.kill(process.pid, signal.SIGTERM)
    assert run.assert_all_end(family) == 0, run.text()[-3000:]
    assert "resume with --resume_from_checkpoint auto" in run.text()
    (checkpoint,) = find_checkpoints(out)
    assert checkpoint.name == f"checkpoint-{8 * before:012d}" and not (out / "model.safetensors").exists()


# -- weights that are not finite --------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_replace_no_good_checkpoint(tar_folder, tmp_path):
    """A step that spoils the weights while gradients stay finite, as an overflow of the optimizer does."""
    out = tmp_path / "run"
    trainer = make_trainer(out, tar_folder, "--checkpoint_samples", "32", "--max_skipped_steps", "50")
    step = trainer._step

    def spoiling(phase, batches):
        result = step(phase, batches)
        if trainer.state.steps == 3:
            with torch.no_grad():
                trainer.flip.visual_projection.weight.fill_(float("nan"))
        return result

    trainer._step = spoiling
    with pytest.raises(
        RunDiverged, match="After 192 samples the weights are not finite.*last good checkpoint is .*096"
    ):
        trainer.run()
    assert [path.name[-3:] for path in find_checkpoints(out)] == ["064", "096"]
    assert not (out / "model.safetensors").exists() and not (out / "results.json").exists()
    for checkpoint in find_checkpoints(out):
        assert all(torch.isfinite(value).all() for value in load_file(checkpoint / "model.safetensors").values())
        assert read_state(checkpoint)["good"]


def test_a_run_that_ends_with_spoilt_weights_exits_with_an_error(data, tmp_path):
    """The same from the outside: no model, no `Use it`."""
    (tmp_path / "spoil.py").write_text(
        f"import runpy, sys, torch\nsys.path.insert(0, {str(PRETRAIN.parent)!r})\n"
        "from flip_hf.training.engine import Trainer\nstep = Trainer._step\n"
        "def spoiling(self, *batch):\n    result = step(self, *batch)\n"
        "    if self.state.steps == 40: self.flip.logit_scale.data.fill_(float('nan'))\n    return result\n"
        f"Trainer._step = spoiling\nrunpy.run_path({str(PRETRAIN)!r}, run_name='__main__')\n"
    )
    run = run_program(tmp_path / "spoil.py", *words(data, tmp_path / "run", "--max_skipped_steps", "99", workers=0))
    assert run.returncode == 1 and "Use it" not in run.stdout and "Traceback" not in run.stderr
    assert "the weights are not finite, so neither a model nor a checkpoint was written" in run.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_checkpoint_in_a_row_of_skipped_steps_is_put_off_and_does_not_reset_the_limit(tar_folder, tmp_path):
    """Every step from the second on is spoilt, and a checkpoint is due after each: the run is given up all the same."""
    out = tmp_path / "run"
    trainer = make_trainer(out, tar_folder, "--checkpoint_samples", "32", "--max_skipped_steps", "2")
    spoil_steps(trainer, set(range(1, 1000)))
    with pytest.raises(RunDiverged, match="went back to its last checkpoint 3 times"):
        trainer.run()
    assert [path.name[-3:] for path in find_checkpoints(out)] == ["032"]


def test_a_checkpoint_says_that_it_was_written_while_steps_were_skipped(data, tmp_path):
    """Asked to stop in a row of skipped steps, the run saves; a run that returns to a checkpoint skips that one."""
    out = tmp_path / "run"
    trainer = make_trainer_of(data, out, "--checkpoint_samples", "16", "--max_skipped_steps", "9")
    spoil_steps(trainer, {4, 5, 6, 7, 8})
    _stop_after(trainer, 6)
    trainer.run()
    *_, good, other = find_checkpoints(out)
    assert (read_state(good)["good"], read_state(other)["good"]) == (True, False)
    assert newest_good_checkpoint(out) == other and newest_good_checkpoint(out, only_good=True) == good
    resumed = make_trainer_of(data, out, "--max_skipped_steps", "9", "--resume_from_checkpoint", "auto")
    assert resumed.health.in_a_row == 2 and resumed.state.samples == 48
    spoil_steps(resumed, set(range(7)))  # seven more are nine in a row
    _stop_after(resumed, 7)
    resumed.run()
    assert resumed.state.samples == 32  # it went back to the good one before it was stopped


# -- the user's files -------------------------------------------------------------------------------------------------


def test_a_tokenizer_in_the_output_folder_is_left_alone(data, tokenizer, tmp_path):
    """`--output_dir runs/x --tokenizer runs/x/tokenizer` with two processes wrote over it, then removed it."""
    out = tmp_path / "run"
    tokenizer.save_pretrained(out / "tokenizer")
    before = {path.name: path.read_bytes() for path in (out / "tokenizer").iterdir()}
    argv = words(data, out, "--tokenizer", str(out / "tokenizer"), "--train_samples", "16", workers=0)
    run = run_program(PRETRAIN, *argv, processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert {path.name: path.read_bytes() for path in (out / "tokenizer").iterdir()} == before


@pytest.mark.parametrize("name", ["model.safetensors", "recipe.yaml", "config.json", "tokenizer.json", "results.json"])
def test_a_new_run_writes_over_nothing(name, data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"already holds {name}.*another --output_dir"):
        make_trainer_of(data, out, "--resume_from_checkpoint", "auto")
    assert (out / name).read_text() == "mine"


def test_folders_of_others_are_left_alone(data, tmp_path):
    """Another trainer's checkpoints, and names that only look like left-overs of ours."""
    out = tmp_path / "run"
    for name in ("checkpoint-500", "partial-my-checkpoint-1", "partial-push-mine"):
        (out / name).mkdir(parents=True)
        (out / name / "mine").write_text("mine")
    trainer = make_trainer_of(data, out, "--train_samples", "64", "--keep_checkpoints", "1")
    trainer.run()
    for name in ("checkpoint-500", "partial-my-checkpoint-1", "partial-push-mine"):
        assert (out / name / "mine").read_text() == "mine"


def test_two_runs_do_not_share_a_folder(data, tmp_path):
    out = tmp_path / "run"
    run = Watched(tmp_path, words(data, out), STEP_SECONDS="0.2")
    run.wait_for_steps(1)
    with pytest.raises(FolderInUse, match=rf"is in use by another run \(process {run.program.processes[0].pid}, host"):
        lock_folder(out)
    second = run_program(PRETRAIN, *words(data, out, "--resume_from_checkpoint", "auto"))
    assert second.returncode == 1 and "in use by another run" in second.stderr and run.program.poll() is None
    os.kill(run.program.processes[0].pid, signal.SIGKILL)  # the lock dies with it, not with its workers
    run.program.processes[0].join(10)
    trainer = make_trainer_of(data, out, "--resume_from_checkpoint", "auto")
    trainer.accelerator.end_training()
    run.program.kill()


# -- the end of a run -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_known_to_be_finished(data, tmp_path):
    out = tmp_path / "run"
    argv = words(data, out, "--train_samples", "64", "--resume_from_checkpoint", "auto", workers=0)
    first = run_program(PRETRAIN, *argv)
    assert first.returncode == 0, first.stderr[-3000:]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = run_program(PRETRAIN, *argv)
    assert again.returncode == 0 and again.stdout.startswith("Finished: ") and not again.stderr
    fewer = run_program(PRETRAIN, *argv, "--train_samples", "32")
    assert fewer.returncode == 0 and fewer.stdout.startswith("Finished: ")
    other = run_program(PRETRAIN, *argv, "--seed", "7")
    assert other.returncode == 1 and "finished run with other options: seed was 0, is 7" in other.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    more = run_program(PRETRAIN, *argv, "--train_samples", "96")
    assert more.returncode == 0 and json.loads((out / "results.json").read_text())["samples"] == 96, more.stderr[-3000:]


def test_a_run_that_ended_before_its_evaluation_resumes_with_it(data, tmp_path):
    out = tmp_path / "run"
    argv = ("--train_samples", "64", "--checkpoint_samples", "0")
    trainer = make_trainer_of(data, out, *argv)
    trainer._evaluate = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert (out / "model.safetensors").is_file() and not (out / "results.json").exists()
    resumed = make_trainer_of(data, out, *argv, "--resume_from_checkpoint", "auto")
    assert resumed.state.samples == 64
    resumed.run()
    assert json.loads((out / "results.json").read_text())["finished"]
    with pytest.raises(RunFinished):
        make_trainer_of(data, out, *argv, "--resume_from_checkpoint", "auto")


def test_the_clock_writes_checkpoints_too(data, tmp_path):
    trainer = make_trainer_of(data, tmp_path / "run", "--checkpoint_samples", "0", "--checkpoint_minutes", "1e-6")
    _stop_after(trainer, 5)
    trainer.run()
    assert [path.name[-3:] for path in find_checkpoints(tmp_path / "run")] == ["032", "040"]


def test_a_broken_line_of_the_log_costs_itself(data, tmp_path):
    """After the last step there is nothing to repair it: it was the trained model that was lost."""
    trainer = make_trainer_of(data, tmp_path / "run", "--train_samples", "64")
    evaluate = trainer._evaluate

    def evaluated():
        with (tmp_path / "run" / "log.jsonl").open("a") as log:
            log.write('{"samples": 64, "loss": 1.\n{"samples": "x"}\n[1]\n\udcff\n'.encode("utf-8", "replace").decode())
        return evaluate()

    trainer._evaluate = evaluated
    trainer.run()
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert [record["samples"] for record in trainer.progress.records()] == [8 * n for n in range(1, 9)]


def test_an_evaluation_without_one_usable_picture_measures_nothing(data, tmp_path):
    labelled = tmp_path / "labelled"
    for name in ("a", "b"):
        (labelled / "test" / name).mkdir(parents=True)
        (labelled / "test" / name / "1.png").write_bytes(b"no picture")
    argv = words(data, tmp_path / "run", "--train_samples", "16", "--eval_data", str(labelled), workers=0)
    run = run_program(PRETRAIN, *argv)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "not measured: no evaluation image can be used" in run.stdout and "0.0%" not in run.stdout
    assert "top1" not in json.loads((tmp_path / "run" / "results.json").read_text())


# -- a resume that does not fit ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    _checkpoint_of(data, folder)
    return folder


VISION = {**json.loads(TINY[1]), "image_size": 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--ema_half_life", "64"],
            "has no moving average of the weights: to resume from it, leave --ema_half_life out",
        ),
        (["--vision_config", json.dumps(VISION)], "holds another model: vision_model"),
        (["--objective", "both"], "holds another model: "),
        (["--seed", "3"], "resume with that"),
        (["--shuffle_block", "8"], "resume with that"),
    ],
)
def test_a_resume_that_does_not_fit_names_the_options_that_fit(options, message, stopped, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    run = run_program(PRETRAIN, *words(data, out, "--resume_from_checkpoint", "auto", *options, workers=0))
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert message in run.stderr and str(out) in run.stderr or "resume with that" in run.stderr


def test_a_checkpoint_of_another_version_is_refused_by_name(stopped, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    for checkpoint in find_checkpoints(out):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        del state["format"]
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        from flip_hf.training.manifest import write_manifest

        write_manifest(checkpoint)
    run = run_program(PRETRAIN, *words(data, out, "--resume_from_checkpoint", "auto", workers=0))
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "has format 1, and this version of flip_hf reads format 2" in run.stderr
    assert "--model_name_or_path" in run.stderr
