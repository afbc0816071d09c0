"""Short runs of `scripts/pretrain.py`: their options, and how they are started."""

import json
import os
import subprocess
import sys

from tests.helpers.programs import ROOT, run_program

PRETRAIN = ROOT / "scripts" / "pretrain.py"
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = [
    *("--vision_config", json.dumps({**TOWER, "intermediate_size": 64, "image_size": 32, "patch_size": 8})),
    *("--text_config", json.dumps({**TOWER, "intermediate_size": 64, "max_position_embeddings": 16})),
]
SHORT = [
    *("--train_samples", "180", "--unmasked_samples", "64", "--batch_size", "32", "--base_lr", "0.01"),
    *("--warmup_samples", "64", "--log_samples", "32", "--shuffle_block", "16", "--report_to", "none"),
    *("--unmasked_base_lr", "0.001", "--unmasked_warmup_samples", "32", "--precision", "fp32"),
]


def launcher(processes: int) -> list[str]:
    """The command before a script that runs it in so many processes on the CPU.

    Not `accelerate launch --cpu --num_processes 2`: without MPI, that starts one.
    """
    if processes == 1:
        return [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


# What a launcher can start: the script of a clone, and the installed package.
SCRIPT = (str(PRETRAIN),)
MODULE = ("-m", "flip_hf", "pretrain")


def launch(*argv: str, processes: int = 1, program: tuple[str, ...] = SCRIPT) -> subprocess.CompletedProcess:
    """Trains as a user does, by a launcher; that costs ten seconds before the first step."""
    command = launcher(processes)
    return subprocess.run(
        [*command, *program, *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )


def pretrain(*argv: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Trains in real processes that start at once."""
    return run_program(PRETRAIN, *argv, processes=processes)
