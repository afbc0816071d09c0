"""`flip-hf data shard`, killed at random times, ends with the same bytes as when it is left alone.

Small here; `FLIP_HF_LONG_TESTS=1` kills ten times while 20,000 samples are written. Ends on signals, and two at once.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flip_hf.curation.writing import Writing
from tests.helpers.planted import write_planted
from tests.helpers.programs import ROOT, Program, run_program

LONG = bool(os.environ.get("FLIP_HF_LONG_TESTS"))
KILLS = 10 if LONG else 3
SIZE = (10, 2000, 60, 20, 20) if LONG else (12, 150, 6, 2, 2)
MAIN = ROOT / "flip_hf" / "__main__.py"
TIMEOUT = 300


def words(data: Path, out: Path, workers: int) -> list[str]:
    size = "1000" if LONG else "60"
    return ["data", "shard", str(data), str(out), "--workers", str(workers), "--samples_per_shard", size]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    write_planted(folder, *SIZE)
    return folder


def start(tmp_path: Path, data: Path, out: Path, workers: int, prepare: Callable[[], None] | None = None) -> Program:
    outputs = (tmp_path / "stdout", tmp_path / "stderr")
    return Program(MAIN, words(data, out, workers), outputs, prepare=prepare)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(what: Callable[[], object], program: Program) -> None:
    end = time.monotonic() + TIMEOUT
    while not what() and program.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)


# Folders of `.work` that are there while samples are read, and while shards are written.
STAGES = ("spool", "shards")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> tuple[Path, list[float]]:
    """The shards of an undisturbed command with one process, and the seconds that each stage took."""
    folder = tmp_path_factory.mktemp("whole")
    program = start(folder, data, folder / "out", 1)
    begun = []
    for stage in STAGES:
        wait_for((folder / "out" / ".work" / stage).exists, program)
        begun.append(time.monotonic())
    assert program.wait(TIMEOUT) == 0, (folder / "stderr").read_text()
    return folder / "out", [begun[1] - begun[0], time.monotonic() - begun[1]]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_times_it_writes_the_same_bytes(workers, data, whole, tmp_path):
    rng = random.Random(workers)
    expected, seconds = whole
    kills = 0
    for kill in range(KILLS):
        stage = 2 * kill // KILLS
        program = start(tmp_path, data, tmp_path / "out", workers + kill % 2)
        wait_for((tmp_path / "out" / ".work" / STAGES[stage]).exists, program)
        time.sleep(rng.random() * seconds[stage] / KILLS / 2)
        kills += program.poll() is None
        program.kill()
        program.processes[0].join()
    assert kills == KILLS or (kills > 1 and not LONG)  # a small one may be faster than it was
    assert start(tmp_path, data, tmp_path / "out", workers).wait(TIMEOUT) == 0
    assert contents(tmp_path / "out") == contents(expected)


def never_end_writing() -> None:
    """Keeps workers from writing a shard, so that a signal never comes too late, and lets Ctrl-C through.

    A shell that starts the tests in the background has them ignore it, and their children with them.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Writing._write = lambda self, number: time.sleep(600)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_one_line_and_its_workers_with_it(number, data, whole, tmp_path):
    program = start(tmp_path, data, tmp_path / "out", 2, prepare=never_end_writing)
    spool = tmp_path / "out" / ".work" / "spool"
    wait_for(lambda: list(spool.glob("[0-9]*.arrow")), program)
    os.kill(program.processes[0].pid or 0, number)
    assert program.wait(60) == 130
    said = [line for line in (tmp_path / "stderr").read_text().splitlines() if line.startswith("error")]
    assert said == ["error: Interrupted. The same command resumes from here."]
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    done = run_program(MAIN, *words(data, tmp_path / "out", 1))
    assert done.returncode == 0 and contents(tmp_path / "out") == contents(whole[0])


def test_two_at_once_do_not_meet_in_one_folder(data, tmp_path):
    first = start(tmp_path, data, tmp_path / "out", 1)
    wait_for((tmp_path / "out" / ".work" / "spool").exists, first)
    second = run_program(MAIN, *words(data, tmp_path / "out", 1))
    assert second.returncode == 1 and "is in use by another run (process" in second.stderr
    assert first.wait(TIMEOUT) == 0
