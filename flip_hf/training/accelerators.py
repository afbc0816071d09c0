"""Peak throughput, memory and power of accelerators, from their vendors' data sheets.

Matrix throughput is dense, with float32 accumulation (data sheets often print twice that, for 2:4 sparse
matrices). float32 is torch's default: true float32, not TF32.
"""

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True)
class DeviceSheet:
    """One device as torch sees it.

    Attributes:
        name: its name in the plan.
        pattern: regular expression that matches `torch.cuda.get_device_name()`.
        memory: bytes, as sold (decimal gigabytes).
        bf16: peak dense bfloat16 FLOP/s; None where the hardware has no bfloat16.
        fp32: peak float32 FLOP/s.
        watts: maximum power (GH200: with its CPU; A100 and V100: the SXM version).
    """

    name: str
    pattern: str
    memory: float
    bf16: float | None
    fp32: float
    watts: float

    def peak(self, precision: str) -> float | None:
        """Returns the peak FLOP/s in `bf16` or `fp32`."""
        return self.bf16 if precision == "bf16" else self.fp32


def _device(name: str, pattern: str, gigabytes: float, bf16: float | None, fp32: float, watts: float) -> DeviceSheet:
    return DeviceSheet(name, pattern, gigabytes * GIGA, None if bf16 is None else bf16 * TERA, fp32 * TERA, watts)


# The first pattern that matches wins. Source of each line: the vendor's data sheet of the product.
ACCELERATORS = (
    _device("B200", r"\bB200\b", 180, 2250, 75, 1000),  # NVIDIA DGX B200: 8 GPUs, 1,440 GB, 36 PFLOP/s bf16 sparse
    _device("H200", r"\bH200\b(?! NVL)", 141, 989, 67, 700),  # NVIDIA H200 Tensor Core GPU, SXM
    _device("H200-NVL", r"\bH200 NVL\b", 141, 835, 60, 600),  # the same sheet
    _device("GH200", r"\bGH200\b", 96, 990, 67, 1000),  # NVIDIA GH200 Grace Hopper, the HBM3 version
    _device("H100-PCIe", r"\bH100 PCIe\b", 80, 756, 51, 350),  # NVIDIA H100, first issue of the sheet
    _device("H100-NVL", r"\bH100 NVL\b", 94, 835, 60, 400),  # NVIDIA H100 NVL
    _device("H100-SXM", r"\bH100\b", 80, 989, 67, 700),  # NVIDIA H100; torch names it "NVIDIA H100 80GB HBM3"
    _device("A100-40GB", r"\bA100.*40GB", 40, 312, 19.5, 400),  # NVIDIA A100
    _device("A100-80GB", r"\bA100\b", 80, 312, 19.5, 400),  # the same sheet
    _device("L40S", r"\bL40S\b", 48, 362, 91.6, 350),  # NVIDIA L40S
    _device("L4", r"\bL4\b", 24, 121, 30.3, 72),  # NVIDIA L4
    _device("A40", r"\bA40\b", 48, 149.7, 37.4, 300),  # NVIDIA A40
    _device("A10G", r"\bA10G\b", 24, 70, 31.5, 300),  # NVIDIA A10G, as in AWS's G5 instances
    _device("A10", r"\bA10\b", 24, 125, 31.2, 150),  # NVIDIA A10
    _device("RTX-A6000", r"\bRTX A6000\b", 48, 154.8, 38.7, 300),  # NVIDIA Ampere GA102 whitepaper
    _device("V100-16GB", r"\bV100.*16GB", 16, None, 15.7, 300),  # NVIDIA V100: float16 only
    _device("V100-32GB", r"\bV100\b", 32, None, 15.7, 300),  # the same sheet, SXM2
    _device("T4", r"\bT4\b", 16, None, 8.1, 70),  # NVIDIA T4: float16 only
    _device("RTX-4090", r"\bRTX 4090\b(?! (D|Laptop))", 24, 165.2, 82.6, 450),  # NVIDIA Ada whitepaper
    _device("RTX-3090", r"\bRTX 3090\b(?! Ti)", 24, 71, 35.6, 350),  # NVIDIA Ampere GA102 whitepaper
    _device("MI300X", r"\bMI300X\b", 192, 1307.4, 163.4, 750),  # AMD Instinct MI300X
)


def find_accelerator(device_name: str) -> DeviceSheet | None:
    """Finds the accelerator by what `torch.cuda.get_device_name()` calls it; None if it is not in the table."""
    return next((a for a in ACCELERATORS if re.search(a.pattern, device_name, re.IGNORECASE)), None)


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", " ", name).strip().lower()


def named_accelerator(name: str) -> DeviceSheet:
    """Finds an accelerator by a name as people write it: `H100-SXM`, `h100`, `A100 40GB`, `NVIDIA H100 80GB HBM3`.

    The bare name of a product that comes in several forms means the SXM form with the larger memory.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    known = {_plain(accelerator.name): accelerator for accelerator in ACCELERATORS}
    found = known.get(_plain(name)) or find_accelerator(_plain(name))
    if found is not None:
        return found
    close = difflib.get_close_matches(_plain(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {known[close[0]].name}?" if close else ""
    raise ValueError(f"There is no GPU {name!r} in the table.{hint} Known: {', '.join(a.name for a in ACCELERATORS)}.")


def peak_flops(device: "torch.device", precision: str) -> float | None:
    """Returns the peak FLOP/s of a device.

    Args:
        device: the device of the model.
        precision: `bf16`, or `fp32` (also `no`, Accelerate's name for it).

    Returns:
        The data sheet's figure; None for a CPU or a GPU that is not in the table.
    """
    if device.type != "cuda":
        return None
    import torch  # here, so that the table, and with it the help of `flip-hf plan`, needs no torch

    accelerator = find_accelerator(torch.cuda.get_device_name(device))
    return accelerator.peak("bf16" if precision == "bf16" else "fp32") if accelerator else None
