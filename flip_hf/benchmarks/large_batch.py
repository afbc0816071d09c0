"""A contrastive batch that is encoded in pieces, on one device: steps by gradient caching, as training takes them.

Every pair is encoded twice, without and with a graph, and all pairs are contrasted with each other. Patches come as
from the loader: uint8, the visible ones alone, in main memory; a piece is moved to the device when it is encoded.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch

from flip_hf.benchmarks.candidates import LEARNING_RATE, wait
from flip_hf.benchmarks.loss import held_bytes, peak_bytes
from flip_hf.benchmarks.measuring import about, alternate, spread
from flip_hf.benchmarks.models import make_flip, make_inputs
from flip_hf.data.processes import make_accelerator
from flip_hf.modeling.masking_flip import draw_mask
from flip_hf.planning.memory import TracedStep
from flip_hf.planning.memory_check import planned_bytes
from flip_hf.training.arguments import IMAGE_MEAN, IMAGE_STD, OptimizationArguments
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.packing import pack_texts
from flip_hf.training.patches import Normalize
from flip_hf.training.step import Batch, Inputs, train_step

DISTINCT = 8  # micro-batches that are made; the batch repeats them


def make_micro_batches(options: argparse.Namespace, config: Any, mask_ratio: float) -> list[Batch]:
    """Makes the batch in pieces of `--micro_batch_size`, in main memory, as the loader delivers them."""
    size = options.micro_batch_size
    side = config.vision_config.image_size // config.vision_config.patch_size
    pixels = 3 * config.vision_config.patch_size**2
    pieces = options.batch_size // size
    made = []
    for _ in range(min(DISTINCT, pieces)):
        texts = make_inputs(size, "cpu")
        ids_keep = draw_mask("random", size, (side, side), mask_ratio, "cpu")
        patches = torch.randint(0, 256, (*ids_keep.shape, pixels), dtype=torch.uint8)
        packed = pack_texts(texts.input_ids, texts.attention_mask, config.get_text_config())
        batch = {"patches": patches, "ids_keep": ids_keep, **packed}
        made.append({name: value.pin_memory() if options.device == "cuda" else value for name, value in batch.items()})
    return [made[i % len(made)] for i in range(pieces)]


def prepare(batch: Batch, normalize: Normalize, device: str) -> Inputs:
    """Moves a micro-batch to the device and normalises its patches there."""
    inputs: Inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    inputs["patches"] = normalize(inputs["patches"])
    return inputs


def benchmark_large_batch(options: argparse.Namespace) -> dict:
    """Measures seconds and peak memory of steps at each mask ratio, beside the memory that `flip-hf plan` expects."""
    if options.batch_size % options.micro_batch_size:
        raise ValueError(
            f"--batch_size {options.batch_size} is not a multiple of --micro_batch_size; change one of them."
        )
    accelerator = make_accelerator(cpu=options.device == "cpu")
    is_bf16 = options.precision == "bf16"
    before = held_bytes(options.device)
    encoder = PairEncoder(make_flip(options.architecture).train(), torch.bfloat16 if is_bf16 else None)
    make = partial(make_optimizer, options=OptimizationArguments())
    distribution = Distribution(accelerator, encoder, make, max_grad_norm=None)
    normalize = Normalize(IMAGE_MEAN, IMAGE_STD).to(options.device)
    rows = []
    for ratio in options.mask_ratios:
        batches = make_micro_batches(options, encoder.flip.config, ratio)

        def step(batches: list[Batch] = batches) -> None:
            moved = partial(prepare, normalize=normalize, device=options.device)
            train_step(distribution, batches, moved, learning_rate=LEARNING_RATE, reconstruction_weight=1.0)
            wait(options.device)

        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = alternate({f"{ratio:.0%}": step}, options.repeats)[f"{ratio:.0%}"]
        traced = TracedStep(options.micro_batch_size, num_micro=len(batches), mask_ratio=ratio, bf16=is_bf16)
        peak = peak_bytes(options.device) - before
        planned = planned_bytes(encoder.flip.config, traced)
        rows.append({"mask_ratio": ratio, "seconds": seconds, "peak_bytes": peak, "planned_bytes": planned})
    sizes = {name: getattr(options, name) for name in ("architecture", "batch_size", "micro_batch_size", "precision")}
    return {"question": "large-batch", **sizes, "repeats": options.repeats, "rows": rows}


def large_batch_markdown(result: dict) -> str:
    """A table of seconds a step, pairs a second, and measured and planned memory."""
    lines = [
        f"A step of {result['batch_size']:,} pairs in pieces of {result['micro_batch_size']:,}, "
        f"ViT-{result['architecture']}, {result['precision']}, on one device; the memory of a CPU includes libraries "
        f"and data. {about(result, result['repeats'])}",
        "| masked | seconds a step (min - max) | pairs/s | peak memory, GiB | planned, GiB | planned / measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        seconds = row["seconds"]
        median = statistics.median(seconds)
        peak = row["peak_bytes"]
        planned = row["planned_bytes"]
        lines.append(
            f"| {row['mask_ratio']:.0%} | {spread(seconds, '.3f')} "
            f"| {result['batch_size'] / median:,.1f} | {peak / 2**30:.2f} | {planned / 2**30:.2f} "
            f"| {planned / peak:.2f} |"
        )
    return "\n".join(lines) + "\n"
