"""Sets up the process group of every script: all processes that were started, or an error; they then act as one."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from flip_hf.data.workers import cores_per_process

T = TypeVar("T")


def make_accelerator(**options: Any) -> Accelerator:
    """Makes Accelerate's `Accelerator`, also on a CPU.

    Without a GPU, Accelerate treats each process that torchrun starts as the only one unless it is configured to use
    the CPU; each would then run by itself, all of them into one folder.

    Args:
        options: arguments of `Accelerator`.

    Raises:
        ValueError: several processes were started, but they do not form one group.
    """
    size = os.environ.get("WORLD_SIZE", "")
    wanted = int(size) if size.isdecimal() else 1
    if wanted > 1 and not torch.accelerator.is_available():
        options["cpu"] = True
    accelerator = Accelerator(**options)
    if accelerator.num_processes < wanted:  # MPI, which has its own variables, may start more
        raise ValueError(
            f"{wanted} processes were started (WORLD_SIZE), but Accelerate does not group them: it sees "
            f"{accelerator.num_processes}. Start them with `torchrun --standalone --nproc_per_node {wanted}`, on CPUs "
            "with ACCELERATE_USE_CPU=true before it, or on GPUs with `accelerate launch`."
        )
    _refuse_lone_launch(accelerator)
    if accelerator.device.type == "cpu" and _was_launched():
        torch.set_num_threads(cores_per_process())  # a launcher limits each of its processes to one thread
    return accelerator


def _was_launched() -> bool:
    """Returns whether torchrun or `accelerate launch` started this process, rather than a shell."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _refuse_lone_launch(accelerator: Accelerator) -> None:
    """Refuses to be the single process that `accelerate launch --cpu --num_processes 2` starts.

    Without MPI it starts only one process; the only trace of the others is the address where they would have met.

    Raises:
        ValueError: this is that process.
    """
    launched = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and accelerator.num_processes == 1 and os.environ.get("MASTER_ADDR") and "RANK" not in os.environ:
        raise ValueError(
            "`accelerate launch --cpu` was asked for several processes but starts one (MASTER_ADDR is set, RANK is "
            "not). For several on CPUs use `torchrun --standalone --nproc_per_node 2 SCRIPT ...`, for one "
            "`python SCRIPT ...`."
        )


def from_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Calls a function on the main process and returns its result on all; each must call this.

    Raises:
        Exception: whatever the function raised, on every process, so that none waits for the main one in vain.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer = [function(), None]
        except Exception as error:
            answer = [None, error]
    result, raised = broadcast_object_list(answer)
    if raised is not None:
        raise raised
    return result
