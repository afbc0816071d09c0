"""The process layer of every script: as many processes as were started, all in one group, or an error."""

import os
from typing import Any

import torch
from accelerate import Accelerator

from flip_hf.data.workers import cores_per_process


def make_accelerator(**options: Any) -> Accelerator:
    """Makes Accelerate's process layer, on a CPU too.

    Without a GPU, Accelerate takes each process that torchrun starts for the only one, unless it is told to use the
    CPU; each would then run on its own, all of them into one folder.

    Args:
        options: for [`Accelerator`].

    Raises:
        ValueError: several processes were started, and this is not one of so many.
    """
    told = os.environ.get("WORLD_SIZE", "")
    wanted = int(told) if told.isdecimal() else 1
    if wanted > 1 and not torch.accelerator.is_available():
        options["cpu"] = True
    accelerator = Accelerator(**options)
    if accelerator.num_processes < wanted:  # more come of MPI, which has its own variables
        raise ValueError(
            f"{wanted} processes were started (WORLD_SIZE), and Accelerate makes no group of them: it sees "
            f"{accelerator.num_processes}. Start them with `torchrun --standalone --nproc_per_node {wanted}`, on CPUs "
            "with ACCELERATE_USE_CPU=true before it, or on GPUs with `accelerate launch`."
        )
    _refuse_lone_launch(accelerator)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(cores_per_process())  # `accelerate launch` and torchrun leave one thread to a process
    return accelerator


def _refuse_lone_launch(accelerator: Accelerator) -> None:
    """Refuses to be the one process that `accelerate launch --cpu --num_processes 2` starts.

    Without MPI it starts a single one, and tells of the others only by the address where they would have met.

    Raises:
        ValueError: this is that process.
    """
    launched = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and accelerator.num_processes == 1 and os.environ.get("MASTER_ADDR") and "RANK" not in os.environ:
        raise ValueError(
            "`accelerate launch --cpu` was asked for several processes and starts one (MASTER_ADDR is set, RANK is "
            "not). For several on CPUs use `torchrun --standalone --nproc_per_node 2 SCRIPT ...`, for one "
            "`python SCRIPT ...`."
        )
