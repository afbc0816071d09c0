"""Batches of labelled images for evaluation: one pass, in order."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.reading import Reader, read_rows
from flip_hf.data.sources import Source


class EvalStream(IterableDataset):
    """One pass over a labelled data set: `{"patches", "labels", "refused"}`, the last batch may be smaller.

    Args:
        source: where rows come from; `target_column` holds class indices or names.
        transform: image to a uint8 tensor (3, S, S).
        cut: images (B, 3, S, S) to all their patches (B, L, 3 * P * P).
        class_names: the classes, in the order of the indices.
        batch_size: samples a batch.
        process: this process among all.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], torch.Tensor],
        cut: Callable[[torch.Tensor], torch.Tensor],
        class_names: tuple[str, ...],
        *,
        batch_size: int,
        process: Reader,
    ):
        self.source, self.transform, self.cut, self.class_names = source, transform, cut, class_names
        self.batch_size, self.process = batch_size, process

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        reader = Reader(self.process.index * workers + worker, self.process.count * workers)
        refused: Counter[str] = Counter()
        images: list[torch.Tensor] = []
        labels: list[int] = []
        rows = read_rows(
            self.source.shards, reader, epoch=0, seed=None, report=lambda reason, detail: refused.update([reason])
        )
        for _, row in rows:
            try:
                label = self._label(self.source.target(row))
                images.append(self.transform(decode_image(self.source.image(row))))
                labels.append(label)
            except RefusedSample as error:
                refused[error.reason] += 1
            if len(images) == self.batch_size:
                yield self._batch(images, labels, refused)
                images, labels = [], []
                refused.clear()
        if images or refused:
            yield self._batch(images, labels, refused)

    def _label(self, value: Any) -> int:
        if isinstance(value, bytes):  # a member of a tar file
            value = value.decode("utf-8", errors="replace").strip()
            value = int(value) if value.isdecimal() and value not in self.class_names else value
        if isinstance(value, str) and value in self.class_names:
            return self.class_names.index(value)
        if isinstance(value, (int, np.integer)) and 0 <= value < len(self.class_names):
            return int(value)
        raise RefusedSample("unknown label")

    def _batch(self, images: list[torch.Tensor], labels: list[int], refused: Counter[str]) -> dict[str, Any]:
        return {
            "patches": self.cut(torch.stack(images)) if images else torch.empty(0),
            "labels": torch.tensor(labels),
            "refused": dict(refused),
        }
