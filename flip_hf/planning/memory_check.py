"""The planned memory against that of a real step, each configuration in a separate process.

On CUDA the measure is `torch.cuda.max_memory_allocated`. On a CPU it is the peak resident memory above that from before
the model was made, with glibc configured to return freed memory at once. Neither includes the plan's `other`, so the
planned figure leaves it out too.
"""

import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from flip_hf.console.json_types import JsonObject
from flip_hf.modeling import FlipConfig
from flip_hf.planning.memory import TracedStep, make_micro_batch, make_trained_model, run_backward
from flip_hf.planning.plan import MemoryModel, PlannedRun
from flip_hf.training.hardware import device_name

# One arena, and no freed block kept: resident memory then follows the tensors.
GLIBC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Small enough for a machine with 8 GB, and in float32: many CPUs only emulate bfloat16. The GPU's steps have realistic
# sizes.
CPU_STEPS = (
    TracedStep(16, mask_ratio=0.0, bf16=False),
    TracedStep(16, num_micro=2, mask_ratio=0.75, bf16=False, checkpointing=True),
    TracedStep(24, mask_ratio=0.5, bf16=False),
)
CUDA_STEPS = (
    TracedStep(128, mask_ratio=0.0),
    TracedStep(512, num_micro=2, mask_ratio=0.75, checkpointing=True),
    TracedStep(256, mask_ratio=0.5),
)


def planned_bytes(config: FlipConfig, step: TracedStep) -> float:
    """Returns the plan's figure for one process, tensors only."""
    run = PlannedRun(config, step.micro_batch_size * step.num_micro, None, step.text_tokens, step.bf16)
    parts = MemoryModel(run).parts("DDP", 1, step.micro_batch_size, step.mask_ratio, step.checkpointing, other=False)
    return sum(parts.values())


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _two_steps(config: FlipConfig, step: TracedStep, device: torch.device) -> None:
    """Runs two whole steps: from the second on, the optimizer's states exist beside the activations."""
    with device:
        model = make_trained_model(config, step, "sdpa")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        for _ in range(2):
            run_backward(model, step, lambda: make_micro_batch(config, step))
            optimizer.step()
            optimizer.zero_grad()


def _small(config: FlipConfig) -> FlipConfig:
    """Shrinks a model to one narrow block per tower, to load kernels and libraries before memory is measured."""
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    return FlipConfig(text_config=size, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16)


def measured_bytes(config: FlipConfig, step: TracedStep, device: torch.device) -> int:
    """Measures the peak memory of two real steps in this process, which should do nothing else."""
    _two_steps(_small(config), replace(step, micro_batch_size=2), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _two_steps(config, step, device)
        return torch.cuda.max_memory_allocated() - before
    before = _resident()
    _two_steps(config, step, device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before


def measure(config: FlipConfig, step: TracedStep, device: str) -> int:
    """Calls [`measured_bytes`] in a fresh process.

    Raises:
        RuntimeError: the process failed, for example out of memory; the message has its last lines.
    """
    order = json.dumps({"config": config.to_dict(), "step": asdict(step), "device": device})
    command = [sys.executable, "-m", "flip_hf.planning.memory_check"]
    done = subprocess.run(command, input=order, capture_output=True, text=True, env={**os.environ, **GLIBC})
    if done.returncode != 0:
        raise RuntimeError(f"The measurement of {step} failed ({done.returncode}): {done.stderr[-500:]}")
    return int(done.stdout.split()[-1])


def check_memory(command: str) -> JsonObject:
    """Compares the plan's memory with that of real steps of ViT-B/16, in three configurations, on the device at hand.

    Args:
        command: the command that asks for it, for the report.

    Returns:
        The report, JSON-serialisable; `rows` has a configuration each, in bytes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[JsonObject] = []
    for step in tqdm(CUDA_STEPS if device == "cuda" else CPU_STEPS, unit="configuration", file=sys.stderr):
        planned = planned_bytes(FlipConfig(), step)
        measured = measure(FlipConfig(), step, device)
        rows.append({**vars(step), "planned": planned, "measured": measured, "deviation": planned / measured - 1})
    return {
        "command": command,
        **{"hardware": device_name(device), "python": platform.python_version()},
        **{"torch": torch.__version__, "transformers": transformers.__version__},
        "measure": "torch.cuda.max_memory_allocated" if device == "cuda" else "highest resident memory (ru_maxrss)",
        "rows": rows,
    }


def check_markdown(report: JsonObject) -> str:
    """Renders the report of [`check_memory`] as a Markdown page."""
    lines = [
        f"Memory of a training step of ViT-B/16, planned and measured. {report['hardware']}; torch {report['torch']}, "
        f"transformers {report['transformers']}; measure: {report['measure']}, of two steps, above what lay there "
        "before.\n\n"
        f"`{report['command']}`\n",
        "| mask | micro-batch | precision | checkpointing | planned, MB | measured, MB | planned / measured - 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['mask_ratio']:.0%} | {row['num_micro']} x {row['micro_batch_size']} "
            f"| {'bf16' if row['bf16'] else 'fp32'} | {'yes' if row['checkpointing'] else 'no'} "
            f"| {row['planned'] / 1e6:,.0f} | {row['measured'] / 1e6:,.0f} | {row['deviation']:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads a step to measure from stdin and prints its bytes."""
    order = json.load(sys.stdin)
    device = torch.device(order["device"])
    print(measured_bytes(FlipConfig.from_dict(order["config"]), TracedStep(**order["step"]), device))


if __name__ == "__main__":
    main()
