"""A run that is killed again and again, asked to stop, or finds its checkpoints damaged resumes to the same bits.

`FLIP_HF_KILLS=30 pytest tests/training/test_kill.py -k killed` is the long form: 30 times `kill -9`, spread over 300
steps, of runs that torchrun starts; without it there are three, of forks that start at once.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator

from flip_hf import FlipConfig, FlipModel
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.training.checkpoint import (
    DamagedCheckpointError,
    find_checkpoints,
    load_checkpoint,
    newest_good_checkpoint,
    tidy,
)
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.manifest import write_manifest
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.progress import Progress
from flip_hf.training.recipes import parse_arguments
from flip_hf.training.resume import check_fit, recipe_changes, resolve_checkpoint
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import TINY, launcher
from tests.helpers.programs import ROOT, Program

KILLS = int(os.environ.get("FLIP_HF_KILLS", "3"))
LONG = KILLS > 3
BATCH = 8
STEPS = 10 * KILLS
WRAPPER = ROOT / "tests" / "helpers" / "record_samples.py"


@pytest.fixture(scope="module")
def shards(samples, tmp_path_factory) -> Path:
    """Ten shards of 16 samples; two processes of two workers see all of them in 20 steps."""
    folder = tmp_path_factory.mktemp("kill") / "tars"
    folder.mkdir()
    for shard in range(10):
        write_tar(folder / f"{shard}.tar", samples[16 * shard : 16 * (shard + 1)])
    # Learning word pieces twice may number them differently: both runs are given the same.
    captions = [caption.decode() for _, _, caption in samples]
    train_wordpiece(captions, vocab_size=400, context_length=16).save_pretrained(folder.parent / "tokenizer")
    return folder


class Run:
    """A run in a folder, started as often as it takes: real processes in sessions of their own.

    `start` is what a user does; `fork` leaves out the launcher and the seconds before the first step.
    """

    def __init__(self, folder: Path, data: Path, steps: int, processes: int = 2):
        self.folder = folder
        self.processes = processes
        self.steps = steps
        self.text = folder.with_suffix(".txt")
        self.taken = folder.with_name(f"{folder.name}-taken")
        self.settings = {"FLIP_HF_TAKEN": str(self.taken)}
        self.taken.mkdir(parents=True)
        self.argv = [
            *("--train_data", str(data), "--output_dir", str(folder), *TINY, "--precision", "fp32"),
            *("--tokenizer", str(data.parent / "tokenizer"), "--special_tokens", "true"),
            *("--batch_size", str(BATCH), "--log_samples", str(BATCH), "--checkpoint_samples", str(2 * BATCH)),
            *("--train_samples", str(BATCH * (steps - 4)), "--unmasked_samples", str(4 * BATCH)),
            *("--base_lr", "0.05", "--unmasked_base_lr", "0.01", "--warmup_samples", "32"),
            *("--unmasked_warmup_samples", "8", "--shuffle_block", "6", "--num_workers", "2", "--report_to", "none"),
            *("--resume_from_checkpoint", "auto"),
        ]

    def start(self) -> subprocess.Popen:
        command = launcher(self.processes) if self.processes > 1 else [sys.executable]
        with self.text.open("a") as output:
            return subprocess.Popen(
                [*command, str(WRAPPER), *self.argv],
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**os.environ, "ACCELERATE_USE_CPU": "true", **self.settings},
                start_new_session=True,
            )

    def fork(self) -> Program:
        return Program(WRAPPER, self.argv, (self.text, self.text), self.processes, self.settings)

    def finish(self) -> "Run":
        assert self.fork().wait(timeout=600) == 0, self.output()[-3000:]
        return self

    def output(self) -> str:
        return self.text.read_text()

    def records(self) -> list[dict]:
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> dict[int, float]:
        return {record["samples"]: record["loss"] for record in self.records() if "loss" in record}

    def wait_for(self, condition, process: subprocess.Popen | Program) -> None:
        while not condition():
            assert process.poll() is None, self.output()[-3000:]
            time.sleep(0.002)

    def pids(self) -> list[int]:
        """Training processes of the latest start, by the names of their notes."""
        notes = sorted(self.taken.glob("*.txt"), key=lambda path: path.stat().st_mtime)
        return [int(path.stem.split("-")[2]) for path in notes[-self.processes :]]

    def samples_taken(self) -> list[list[str]]:
        """For each process, what the steps that count were made of: a later start replaces what it did again."""
        taken = []
        for rank in range(self.processes):
            lines: list[str] = []
            for path in sorted(self.taken.glob(f"{rank}-*.txt"), key=lambda path: path.stat().st_mtime):
                lines = lines[: int(path.stem.split("-")[1]) // BATCH] + path.read_text().splitlines()
            taken.append(lines[: self.steps])
        return taken


def end_of(process: subprocess.Popen | Program) -> int:
    return process.wait(timeout=120)


def kill_all(process: subprocess.Popen | Program) -> None:
    """Kills the launcher, the training processes (torchrun gives each a session of its own) and their workers."""
    if isinstance(process, Program):
        return process.kill()
    launcher = psutil.Process(process.pid)
    for victim in (launcher, *launcher.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    end_of(process)


def assert_same(run: Run, straight: Run) -> None:
    assert {path.name[0] for path in straight.taken.iterdir()} == {str(rank) for rank in range(straight.processes)}
    assert len(straight.losses()) == straight.steps
    assert run.losses() == straight.losses()
    ours = run.samples_taken()
    theirs = straight.samples_taken()
    assert ours == theirs and len(set(" ".join(ours[0]).split())) > BATCH
    name = "model.safetensors"
    assert (run.folder / name).read_bytes() == (straight.folder / name).read_bytes()


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("straight") / "run", shards, STEPS).finish()


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(straight, shards, tmp_path):
    """Kills: while a checkpoint is written, one of the processes, all of them after some steps, or while starting."""
    run = Run(tmp_path / "run", shards, STEPS)
    dice = random.Random(0)
    kinds = ["writing", "one", "steps"] + [
        dice.choice(["writing", "writing", "one", "steps", "start"]) for _ in range(KILLS)
    ]
    for kind in kinds[:KILLS]:
        before = len(list(run.taken.iterdir()))
        process = run.start() if LONG and kind in ("start", "one") else run.fork()
        if kind == "start":
            time.sleep(dice.uniform(0, 12))
            kill_all(process)
            continue
        run.wait_for(lambda n=before: len(list(run.taken.iterdir())) >= n + run.processes, process)
        steps = min(len(run.losses()) + dice.randrange(2, 12), STEPS - 8)
        run.wait_for(lambda s=steps: len(run.losses()) >= s, process)
        if kind == "writing":
            run.wait_for(lambda: any(run.folder.glob("partial-*")), process)
        time.sleep(dice.uniform(0, 0.03))
        if kind == "one":
            os.kill(dice.choice(run.pids()), signal.SIGKILL)
            assert end_of(process) != 0
        else:
            kill_all(process)
    run.finish()
    print(f"{KILLS} kills over {STEPS} steps: {kinds[:KILLS]}")
    assert_same(run, straight)
    assert not list(run.folder.glob("partial-*"))


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [pytest.param("launcher", marks=pytest.mark.long), "one process and its workers"])
def test_two_processes_asked_to_stop_save_at_the_same_step(to, straight, shards, tmp_path):
    run = Run(tmp_path / "run", shards, STEPS)
    process = run.start() if to == "launcher" else run.fork()
    run.wait_for(lambda: len(run.losses()) >= 5, process)
    if to == "launcher":
        process.terminate()
    else:
        os.killpg(run.pids()[1], signal.SIGINT)
    code = end_of(process)
    assert (code == 0) == (to != "launcher")  # the launcher reports the signal that it was sent itself
    assert "resume with --resume_from_checkpoint auto" in run.output(), run.output()[-3000:]
    assert "DataLoader worker" not in run.output() and 5 <= len(run.losses()) < STEPS
    assert find_checkpoints(run.folder)[-1].name == f"checkpoint-{max(run.losses()):012d}"
    assert_same(run.finish(), straight)


def test_one_process_asked_to_stop_saves_and_exits_with_0(shards, tmp_path):
    whole = Run(tmp_path / "whole", shards, 20, processes=1).finish()
    run = Run(tmp_path / "run", shards, 20, processes=1)
    process = run.fork()
    run.wait_for(lambda: len(run.losses()) >= 3, process)
    os.killpg(run.pids()[0], signal.SIGTERM)  # as Slurm does: loader workers get it too
    assert end_of(process) == 0, run.output()[-3000:]
    assert "SIGTERM: saving after this step" in run.output() and len(run.losses()) < 20
    assert_same(run.finish(), whole)


@pytest.mark.long
def test_processes_of_a_killed_launcher_save_and_leave(straight, shards, tmp_path):
    run = Run(tmp_path / "run", shards, STEPS)
    process = run.start()
    run.wait_for(lambda: len(run.losses()) >= 5, process)
    ranks = [psutil.Process(pid) for pid in run.pids()]
    family = [*ranks, *(child for rank in ranks for child in rank.children(recursive=True))]
    process.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive and "resume with --resume_from_checkpoint auto" in run.output(), run.output()[-3000:]
    assert find_checkpoints(run.folder)[-1].name == f"checkpoint-{max(run.losses()):012d}"
    assert_same(run.finish(), straight)


# -- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated weights": ("model.safetensors", truncate, "model.safetensors has .* bytes instead of"),
    "flipped bit": ("optimizer.safetensors", flip_a_bit, "optimizer.safetensors is damaged"),
    "missing generators": ("random_states_1.safetensors", Path.unlink, "random_states_1.safetensors is missing"),
    "missing manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
    "torn manifest": ("manifest.json", truncate, "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_by_name(damage, straight, tmp_path, caplog):
    name, spoil, message = DAMAGE[damage]
    for path in find_checkpoints(straight.folder):
        shutil.copytree(path, tmp_path / path.name)
    older, newer = find_checkpoints(tmp_path)
    assert newest_good_checkpoint(tmp_path) == newer and not caplog.records
    spoil(newer / name)
    assert resolve_checkpoint("auto", tmp_path) == older
    (record,) = caplog.records
    assert newer.name in record.message and older.name in record.message
    with pytest.raises(DamagedCheckpointError, match=f"{newer.name} cannot be used: {message}"):
        resolve_checkpoint(str(newer), tmp_path)
    spoil(older / name)
    with pytest.raises(DamagedCheckpointError, match=f"(?s){newer.name}: {message}.*{older.name}: {message}"):
        resolve_checkpoint("auto", tmp_path)


def test_auto_begins_a_run_where_there_is_no_checkpoint_and_latest_does_not(tmp_path):
    assert resolve_checkpoint("auto", tmp_path / "nothing") is None
    with pytest.raises(FileNotFoundError, match="--resume_from_checkpoint auto begins a new run"):
        resolve_checkpoint("latest", tmp_path / "nothing")


def test_left_overs_are_removed_and_checkpoints_beyond_the_start_set_aside(tmp_path, caplog):
    for name in ("partial-checkpoint-000000000032", "partial-old-checkpoint-000000000008", "partial-mine"):
        (tmp_path / name).mkdir()
    for samples in (16, 24, 32):
        (tmp_path / f"checkpoint-{samples:012d}").mkdir()
        write_manifest(tmp_path / f"checkpoint-{samples:012d}")
    tidy(tmp_path, 24)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("checkpoint-000000000016", "checkpoint-000000000024", "partial-mine", "set-aside")
    ]
    assert [p.name for p in (tmp_path / "set-aside").iterdir()] == ["checkpoint-000000000032"]
    assert "checkpoint-000000000032" in caplog.text


# -- does the run fit? ------------------------------------------------------------------------------------------------


def arguments_of(run: Run, *argv: str):
    return parse_arguments([*run.argv, *argv], ROOT / "flip_hf" / "recipes", "shapes")


def test_a_run_that_does_not_fit_its_checkpoint_is_refused_with_the_reason(straight, caplog):
    accelerator = Accelerator(cpu=True)
    checkpoint = find_checkpoints(straight.folder)[-1]
    assert recipe_changes(arguments_of(straight, "--log_samples", "3"), checkpoint) == {}
    other = arguments_of(straight, "--batch_size", "16", "--seed", "7")
    model = FlipModel.from_pretrained(checkpoint)
    check_fit(accelerator, other, model, checkpoint)
    (record,) = caplog.records
    assert "batch_size was 8, is 16, seed was 0, is 7, processes was 2, is 1" in record.message
    with pytest.raises(ValueError, match="was trained with --optimizer adamw, whose moments are of no use to muon"):
        check_fit(accelerator, arguments_of(straight, "--optimizer", "muon"), model, checkpoint)
    config = FlipConfig.from_pretrained(checkpoint)
    config.vision_config.intermediate_size = 48
    with pytest.raises(ValueError, match=r"vision_model.*weight is \(64, 32\) there and \(48, 32\) here"):
        check_fit(accelerator, other, FlipModel(config), checkpoint)


def test_a_process_missing_from_a_checkpoint_gets_a_seed_and_a_warning(straight, tmp_path, caplog):
    """Of a checkpoint of two processes, with the first one's generators lost: weights and state are read by one."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(find_checkpoints(straight.folder)[-1], checkpoint)
    model = FlipModel.from_pretrained(checkpoint)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(PairEncoder(model), make_optimizer(model, arguments_of(straight).optimization))
    with torch.no_grad():
        model.logit_scale.add_(1)
    state = load_checkpoint(accelerator, checkpoint)
    assert state.samples == int(find_checkpoints(straight.folder)[-1].name[-12:]) and not caplog.records
    assert model.logit_scale.item() == FlipModel.from_pretrained(checkpoint).logit_scale.item() and prepared
    (checkpoint / "random_states_0.safetensors").unlink()
    draws = []
    for _ in range(2):
        torch.rand(3)
        load_checkpoint(accelerator, checkpoint)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)
    assert "no random state that fits process 0" in caplog.text


def test_records_that_a_run_sees_again_are_set_aside_and_none_is_lost(tmp_path):
    written = '{"samples": 8, "loss": 1}\n{"samples": 16, "loss": 1}\n{"samples": 2'
    (tmp_path / "log.jsonl").write_text(written)
    progress = Progress(Accelerator(cpu=True), tmp_path, total=32, done=8)
    progress.close()
    assert progress.records() == [{"samples": 8, "loss": 1}]
    assert not (tmp_path / "log.partial").exists()
    aside = tmp_path / "set-aside" / "log.jsonl"
    assert aside.read_text() == written[26:] + "\n"
    # Begun anew in this folder, without a checkpoint.
    progress = Progress(Accelerator(cpu=True), tmp_path, total=32, done=0)
    progress.close()
    assert progress.records() == []
    assert aside.read_text() == written[26:] + "\n" + written[:26]
