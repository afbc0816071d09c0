"""Time and peak memory of the contrastive loss and its gradient over the number of pairs, on one process.

Every measurement is a fresh process, so that no candidate finds memory that another left, and candidates take turns.
Peak memory is what the loss and its gradient add to the inputs and the libraries: the high-water mark of the resident
set on a CPU, of torch's allocator on a GPU.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional
from tqdm import tqdm

from flip_hf.benchmarks.measuring import about, spread
from flip_hf.losses import contrastive_loss

EMBEDDING = 512  # of a ViT-B
MIN_SECONDS = 0.5  # a measurement repeats its calls for so long
DENSE = "dense"
# N x N float32 matrices that live together at the peak of the candidates that hold any.
MATRICES = {DENSE: 4, "open_clip ClipLoss": 5}

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The loss as a user writes it."""
    logits = scale * images @ texts.T  # (N, N)
    labels = torch.arange(len(images), device=images.device)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def tiled_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, *, tile_size: int) -> torch.Tensor:
    """flip_hf's."""
    return contrastive_loss(images, texts, scale, tile_size=tile_size)[0]


def make_loss(name: str) -> Loss:
    """The candidate of this name."""
    if name == DENSE:
        return dense_loss
    if name.startswith("open_clip"):
        from open_clip.loss import ClipLoss  # pyright: ignore[reportMissingImports]

        return ClipLoss()
    return partial(tiled_loss, tile_size=int(name.rsplit(" ", 1)[1]))


def names_of(tile_sizes: list[int], peers: Sequence[str]) -> list[str]:
    """The candidates, open_clip's where it is among the peers."""
    peers = [DENSE, "open_clip ClipLoss"] if "open_clip" in peers else [DENSE]
    return [*(f"flip_hf, tiles of {size}" for size in tile_sizes), *peers]


def peak_bytes(device: str) -> int:
    """The most memory this process has held."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands the parent's ru_maxrss on to its children
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_bytes(device: str) -> int:
    """The memory this process holds now."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def measure(name: str, pairs: int, device: str) -> tuple[float, int] | None:
    """Seconds of the loss and its gradient, and the peak bytes they add; None where a GPU's memory is too small.

    The first call is a warm-up, unless one call takes long enough on a CPU.
    """
    loss = make_loss(name)
    generator = torch.Generator(device).manual_seed(0)
    scale = torch.tensor([100.0], device=device, requires_grad=True)

    def make_inputs(count: int) -> list[torch.Tensor]:
        features = [torch.randn(count, EMBEDDING, generator=generator, device=device) for _ in range(2)]
        return [feature.requires_grad_() for feature in features]

    def call(features: list[torch.Tensor]) -> float:
        start = time.perf_counter()
        images, texts = (functional.normalize(feature, dim=1) for feature in features)
        torch.autograd.grad(loss(images, texts, scale), [*features, scale])
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    call(make_inputs(8))  # libraries are loaded, threads started
    inputs = make_inputs(pairs)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = held_bytes(device)
    seconds = []
    try:
        while sum(seconds) < MIN_SECONDS or (device == "cuda" and len(seconds) < 3):
            seconds.append(call(inputs))
    except torch.OutOfMemoryError:
        return None
    return statistics.median(seconds[1:] or seconds), peak_bytes(device) - before


def measure_alone(name: str, pairs: int, device: str) -> tuple[float, int] | None:
    """`measure` in a new process; None where the machine's memory is too small, before anything is killed for it."""
    needed = 4 * pairs**2 * MATRICES.get(name, 0)
    if device == "cpu" and needed > 0.9 * psutil.virtual_memory().available:
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flip_hf.losses", "transformers.pipelines"])  # seconds each time otherwise
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, name, pairs, device).result()
        except BrokenProcessPool:
            return None


def benchmark_loss(options: argparse.Namespace) -> dict:
    """The tiled loss against the dense one, and open_clip's where it is a peer."""
    names = names_of(options.tile_sizes, options.peers)
    points: list[dict[str, Any]] = [
        {"pairs": pairs, "candidate": name, "seconds": [], "peak_bytes": []}
        for pairs in options.pairs
        for name in names
    ]
    with tqdm(total=options.repeats * len(points), unit="process", file=sys.stderr) as bar:
        for _ in range(options.repeats):
            for point in points:
                bar.set_description(f"{point['candidate']}, {point['pairs']:,} pairs")
                measured = measure_alone(point["candidate"], point["pairs"], options.device)
                if measured is not None:
                    point["seconds"].append(measured[0])
                    point["peak_bytes"].append(measured[1])
                bar.update()
    return {"question": "loss", "embedding": EMBEDDING, "repeats": options.repeats, "points": points}


def loss_markdown(result: dict) -> str:
    """A table of seconds, peak memory, and their ratios to the dense loss of as many pairs."""
    lines = [
        f"Contrastive loss and its gradient, float32, embeddings of {result['embedding']}, one process; every "
        f"measurement in a fresh process. {about(result, result['repeats'])}",
        "| pairs | candidate | milliseconds (min - max) | peak MiB | time / dense | memory / dense |",
        "|---|---|---|---|---|---|",
    ]
    dense = {point["pairs"]: point for point in result["points"] if point["candidate"] == DENSE}
    for point in result["points"]:
        start = f"| {point['pairs']:,} | {point['candidate']} |"
        if not point["seconds"]:
            lines.append(f"{start} not measured: too little memory | | | |")
            continue
        peak = statistics.median(point["peak_bytes"]) / 2**20
        row = [
            f"{start} {spread([1000 * each for each in point['seconds']], ',.1f')}",
            f"{peak:,.0f}",
            *ratios(point, dense),
        ]
        lines.append(" | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def ratios(point: dict, dense: dict[int, dict]) -> list[str]:
    """Time and memory as ratios to the dense loss, where that was measured."""
    peer = dense[point["pairs"]]
    if not peer["seconds"]:
        return ["-", "-"]
    return [
        f"{statistics.median(point[of]) / max(statistics.median(peer[of]), 1e-9):.3f}"
        for of in ("seconds", "peak_bytes")
    ]
