"""Trainers of tiny models, built in this process."""

import json

from flip_hf.training.build import build_trainer
from tests.helpers.arguments import parse
from tests.helpers.pretraining import SHORT, TINY

DECODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ON_ALL = ["--unmasked_samples", "0", "--decoder_config", json.dumps(DECODER)]


def trainer_of(folder, data, objective: str, *argv: str):
    tiny = TINY if objective == "both" else TINY[:2]
    options = [*tiny, *SHORT, *ON_ALL, "--num_workers", "0", "--output_dir", str(folder), "--objective", objective]
    return build_trainer(parse("--train_data", str(data), *options, *argv))


def make_trainer(folder, data, *argv: str):
    options = [*TINY, *SHORT, "--num_workers", "0", "--unmasked_samples", "0", "--output_dir", str(folder), *argv]
    return build_trainer(parse("--train_data", str(data), *options))


def spoil_steps(trainer, steps: set[int]) -> None:
    """Puts one infinite pixel into the batches of these steps, as a broken transform would."""
    normalize = trainer.prepare.normalize
    calls = iter(range(10**9))

    def broken(patches):
        patches = normalize(patches)
        if next(calls) in steps:
            patches[0, 0, 0] = float("inf")
        return patches

    trainer.prepare.normalize = broken
