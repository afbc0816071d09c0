"""What the machine has for a run: precision, cores, loader processes."""

import os

import torch

from flip_hf.data.workers import default_workers
from flip_hf.training.arguments import DataArguments


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What matrix products are computed in; `auto` follows `accelerate launch`, else what the hardware can do."""
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
    """Loader processes of this training process: as asked for, else the cores that are left, at most eight."""
    return data.num_workers if data.num_workers is not None else default_workers()
