"""Batches of images with their targets for evaluation: one pass, in order."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.reading import Reader, epoch_shards, read_rows
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.sources import Source


class EvalStream(IterableDataset):
    """One pass over a data set in batches `{"images", "targets", "places", "refused"}`; the last may be smaller.

    `images` (B, ...) are stacked; `targets` is a list of B; `places` are (shard, row) pairs, which sort into the data
    set's own order; `refused` counts the samples refused since the previous batch, by reason.

    Args:
        source: the data.
        transform: maps an image to the tensor that the model takes.
        read_target: maps a value of the source's `target_column` to a target, or raises [`RefusedSample`]; see
            `targets.py`.
        batch_size: samples per batch.
        process: this process among all.
        background: colour of transparent parts.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], torch.Tensor],
        read_target: Callable[[object], object],
        *,
        batch_size: int,
        process: Reader,
        background: Colour = WHITE,
    ):
        self.source = source
        self.transform = transform
        self.read_target = read_target
        self.batch_size = batch_size
        self.process = process
        self.background = background

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        reader = Reader(self.process.index * workers + worker, self.process.count * workers)
        order, _ = epoch_shards(self.source.shards.num_shards, reader, 0, None)
        refused: Counter[str] = Counter()
        samples: list[tuple[torch.Tensor, object, tuple[int, int]]] = []
        rows = read_rows(
            self.source.shards, reader, epoch=0, seed=None, report=lambda reason, detail: refused.update([reason])
        )
        for (nth, index), row in rows:
            try:
                target = self.read_target(self.source.target(row))
                image = self.transform(decode_image(self.source.image(row), self.background))
                samples.append((image, target, (order[nth], index)))
            except RefusedSample as error:
                refused[error.reason] += 1
            if len(samples) == self.batch_size:
                yield _batch(samples, refused)
                samples = []
                refused.clear()
        if samples or refused:
            yield _batch(samples, refused)


def _batch(samples: list[tuple[torch.Tensor, object, tuple[int, int]]], refused: Counter[str]) -> dict[str, Any]:
    images, targets, places = (list(values) for values in zip(*samples, strict=True)) if samples else ([], [], [])
    stacked = torch.stack(images) if images else torch.empty(0)
    return {"images": stacked, "targets": targets, "places": places, "refused": dict(refused)}
