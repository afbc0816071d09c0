"""Loader workers under signals that a whole process group gets."""

import pytest

from tests.helpers.programs import run_program

SCRIPT = """
import os, signal, sys
from torch.utils.data import IterableDataset
from flip_hf.data.loader import make_loader

class Numbers(IterableDataset):
    def __iter__(self):
        yield from range(100)

if __name__ == "__main__":
    number = int(sys.argv[1])
    for own in (signal.SIGINT, signal.SIGTERM):
        signal.signal(own, lambda *_: None)
    seen = 0
    for i, _ in enumerate(make_loader(Numbers(), num_workers=2)):
        seen += 1
        if i == 20:
            os.killpg(0, number)
    print("seen", seen)
"""


@pytest.mark.parametrize("number", [2, 15], ids=["SIGINT", "SIGTERM"])
def test_workers_outlive_a_signal_to_the_whole_group(number, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    run = run_program(tmp_path / "run.py", number)
    assert run.returncode == 0 and run.stdout == "seen 200\n" and not run.stderr, run.stderr[-2000:]
