import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from tests.data.conftest import image_folder, parquet_folder, samples, tar_folder  # noqa: F401
from tests.programs import ROOT, run_program

PRETRAIN = ROOT / "scripts" / "pretrain.py"
TINY = [
    *("--vision_config", json.dumps({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2})),
    *("--text_config", json.dumps({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2})),
]
TINY[1] = json.dumps({**json.loads(TINY[1]), "intermediate_size": 64, "image_size": 32, "patch_size": 8})
TINY[3] = json.dumps({**json.loads(TINY[3]), "intermediate_size": 64, "max_position_embeddings": 16})
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
SCRIPT, MODULE = (str(PRETRAIN),), ("-m", "flip_hf", "pretrain")


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The embedded data's recipe, shortened to seconds: (folder, what it printed). Tests only read it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # trained once for all workers, in the folder that holds theirs
        shared = shared.parent
    folder = shared / "shapes"
    printed = shared / "shapes.txt"
    with FileLock(shared / "shapes.lock"):
        if not printed.exists():
            run = launch("shapes", "--train_samples", "2048", "--unmasked_samples", "512", "--output_dir", str(folder))
            assert run.returncode == 0, run.stderr[-3000:]
            printed.write_text(run.stdout)
    return folder, printed.read_text()
