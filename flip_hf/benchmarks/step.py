"""A whole training step: forward, loss, backward, AdamW, at several mask ratios.

- `flip_hf`, as training runs it: PairEncoder, packed texts, masks drawn on the device, the tiled
  loss, the norm of the gradient.
- `open_clip`, as its users run it: texts padded to its context of 77, its PatchDropout, ClipLoss and AdamW.
- `open_clip, strong`: compiled, fused AdamW, masks drawn on the device by timm's PatchDropout, a context of 32.
- `CLIPModel` of Transformers with its own loss and fused AdamW; it has no masks.

A large matrix product takes its turn among them: what the hardware reaches, by which model FLOPs are divided.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from flip_hf import FlipConfig
from flip_hf.benchmarks.candidates import (
    CLIP,
    COMPILED,
    OPEN_CLIP_CONTEXT,
    OURS,
    STRONG,
    make_steps,
    peer_versions,
    wait,
)
from flip_hf.benchmarks.measuring import about, alternate, announce_compilation, spread
from flip_hf.benchmarks.models import CONTEXT, make_inputs, tower_fields
from flip_hf.training.flops import sample_flops

MATRIX = "matrix product"


def matrix_product(options: argparse.Namespace) -> tuple[Callable[[], None], float]:
    """A large matrix product in the step's precision, and its FLOPs: what the hardware reaches."""
    side, times = (8192, 20) if options.device == "cuda" else (2048, 4)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=options.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)
        wait(options.device)

    return run, 2.0 * side**3 * times


def model_flops(result: dict, mask_ratio: float) -> float:
    """FLOPs of a step of flip_hf's model as mathematics needs them, padding left out."""
    text, vision, embed = tower_fields(result["architecture"])
    config = FlipConfig(text_config=text, vision_config=vision, projection_dim=embed)
    batch = result["batch_size"]
    return batch * sample_flops(config, mask_ratio, round(result["caption_tokens"]), batch).training


def memory_returns(device: str) -> int:
    """Times that a GPU's memory was full, and the allocator returned what it had cached: some of a step's time."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if device == "cuda" else 0


def benchmark_step(options: argparse.Namespace) -> dict:
    """The whole training step of every candidate at every mask ratio that it knows."""
    inputs = make_inputs(options.batch_size, options.device)
    product, product_flops = matrix_product(options)
    steps = make_steps(options, inputs)
    pairs = [(name, ratio) for name in steps for ratio in ([0.0] if name == CLIP else options.mask_ratios)]
    if options.compile:
        announce_compilation(len(options.mask_ratios) * len(steps.keys() & {COMPILED, STRONG}))
    runs = {f"{name} {ratio:.0%}": partial(steps[name], ratio) for name, ratio in pairs}
    too_large: set[str] = set()
    warm_up = 5 if options.device == "cuda" else 1
    seconds = alternate({MATRIX: product, **runs}, options.repeats, warm_up, too_large)
    rows = [
        {"candidate": name, "mask_ratio": ratio, "seconds": seconds[label]}
        for (name, ratio), label in zip(pairs, runs, strict=True)
        if seconds[label]
    ]
    if not rows:
        raise ValueError(f"No step of --batch_size {options.batch_size} fits into the device's memory. Lower it.")
    return {
        "question": "step",
        **{name: getattr(options, name) for name in ("architecture", "batch_size", "precision")},
        **inputs.describe(),
        "matrix_flops": product_flops / statistics.median(seconds[MATRIX]),
        "peers": peer_versions(),
        "too_large": sorted(too_large),
        "memory_returns": memory_returns(options.device),
        "rows": rows,
    }


def step_markdown(result: dict) -> str:
    """A table of medians, spread, images per second, and ratios to each candidate at the same mask ratio."""
    medians = {(row["candidate"], row["mask_ratio"]): statistics.median(row["seconds"]) for row in result["rows"]}
    batch = result["batch_size"]
    runs = len(result["rows"][0]["seconds"])
    versions = "".join(f", {name} {number}" for name, number in result["peers"].items())
    left_out = result.get("too_large", ())
    lines = [
        f"Training step, ViT-{result['architecture']}, batch {batch}, {result['precision']}; captions of "
        f"{result['caption_tokens']:g} tokens on average, packed by flip_hf, padded to {OPEN_CLIP_CONTEXT} by "
        f"open_clip, to {CONTEXT} by the strong one, to the longest, {result['text_tokens']}, by CLIPModel. "
        "flip_hf and CLIPModel have the tanh GELU, open_clip the exact one; texts are causal except in flip_hf. A "
        f"large matrix product runs at {result['matrix_flops'] / 1e12:.3g} TFLOP/s{versions}. "
        f"{about(result, runs)}",
        "| candidate | masked | seconds a step (min - max) | images/s | flip_hf is faster by | time / own unmasked "
        "| model FLOPs / matrix product's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = row["candidate"]
        ratio = row["mask_ratio"]
        seconds = row["seconds"]
        median = medians[name, ratio]
        whole = medians.get((name, 0.0))
        ours = medians.get((OURS, ratio))
        faster = f"{median / ours:.2f}x" if ours else "-"
        to_whole = f"{median / whole:.3f}" if whole else "-"
        share = "-"
        if name.startswith(OURS):
            share = f"{model_flops(result, ratio) / median / result['matrix_flops']:.0%}"
        lines.append(
            f"| {name} | {ratio:.0%} | {spread(seconds, '.3f')} | {batch / median:,.1f} "
            f"| {faster} | {to_whole} | {share} |"
        )
    if left_out:
        lines.append(f"\nThe device's memory was too small for: {', '.join(left_out)}.")
    returns = result.get("memory_returns", 0)
    if returns:
        lines.append(f"\nThe device's memory was full, and cached memory returned to it, {returns} times in all turns.")
    return "\n".join(lines) + "\n"
