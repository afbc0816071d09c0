"""Loader workers under signals that a whole process group gets."""

import multiprocessing
import os
import subprocess
import sys

import pytest

from flip_hf.data.workers import open_batches
from flip_hf.training.failures import is_clear
from tests.helpers.programs import ROOT, run_program

SCRIPT = """
import os, signal, sys, warnings
from torch.utils.data import IterableDataset
from flip_hf.data.loader import make_loader

class Numbers(IterableDataset):
    def __iter__(self):
        yield from range(100)

if __name__ == "__main__":
    number = int(sys.argv[1])
    warnings.simplefilter("ignore")  # two workers are too many for a machine of one core
    for own in (signal.SIGINT, signal.SIGTERM):
        signal.signal(own, lambda *_: None)
    seen = 0
    for i, _ in enumerate(make_loader(Numbers(), num_workers=2)):
        seen += 1
        if i == 20:
            os.killpg(0, number)
    print("seen", seen)
"""

LEFT_OPEN = """
from torch.utils.data import IterableDataset
from flip_hf.data.loader import make_loader
from flip_hf.data.workers import open_batches

class Numbers(IterableDataset):
    def __iter__(self):
        yield from range(100)

def numbers():
    with open_batches(make_loader(Numbers(), num_workers=1)) as batches:
        yield from batches

if __name__ == "__main__":
    taken = numbers()
    print(next(taken))
"""


@pytest.mark.parametrize("number", [2, 15], ids=["SIGINT", "SIGTERM"])
def test_workers_outlive_a_signal_to_the_whole_group(number, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    run = run_program(tmp_path / "run.py", number)
    assert run.returncode == 0 and run.stdout == "seen 200\n" and not run.stderr, run.stderr[-2000:]


@pytest.mark.parametrize("interpreter", ["new", "forked"])
def test_a_script_ends_with_its_batches_left_open(interpreter, tmp_path):
    """A new interpreter closes the generator at its end, when no thread starts any more; a fork never does."""
    script = tmp_path / "run.py"
    script.write_text(LEFT_OPEN)
    if interpreter == "new":
        run = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    else:
        run = run_program(script)
    assert run.returncode == 0 and run.stdout == "0\n" and not run.stderr, run.stderr[-2000:]


class Interrupted:
    """A loader whose worker, where one is given, has died while it handed over a batch."""

    def __init__(self, *workers):
        self._workers = list(workers)

    def __iter__(self):
        return self

    def __next__(self):
        raise EOFError

    def _shutdown_workers(self):
        pass


def test_a_connection_that_a_dead_worker_broke_is_its_death():
    worker = multiprocessing.Process(target=os._exit, args=(1,))
    worker.start()
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid\(s\) \d+\) exited unexpectedly$") as caught:
        with open_batches(Interrupted(worker)) as batches:
            next(batches)
    worker.join()
    assert is_clear(caught.value)
    with pytest.raises(EOFError), open_batches(Interrupted()) as batches:
        next(batches)
