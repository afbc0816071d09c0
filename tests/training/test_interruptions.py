"""Runs that are ended in every way, at random: all processes go, and the run resumes to the same bits.

`FLIP_HF_INTERRUPTIONS=50 pytest tests/training/test_interruptions.py` is the long form; without it there are three.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flip_hf.training.checkpoint import find_checkpoints
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import PRETRAIN
from tests.helpers.programs import run_program
from tests.helpers.watched import LIMIT, Watched, serve, words

INTERRUPTIONS = int(os.environ.get("FLIP_HF_INTERRUPTIONS", "3"))
KINDS = [
    *("kill -9", "SIGTERM", "SIGINT", "a killed worker", "a killed rank"),
    *("a full disk", "a deleted folder", "a silent server"),
]
STEPS = 50


@pytest.fixture(scope="module")
def data(samples, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions") / "tars"
    folder.mkdir()
    for shard in range(4):
        write_tar(folder / f"{shard}.tar", samples[32 * shard : 32 * (shard + 1)])
    tokenizer.save_pretrained(folder.parent / "tokenizer")
    return folder


def argv(source: str, data: Path, out: Path) -> list[str]:
    tokenizer = ["--tokenizer", str(data.parent / "tokenizer"), "--special_tokens", "true"]
    return words(source, out, *tokenizer, "--resume_from_checkpoint", "auto", "--checkpoint_samples", "32")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Results of uninterrupted runs of one and of two processes: weights, and the losses of the log."""
    found = {}
    for processes in (1, 2):
        out = tmp_path_factory.mktemp("straight") / "run"
        run = run_program(PRETRAIN, *argv(f"{data}/{{0..3}}.tar", data, out), processes=processes)
        assert run.returncode == 0, run.stderr[-3000:]
        found[processes] = what_came_of(out)
    return found


def what_came_of(out: Path) -> tuple[dict, dict]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    weights = {name: value.numpy().tobytes() for name, value in load_file(out / "model.safetensors").items()}
    return weights, {record["samples"]: record["loss"] for record in records if "loss" in record}


@contextlib.contextmanager
def small_disk(folder: Path):
    """A tmpfs of 16 MB, where this process may mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("number", range(INTERRUPTIONS))
def test_an_interruption_at_random_loses_nothing(number, straight, data, tmp_path):
    dice = random.Random(number)
    kind = KINDS[number % len(KINDS)] if INTERRUPTIONS > len(KINDS) else dice.choice(KINDS)
    processes = dice.choice((1, 2))
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "disk")) if kind == "a full disk" else tmp_path
        out = disk / "run"
        quiet = {"stops": kind == "a silent server"}
        size = (data / "1.tar").stat().st_size

        def stops_after(name: str) -> int | None:
            return dice.randrange(size // 4, size) if quiet["stops"] and name != "0.tar" else None

        address = stack.enter_context(serve(data, stops_after))
        source = f"{address}/{{0..3}}.tar" if kind == "a silent server" else f"{data}/{{0..3}}.tar"
        run = Watched(tmp_path, argv(source, data, out), processes, STEP_SECONDS="0.03")
        code, seconds = interrupt(kind, run, out, dice)
        left = find_checkpoints(out)
        steps = len(left) and int(left[-1].name[-12:]) // 8
        how = f"exit {code}, all gone after {seconds:.1f} s, {steps} steps kept"
        print(f"{number}: {kind}, {processes} process(es): {how}")
        quiet["stops"] = False
        again = run_program(PRETRAIN, *argv(source, data, out), processes=processes)
        assert again.returncode == 0, again.stderr[-3000:]
        weights, losses = what_came_of(out)
        assert weights == straight[processes][0]
        if kind != "a full disk":  # whose log may have lost a line that could not be written
            assert losses == straight[processes][1]


def interrupt(kind: str, run: Watched, out: Path, dice: random.Random) -> tuple[int, float]:
    """Ends a run after a random number of steps; its exit code, and the seconds until all its processes were gone."""
    wanted = dice.randrange(1, STEPS - 15)
    waited = time.monotonic() + (15 if kind == "a silent server" else LIMIT)
    while run.steps() < wanted and time.monotonic() < waited:
        assert run.program.poll() is None, run.text()[-3000:]
        time.sleep(0.005)
    time.sleep(dice.uniform(0, 0.05))
    family = run.family()
    ranks = [process.pid for process in run.program.processes]
    before = time.monotonic()
    ACTIONS[kind](ranks, run, out, dice)
    code = run.assert_all_end(family)
    if kind == "a full disk":
        (out.parent / "filler").unlink()
    return code, time.monotonic() - before


def _signal_all(number: int):
    def send(ranks, run, out, dice):
        for rank in ranks:
            os.kill(rank, number)

    return send


def _kill_worker(ranks, run, out, dice):
    dice.choice(run.workers()).kill()


def _kill_rank(ranks, run, out, dice):
    os.kill(dice.choice(ranks), signal.SIGKILL)


def _fill_disk(ranks, run, out, dice):
    with contextlib.suppress(OSError), (out.parent / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(65536))


def _delete_folder(ranks, run, out, dice):
    gone = out.rename(out.with_name("gone"))  # at once: files that come back while others go are no deleted folder
    shutil.rmtree(gone)


ACTIONS = {
    "kill -9": _signal_all(signal.SIGKILL),
    "SIGTERM": _signal_all(signal.SIGTERM),
    "SIGINT": _signal_all(signal.SIGINT),
    "a killed worker": _kill_worker,
    "a killed rank": _kill_rank,
    "a full disk": _fill_disk,
    "a deleted folder": _delete_folder,
    "a silent server": _signal_all(signal.SIGTERM),
}
