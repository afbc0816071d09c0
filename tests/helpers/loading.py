"""A loader whose batches say which sample they hold, and in which epoch it was read."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch

from flip_hf.data.loader import TrainLoader
from flip_hf.data.reading import Reader
from flip_hf.data.sources import open_source
from flip_hf.data.stream import PatchPlan, TrainStream, View
from flip_hf.data.transforms import TrainTransform
from flip_hf.modeling.masking_flip import cut_patches, draw_mask
from flip_hf.training.edges import draw_gumbel, keep_edges

ALONE = Reader(0, 1)
PATCH_SIZE = 8


def tokenize(captions: list[str], *_of_view) -> dict[str, torch.Tensor]:
    """The sample's number, which its caption begins with."""
    return {"input_ids": torch.tensor([[int(caption[:5])] for caption in captions])}


def half_masked(samples: int, image_size: int = 32) -> View:
    """Half of the patches, each batch its own."""
    grid = (image_size // PATCH_SIZE,) * 2
    return View(image_size, lambda size: draw_mask("random", size, grid, 0.5, "cpu"))


def by_edges(samples: int) -> View:
    """Half of the patches, those with edges more often, and the more the later: from a strength of 1 to 3."""
    strength = 1 + min(2.0, samples / 100)
    choose = partial(keep_edges, patch_size=PATCH_SIZE, kept=8, strength=strength)
    return View(32, partial(draw_gumbel, num_patches=16), choose)


def make_train_loader(
    *folders,
    workers=0,
    process=ALONE,
    block=16,
    states=None,
    batch_size=8,
    seed=5,
    view_at=half_masked,
    num_micro=1,
    block_bytes=None,
    **options,
) -> TrainLoader:
    kind = options.pop("kind", "caption")
    holdout = options.pop("holdout", 0.0)
    cut = partial(cut_patches, patch_size=PATCH_SIZE)
    stream = TrainStream(
        [replace(open_source(str(folder), kind=kind), holdout=holdout) for folder in folders],
        PatchPlan(TrainTransform(), cut, view_at, num_micro),
        tokenize if kind == "caption" else None,
        batch_size=batch_size,
        process=process,
        seed=seed,
        shuffle_block=block,
        **options,
    )
    stream.block_bytes = block_bytes or stream.block_bytes
    return TrainLoader(stream, num_workers=workers, pin_memory=False, states=states)


def numbers(batches: Iterable[dict]) -> list[int]:
    return [n for batch in batches for n in batch["input_ids"].flatten().tolist()]


def current_epochs(loader: TrainLoader, source: int = 0) -> list[int]:
    """The epoch of each worker's last sample of a source; -1 before the first."""
    positions = [worker["sources"][source] for worker in loader.state_dict()["workers"]]
    return [position[1][2] if len(position) > 1 else -1 for position in positions]


def samples_by_epoch(loader: TrainLoader) -> Iterator[tuple[int, int]]:
    """(epoch, number) of every sample of a loader with one source and batches of one."""
    for batch in loader:
        worker = (loader.state_dict()["next_worker"] - 1) % len(loader.state_dict()["workers"])
        yield current_epochs(loader)[worker], batch["input_ids"].item()


def saved(loaders: list[TrainLoader]) -> list[dict]:
    """The states of all processes, as they come back from a file."""
    return json.loads(json.dumps([loader.state_dict() for loader in loaders]))


def refused(loader) -> dict[str, int]:
    return dict(sum(map(Counter, loader.counts["refused"].values()), Counter()))
