"""Samples a second of one worker process, from tar shards to batches in the main process.

Every candidate reads the same shards with one worker; the main process takes batches and does nothing else. The workers
of all candidates live at once and those whose turn it is not wait, their queues full, so each turn first takes what was
prepared before it. The peer is open_clip's own pipeline, called through its `get_wds_dataset`, where it is installed
with what it needs (`open_clip_torch[training]`: its code does not run with webdataset 1.0). Masks by edges, for which
the worker looks at the pixels, are compared with random masks of the same ratio, turn by turn.
"""

import argparse
import io
import itertools
import statistics
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from flip_hf.benchmarks.loader_profile import shares_markdown, shares_of_time
from flip_hf.benchmarks.measuring import about
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.training import inputs, models
from flip_hf.training.recipes import RECIPES, parse_arguments

PEER = "open_clip"
FLIP_CROP = (0.5, 1.0)
CROPS = {(0.9, 1.0): "open_clip's crops", FLIP_CROP: "FLIP's crops"}
BY_EDGES = ", by edges"
PACKAGES = ("open_clip_torch", "webdataset", "torchvision", "pillow", "simplejpeg")
SIZES = ((640, 480), (480, 640), (480, 480), (720, 480))
SHARDS = 2
PER_SHARD = 1536
DISTINCT = 96
QUALITY = 90
PROFILED = 1024  # samples, of several blocks, since a block is read at once
QUEUED = 4  # batches that a worker may have ready or begun: DataLoader's two, and what it works on
WORDS = (
    "a the of in on with and at by photo picture view house street old new red blue green white black small large man "
    "woman dog cat car city beach mountain river forest garden table kitchen room window door light night day summer "
    "winter vintage modern design art print poster dress shoes watch phone case wedding birthday party food recipe "
    "cake chocolate coffee bottle wine flower rose tree sunset sky cloud stock vector illustration background isolated"
).split()


# -- shards ------------------------------------------------------------------------------------------------------------


def natural_image(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Smooth noise of seven octaves, as rough as photographs are: each octave a bit weaker, colour less than light."""

    def noise() -> np.ndarray:
        total = np.zeros((height, width), np.float32)
        for octave in range(7):
            cells = rng.standard_normal((4 * 2**octave, 4 * 2**octave * width // height), np.float32)
            layer = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
            total += 0.72**octave * np.asarray(layer)
        return total / total.std()

    light, *colours = noise(), noise(), noise(), noise()
    pixels = np.stack([128 + 45 * light + 14 * colour for colour in colours], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def caption(rng: np.random.Generator) -> str:
    """Eight to thirty words, sixteen on average."""
    return " ".join(rng.choice(WORDS, min(30, 8 + int(rng.exponential(9)))))


def write_shards(folder: Path, shards: int = SHARDS) -> float:
    """Writes tar shards and a tokenizer for their captions; returns the mean size of an image in bytes."""
    rng = np.random.default_rng(0)
    images = []
    for width, height in itertools.islice(itertools.cycle(SIZES), DISTINCT):
        buffer = io.BytesIO()
        natural_image(width, height, rng).save(buffer, "JPEG", quality=QUALITY)
        images.append(buffer.getvalue())
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(PER_SHARD):
                members = {"jpg": images[number % DISTINCT], "txt": caption(rng).encode()}
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{shard:02d}{number:06d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    train_wordpiece((caption(rng) for _ in range(1000)), context_length=32).save_pretrained(folder / "tokenizer")
    return statistics.mean(map(len, images))


# -- candidates --------------------------------------------------------------------------------------------------------


def our_batches(
    folder: Path,
    batch_size: int,
    mask_ratio: float,
    crop_area: tuple[float, float],
    strategy: str = "random",
    workers: int = 1,
) -> Iterator[Any]:
    """Makes the loader that `flip-hf pretrain` trains on."""
    argv = ["--train_data", f"{folder}/*.tar", "--tokenizer", str(folder / "tokenizer")]
    argv += ["--num_workers", str(workers)]
    argv += ["--mask_ratio", str(mask_ratio), "--crop_area", *map(str, crop_area), "--batch_size", str(batch_size)]
    argv += ["--mask_strategy", strategy, "--shuffle_block", "256"]  # so that every turn reads as much as it uses
    arguments = parse_arguments(argv, RECIPES, "vit_b16")
    config = models.make_config(arguments.model)
    config._attn_implementation = "sdpa"  # as a model sets it; texts are packed then
    sources = inputs.open_training_data(arguments.data)
    tokenizer = models.make_tokenizer(arguments, sources, config.get_text_config().max_position_embeddings)
    loader = inputs.make_train_loader(
        arguments, sources, tokenizer, Accelerator(cpu=True), config, (batch_size, 1), None
    )
    return iter(loader)


def our_candidates(folder: Path, batch_size: int, mask_ratios: list[float]) -> dict[str, Iterator[Any]]:
    """Makes our loaders at all ratios and crops; with FLIP's crops also masks by edges, each after its random ones."""
    candidates = {}
    for crop_area, crops in CROPS.items():
        for ratio in mask_ratios:
            name = _name(ratio, crops)
            candidates[name] = our_batches(folder, batch_size, ratio, crop_area)
            if ratio > 0 and crop_area == FLIP_CROP:
                candidates[name + BY_EDGES] = our_batches(folder, batch_size, ratio, crop_area, "edges")
    return candidates


def _name(mask_ratio: float, crops: str) -> str:
    return f"flip_hf {mask_ratio:.0%} masked, {crops}"


def open_clip_batches(folder: Path, batch_size: int) -> Iterator[Any]:
    """Makes the loader that open_clip trains a ViT-B-16 on, with its defaults."""
    import open_clip  # pyright: ignore[reportMissingImports]
    from open_clip_train.data import get_wds_dataset  # pyright: ignore[reportMissingImports]

    options = Namespace(
        train_data=str(folder / f"{{00000..{SHARDS - 1:05d}}}.tar"),
        **{"train_num_samples": 10**9, "train_data_upsampling_factors": None, "dataset_resampled": False, "seed": 0},
        **{"batch_size": batch_size, "workers": 1, "world_size": 1},
    )
    preprocess = open_clip.image_transform(224, is_train=True)
    data = get_wds_dataset(options, preprocess, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-16"))
    return iter(data.dataloader)


def rate(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    """Samples a second over at least so many seconds, after what had been prepared before."""
    for _ in range(QUEUED):
        next(batches)
    start = time.perf_counter()
    taken = 0
    while time.perf_counter() - start < seconds:
        next(batches)
        taken += batch_size
    measured = taken / (time.perf_counter() - start)
    time.sleep(QUEUED * batch_size / measured)  # until the queue is full again: the next candidate has the processor
    return measured


def benchmark_loader(options: argparse.Namespace) -> dict:
    """One worker of ours at several ratios and crops against open_clip's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch_size = options.batch_size
        image_bytes = write_shards(folder)
        has_peer = find_spec("open_clip_train") and find_spec("webdataset")
        candidates = {PEER: open_clip_batches(folder, batch_size)} if has_peer else {}
        candidates |= our_candidates(folder, batch_size, options.mask_ratios)
        rates: dict[str, list[float]] = {candidate: [] for candidate in candidates}
        with tqdm(total=(options.repeats + 1) * len(candidates), unit="turn", file=sys.stderr) as bar:
            for turn in range(options.repeats + 1):
                for candidate, batches in candidates.items():
                    bar.set_description(candidate)
                    measured = rate(batches, batch_size, options.seconds)
                    if turn > 0:  # the first fills caches and shuffle buffers
                        rates[candidate].append(measured)
                    bar.update()
        candidates.clear()
        ratio = max(options.mask_ratios)
        shares = shares_of_time(
            our_batches(folder, batch_size, ratio, FLIP_CROP, workers=0), -(-PROFILED // batch_size)
        )
    return {
        "question": "loader",
        "batch_size": batch_size,
        "repeats": options.repeats,
        "image_bytes": round(image_bytes),
        "versions": {name: version(name) for name in PACKAGES if _is_installed(name)},
        "samples_per_second": rates,
        "profiled": _name(ratio, CROPS[FLIP_CROP]),
        "shares": shares,
    }


def _is_installed(package: str) -> bool:
    return find_spec({"open_clip_torch": "open_clip", "pillow": "PIL"}.get(package, package)) is not None


def loader_markdown(result: dict) -> str:
    """Tables of medians, spread and ratios to open_clip, of edges to random masks, and of shares of the time."""
    medians = {name: statistics.median(values) for name, values in result["samples_per_second"].items()}
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"Samples a second of one worker process, JPEGs of quality {QUALITY} with a short side of 480 pixels "
        f"(synthetic, {result['image_bytes'] / 1000:.0f} kB on average), tar shards, batches of "
        f"{result['batch_size']}, 224 pixels, bicubic; {versions}. open_clip crops 0.9 to 1 of the area, "
        "FLIP 0.5 to 1; flip_hf also mirrors. "
        f"{about(result, result['repeats'])}",
        "| candidate | samples/s (min - max) | times open_clip's | times random masks' (min - max) |",
        "|---|---|---|---|",
    ]
    for name, values in result["samples_per_second"].items():
        ratio = f"{medians[name] / medians[PEER]:.2f}" if PEER in medians else "-"
        random = result["samples_per_second"].get(name.removesuffix(BY_EDGES), values)
        by_turn = [value / other for value, other in zip(values, random, strict=True)]
        turns = f"{statistics.median(by_turn):.3f} ({min(by_turn):.3f} - {max(by_turn):.3f})"
        lines.append(
            f"| {name} | {medians[name]:.0f} ({min(values):.0f} - {max(values):.0f}) | {ratio} | "
            f"{turns if name.endswith(BY_EDGES) else '-'} |"
        )
    shares = shares_markdown(result["shares"], result["profiled"]) if "shares" in result else ""
    return "\n".join(lines) + "\n" + ("\n" + shares if shares else "")
