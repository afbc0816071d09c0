"""The bottleneck of a run, data or compute, and what would make it faster."""

import statistics
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from flip_hf.console.json_types import JsonObject
from flip_hf.data.plain_jpeg import is_usable
from flip_hf.data.workers import cores_per_process
from flip_hf.training.arguments import Arguments, DataArguments
from flip_hf.training.hardware import autocast_dtype, num_workers

# A loader that keeps up has the next batch ready; waiting beyond this share is the data's fault.
DATA_BOUND = 0.05


def longest_wait(data_wait: float, accelerator: Accelerator) -> float:
    """Returns the largest share of waiting over all processes: the others wait for the slowest one."""
    waits: Any = accelerator.gather(torch.tensor([data_wait], device=accelerator.device))
    return waits.max().item()


def bottleneck(records: list[JsonObject], arguments: Arguments, accelerator: Accelerator) -> tuple[float | None, str]:
    """Finds the bottleneck of a run.

    Args:
        records: the run's log records.
        arguments: the run's arguments.
        accelerator: the process layer that it ran on.

    Returns:
        The share of time spent waiting for data (None if no step was logged): the median over log lines, since the
        first includes the start of the workers. And a sentence that says what that means and what to change.
    """
    shares = [record["data_wait"] for record in records if "data_wait" in record]
    if not shares:
        return None, "unknown: no step was logged"
    data_wait = statistics.median(shares)
    if data_wait > DATA_BOUND:
        return data_wait, f"data: steps waited for it {data_wait:.0%} of the time; {_faster_data(arguments.data)}"
    advice = ", ".join(_faster_steps(arguments, accelerator))
    return data_wait, f"compute: steps waited for data {data_wait:.0%} of the time; faster with {advice}"


def _faster_data(data: DataArguments) -> str:
    workers = num_workers(data)
    cores = cores_per_process()
    if workers < cores - 1:
        return f"try --num_workers {cores - 1}, now {workers}"
    decoder = "" if is_usable() else "install simplejpeg, which decodes JPEGs faster than Pillow, "
    return (
        f"every core is in use, {cores} a process: {decoder}store smaller images, or take a machine with "
        "more cores for each device"
    )


def _faster_steps(arguments: Arguments, accelerator: Accelerator) -> list[str]:
    """Lists options that would make the step faster and are not in use, and the last resort."""
    options = arguments.optimization
    advice = []
    if autocast_dtype(options.precision) is None and accelerator.device.type == "cuda":
        advice.append("--precision bf16")
    if arguments.model.gradient_checkpointing:
        advice.append("a smaller --micro_batch_size without --gradient_checkpointing")
    if not options.compile and accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        advice.append("--compile")
    if arguments.model.mask_ratio < 0.75:
        advice.append("a higher --mask_ratio")
    return [*advice, "more devices"]
