"""The hardware of a run: precision, cores, loader workers, device name."""

import os
import platform
from pathlib import Path

import torch
from accelerate import Accelerator

from flip_hf.console.json_types import JsonObject
from flip_hf.data.workers import default_workers
from flip_hf.training.accelerators import find_accelerator
from flip_hf.training.arguments import DataArguments


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Returns the dtype of matrix products; `auto` follows `accelerate launch`, else what the hardware supports."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "auto" and launched in ("no", "fp8"):
        # Without matrix units for it, a CPU only emulates bfloat16.
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        able = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else has_amx()
        precision = "bf16" if able else "fp32"
    elif precision == "auto":
        precision = launched
    if precision == "fp16":
        raise ValueError(
            "`accelerate launch` asks for fp16, which would need a scaled loss; use --precision bf16, or fp32."
        )
    return torch.bfloat16 if precision == "bf16" else None


def num_workers(data: DataArguments) -> int:
    """Returns the loader workers of this process: as configured, else the cores that are left, at most eight."""
    return data.num_workers if data.num_workers is not None else default_workers()


def device_name(device: str) -> str:
    """Returns the GPU's or the processor's name, the latter where the system exposes it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def describe(accelerator: Accelerator) -> JsonObject:
    """Describes the hardware for a run's results: name and number of devices, and maximum power of one (W)."""
    name = device_name(accelerator.device.type)
    known = find_accelerator(name)
    return {"device": name, "processes": accelerator.num_processes, "watts": known and known.watts}


def where(accelerator: Accelerator) -> str:
    """Describes the processes and the device of a run, for its first line."""
    count = accelerator.num_processes
    processes = "1 process" if count == 1 else f"{count:,} processes"
    return f"on {processes}, each on: {device_name(accelerator.device.type)}"
