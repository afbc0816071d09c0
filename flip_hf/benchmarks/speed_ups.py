"""A training step with and without speed-ups (`--speed_ups` of `flip-hf pretrain`), in one run.

Batches are as the loader delivers them: uint8, the visible patches alone, in pinned memory, texts packed. Several
steps follow each other without a wait, as in training, so that launches may overlap with kernels.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import get_args

import torch

from flip_hf.benchmarks.candidates import COMPILED, LEARNING_RATE, OURS, wait
from flip_hf.benchmarks.large_batch import make_micro_batches, prepare
from flip_hf.benchmarks.measuring import about, alternate, announce_compilation
from flip_hf.benchmarks.models import make_flip
from flip_hf.data.processes import make_accelerator
from flip_hf.training.arguments import IMAGE_MEAN, IMAGE_STD, OptimizationArguments
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.patches import Normalize
from flip_hf.training.speed_ups import COMPILED as OF_COMPILED_STEPS
from flip_hf.training.speed_ups import SpeedUp, check_hardware, speed_up
from flip_hf.training.step import Batch, train_step

STEPS_A_TURN = {"cuda": 10, "cpu": 1}


def possible_speed_ups(device: str, dtype: torch.dtype | None = torch.bfloat16, compiled: bool = True) -> list[str]:
    """Lists the speed-ups that can be measured on a device of this machine."""
    found = []
    for name in get_args(SpeedUp):
        try:
            check_hardware([name], torch.device(device), dtype, num_micro=1)
        except ValueError:
            continue
        installed = name != "fp8" or find_spec("torchao") is not None
        if installed and (compiled or name not in OF_COMPILED_STEPS):
            found.append(name)
    return found


class Candidate:
    """A model in training, with some speed-ups.

    Args:
        options: the benchmark's options.
        names: its speed-ups.
        compiled: whether its step is compiled.
    """

    def __init__(self, options: argparse.Namespace, names: Sequence[str], compiled: bool):
        self.names = list(names)
        self.label = ", ".join([COMPILED if compiled else OURS, *names])
        self.plain = COMPILED if compiled else OURS
        self.device = options.device
        model = make_flip(options.architecture).train()
        speed_up(model, names)
        encoder = PairEncoder(model, torch.bfloat16 if options.precision == "bf16" else None)
        self.distribution = Distribution(
            make_accelerator(mixed_precision="no", cpu=options.device == "cpu"),
            encoder,
            partial(make_optimizer, options=OptimizationArguments()),
            max_grad_norm=None,
            compiler="inductor" if compiled else None,
            cuda_graphs="cuda_graphs" in names,
        )
        self.normalize = Normalize(IMAGE_MEAN, IMAGE_STD).to(options.device)

    def steps(self, batch: Batch) -> None:
        """Takes the steps of a turn on a batch, and waits for the device once."""
        norms = [self._step(batch) for _ in range(STEPS_A_TURN[self.device])]
        wait(self.device)
        assert all(math.isfinite(norm) for norm in norms)

    def _step(self, batch: Batch) -> torch.Tensor:
        result = train_step(
            self.distribution,
            [batch],
            lambda batch: prepare(batch, self.normalize, self.device),
            learning_rate=LEARNING_RATE,
            reconstruction_weight=1.0,
        )
        return result.grad_norm


def make_candidates(options: argparse.Namespace, names: Sequence[str]) -> list[Candidate]:
    """Makes models without and with these speed-ups, and both compiled where that is asked for.

    Raises:
        ValueError: a speed-up cannot be had on this device, or without `--compile`.
    """
    dtype = torch.bfloat16 if options.precision == "bf16" else None
    check_hardware(names, torch.device(options.device), dtype, num_micro=1)
    eager = [name for name in names if name not in OF_COMPILED_STEPS]
    if not options.compile and len(eager) < len(names):
        raise ValueError(f"--speed_ups {' '.join(names)}: {' and '.join(OF_COMPILED_STEPS)} need --compile.")
    made = [Candidate(options, (), compiled=False)]
    made += [Candidate(options, eager, compiled=False)] if eager else []
    if options.compile:
        announce_compilation(2 * len(options.mask_ratios))
        made += [Candidate(options, chosen, compiled=True) for chosen in ((), names)]
    return made


def copy_seconds(batch: Batch, device: str, repeats: int) -> list[float]:
    """Measures what a stream of its own for copies could hide: the time to move a batch to a GPU."""

    def copy() -> None:
        for value in batch.values():
            value.to(device, non_blocking=True)
        wait(device)

    return alternate({"copy": copy}, repeats)["copy"] if device == "cuda" else []


def benchmark_speed_ups(options: argparse.Namespace) -> dict:
    """Measures seconds a step of each candidate at each mask ratio."""
    dtype = torch.bfloat16 if options.precision == "bf16" else None
    names = options.speed_ups or possible_speed_ups(options.device, dtype, options.compile)
    candidates = make_candidates(options, names)
    config = candidates[0].distribution.whole_encoder().flip.config
    whole = argparse.Namespace(**{**vars(options), "micro_batch_size": options.batch_size})
    steps = STEPS_A_TURN[options.device]
    rows = []
    copies = {}
    for ratio in options.mask_ratios:
        (batch,) = make_micro_batches(whole, config, ratio)
        runs: dict[str, Callable[[], None]] = {each.label: partial(each.steps, batch) for each in candidates}
        seconds = alternate(runs, options.repeats, warm_up=2 if options.device == "cuda" else 1)
        copies[str(ratio)] = copy_seconds(batch, options.device, options.repeats)
        rows += [
            {
                **{"candidate": each.label, "plain": each.plain, "speed_ups": each.names, "mask_ratio": ratio},
                "seconds": [turn / steps for turn in seconds[each.label]],
            }
            for each in candidates
        ]
    return {
        "question": "speed-ups",
        **{name: getattr(options, name) for name in ("architecture", "batch_size", "precision")},
        **{"steps_a_turn": steps, "copy_seconds": copies, "rows": rows},
    }


def speed_ups_markdown(result: dict) -> str:
    """A table of medians and spread, and the ratio of each candidate's to those of the same step without speed-ups."""
    seconds = {(row["candidate"], row["mask_ratio"]): row["seconds"] for row in result["rows"]}
    batch = result["batch_size"]
    runs = len(result["rows"][0]["seconds"])
    lines = [
        f"Training step with and without speed-ups, ViT-{result['architecture']}, batch {batch}, "
        f"{result['precision']}; steps in a turn: {result['steps_a_turn']}. {about(result, runs)}",
        "| candidate | masked | seconds a step (min - max) | images/s | time / the same without (min - max of turns) |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = row["seconds"]
        median = statistics.median(times)
        turns = [ours / theirs for ours, theirs in zip(times, seconds[row["plain"], row["mask_ratio"]], strict=True)]
        ratio = f"{statistics.median(turns):.3f} ({min(turns):.3f} - {max(turns):.3f})" if row["speed_ups"] else "-"
        lines.append(
            f"| {row['candidate']} | {row['mask_ratio']:.0%} | {median:.4f} ({min(times):.4f} - {max(times):.4f}) "
            f"| {batch / median:,.1f} | {ratio} |"
        )
    for ratio, copies in result["copy_seconds"].items():
        if copies:
            share = statistics.median(copies) / statistics.median(seconds[OURS, float(ratio)])
            lines.append(f"\nMoving a batch to the device at {float(ratio):.0%}: {share:.2%} of a step of {OURS}.")
    return "\n".join(lines) + "\n"
