"""scripts/pretrain.py, with a note of every sample that a step takes: `{rank}-{start}-{pid}.txt` in $FLIP_HF_TAKEN.

`start` is the number of samples at which this process began; each line holds the samples of one step, as digests of
their visible patches and their tokens. Steps are slowed down, so that a test that watches can hit one.
"""

import hashlib
import os
import runpy
import sys
import time
from pathlib import Path

from flip_hf.data.loader import TrainLoader
from flip_hf.training.engine import Trainer

FOLDER = Path(os.environ["FLIP_HF_TAKEN"])
original_run = Trainer.run
original_iter = TrainLoader.__iter__


def digest(patches, tokens) -> str:
    return hashlib.blake2b(patches.numpy().tobytes() + repr(tokens.tolist()).encode(), digest_size=8).hexdigest()


def texts(batch):
    """The tokens of each text, wherever it was packed."""
    numbers = (batch["position_ids"].flatten() == 0).cumsum(0)  # a text begins at position 0
    return [batch["input_ids"].flatten()[numbers == numbers[token]] for token in batch["pooled_tokens"]]


def run(self):
    rank = self.accelerator.process_index
    self.loader.notes = FOLDER / f"{rank}-{self.state.samples:06d}-{os.getpid()}.txt"
    return original_run(self)


def iterate(self):
    for batch in original_iter(self):
        with self.notes.open("a") as file:
            pairs = zip(batch["patches"], texts(batch), strict=True)
            file.write(" ".join(digest(*pair) for pair in pairs) + "\n")
        yield batch
        time.sleep(0.04)


Trainer.run = run
TrainLoader.__iter__ = iterate
script = str(Path(__file__).parents[2] / "scripts" / "pretrain.py")
sys.argv[0] = script
sys.path.insert(0, str(Path(script).parent))
runpy.run_path(script, run_name="__main__")
