"""Batches: rows shuffled, decoded, transformed, tokenized and collated in worker processes, with their position.

Rows are shuffled in blocks: a worker reads a block of undecoded rows, permutes it, and yields from it. A position is
then the block's start and how many of it were used, and reading the block again restores it exactly; a rolling buffer
would have to be saved row by row, and the libraries' own lose it.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flip_hf.data.decode import RefusedSample, choose_caption, decode_image
from flip_hf.data.sources import Reader, Source, read_rows
from flip_hf.data.workers import ignore_stop_signals

logger = logging.getLogger(__name__)

MAX_LOGGED_REFUSALS = 10  # per worker; the rest is only counted

Transform = Callable[..., torch.Tensor]


@dataclass
class Position:
    """Where a worker stands: `used` rows into the block that starts at (`shard`, `row`) of an epoch."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    block: int = 0
    used: int = 0


class Refusals:
    """Counts what cannot be used, by reason, and logs the first few."""

    def __init__(self, source_name: str):
        self.source_name = source_name
        self.counts: Counter[str] = Counter()
        self.logged = 0

    def add(self, reason: str, detail: str) -> None:
        self.counts[reason] += 1
        if self.logged < MAX_LOGGED_REFUSALS:
            self.logged += 1
            more = " (further ones are only counted)" if self.logged == MAX_LOGGED_REFUSALS else ""
            logger.warning("Skipped in %s: %s, %s%s", self.source_name, reason, detail, more)

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        counts, self.counts = dict(self.counts), Counter()
        return counts


class TrainStream(IterableDataset):
    """An endless stream of training batches for one process.

    Args:
        source: where rows come from; `target_column` holds captions.
        transform: (image, generator) to a uint8 tensor (3, S, S).
        tokenize: list of captions to a dict of tensors (B, T).
        batch_size: samples a batch.
        process: this process among all.
        seed: of order and augmentation.
        shuffle_block: rows shuffled together; 1 keeps the shards' own order.
        positions: one a worker, to resume from.
        first_worker: the worker whose batch comes next.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        tokenize: Callable[[list[str]], dict[str, torch.Tensor]],
        *,
        batch_size: int,
        process: Reader,
        seed: int,
        shuffle_block: int,
        positions: list[dict] | None = None,
        first_worker: int = 0,
    ):
        self.source, self.transform, self.tokenize = source, transform, tokenize
        self.batch_size, self.process = batch_size, process
        self.seed, self.shuffle_block = seed, shuffle_block
        self.positions, self.first_worker = positions, first_worker

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        num_workers, number = (info.num_workers, info.id) if info else (1, 0)
        worker = (number + self.first_worker) % num_workers
        reader = Reader(self.process.index * num_workers + worker, self.process.count * num_workers)
        start = Position(**self.positions[worker]) if self.positions else Position()
        refusals = Refusals(self.source.name)
        images: list[torch.Tensor] = []
        captions: list[str] = []
        for image, caption, position in self._samples(reader, start, refusals):
            images.append(image)
            captions.append(caption)
            if len(images) == self.batch_size:
                yield {
                    "pixel_values": torch.stack(images),  # (B, 3, S, S), uint8
                    **self.tokenize(captions),
                    "worker": worker,
                    "position": asdict(position),
                    "refused": refusals.take(),
                }
                images, captions = [], []

    def _samples(self, reader: Reader, start: Position, refusals: Refusals) -> Iterator[tuple]:
        """Yields (image, caption, the position after it) for ever."""
        accepted_in_epoch = 0
        while True:
            for rows, after in self._blocks(reader, start, refusals):
                order = np.random.default_rng((self.seed, start.epoch, reader.index, after.block)).permutation(
                    len(rows)
                )
                used = start.used if after.block == start.block else 0
                for offset in range(used, len(rows)):
                    position = Position(after.epoch, after.shard, after.row, after.block, offset + 1)
                    rng = np.random.default_rng((self.seed, start.epoch, reader.index, after.block, offset))
                    sample = self._sample(rows[order[offset]], rng, refusals)
                    if sample is not None:
                        accepted_in_epoch += 1
                        yield *sample, position
            if accepted_in_epoch == 0 and start == Position(epoch=start.epoch):
                raise ValueError(
                    f"{self.source.name!r} gave reader {reader.index + 1} of {reader.count} no usable sample in a "
                    f"whole pass. Refused: {refusals.take() or 'nothing'}. If the data set is small, use fewer workers."
                )
            start, accepted_in_epoch = Position(epoch=start.epoch + 1), 0

    def _blocks(self, reader: Reader, start: Position, refusals: Refusals) -> Iterator[tuple[list[dict], Position]]:
        """Yields (rows, the block's own position) until the epoch ends."""
        block, rows, begin = start.block, [], None
        for place, row in read_rows(
            self.source.dataset,
            reader,
            epoch=start.epoch,
            seed=self.seed,
            start=(start.shard, start.row),
            on_error=lambda error: refusals.add("unreadable shard", f"{type(error).__name__}: {error}"),
        ):
            begin = begin or place
            rows.append(row)
            if len(rows) == self.shuffle_block:
                yield rows, Position(start.epoch, *begin, block)
                block, rows, begin = block + 1, [], None
        if rows and begin:
            yield rows, Position(start.epoch, *begin, block)

    def _sample(self, row: dict, rng: np.random.Generator, refusals: Refusals) -> tuple[torch.Tensor, str] | None:
        try:
            caption = choose_caption(self.source.target(row), rng)
            return self.transform(decode_image(self.source.image(row)), rng), caption
        except RefusedSample as refused:
            refusals.add(refused.reason, f"sample {sample_key(row, self.source)}")
            return None


def sample_key(row: dict, source: Source) -> str:
    """What to call a row in a message: its key, or the image's file name."""
    if isinstance(row.get("__key__"), str):
        return row["__key__"]
    image = source.image(row)
    path = image.get("path") if isinstance(image, dict) else None
    return os.path.basename(path) if path else "without a name"


def make_loader(stream: IterableDataset, *, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """A DataLoader over ready-made batches; it leaves torch's default generator, which draws the masks, alone."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=ignore_stop_signals,
    )


class TrainLoader:
    """Batches of a [`TrainStream`], and the position after the last one taken.

    Args:
        stream: the batches; endless.
        num_workers: worker processes; 0 loads in this one.
        pin_memory: for copies to a GPU that do not wait.
        state: what `state_dict` gave, to go on from there. With another number of workers or processes it does not fit
            and the stream starts at the epoch after the furthest one.
    """

    def __init__(self, stream: TrainStream, *, num_workers: int, pin_memory: bool, state: dict | None = None):
        self._slots = max(1, num_workers)
        self._positions: list[dict] = [asdict(Position()) for _ in range(self._slots)]
        self._next = 0
        if state is not None:
            self._restore(state, stream.process.count)
        stream.positions, stream.first_worker = self._positions, self._next
        self._processes = stream.process.count
        if num_workers > 0:
            # The tokenizer is used here and in forked workers; its own threads would be lost in the fork.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._loader = make_loader(stream, num_workers=num_workers, pin_memory=pin_memory)

    def _restore(self, state: dict, processes: int) -> None:
        if len(state["positions"]) == self._slots and state["processes"] == processes:
            self._positions, self._next = [dict(p) for p in state["positions"]], state["next_worker"]
            return
        epoch = 1 + max(p["epoch"] for p in state["positions"])
        logger.warning(
            "The checkpoint was written with %d processes of %d workers, this run has %d of %d: reading starts with "
            "epoch %d instead of where it stopped.",
            state["processes"],
            len(state["positions"]),
            processes,
            self._slots,
            epoch + 1,
        )
        self._positions = [asdict(Position(epoch=epoch)) for _ in range(self._slots)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            worker = batch.pop("worker")
            self._positions[worker] = batch.pop("position")
            self._next = (worker + 1) % self._slots
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch taken, JSON-able."""
        return {"positions": self._positions, "next_worker": self._next, "processes": self._processes}


class EvalStream(IterableDataset):
    """One pass over a labelled data set: `{"pixel_values", "labels", "refused"}`, the last batch may be smaller.

    Args:
        source: where rows come from; `target_column` holds class indices or names.
        transform: image to a uint8 tensor (3, S, S).
        class_names: the classes, in the order of the indices.
        batch_size: samples a batch.
        process: this process among all.
    """

    def __init__(
        self, source: Source, transform: Transform, class_names: tuple[str, ...], *, batch_size: int, process: Reader
    ):
        self.source, self.transform, self.class_names = source, transform, class_names
        self.batch_size, self.process = batch_size, process

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        reader = Reader(self.process.index * workers + worker, self.process.count * workers)
        refusals = Refusals(self.source.name)
        images: list[torch.Tensor] = []
        labels: list[int] = []
        rows = read_rows(
            self.source.dataset,
            reader,
            epoch=0,
            seed=None,
            on_error=lambda error: refusals.add("unreadable shard", f"{type(error).__name__}: {error}"),
        )
        for _, row in rows:
            try:
                label = self._label(self.source.target(row))
                images.append(self.transform(decode_image(self.source.image(row))))
                labels.append(label)
            except RefusedSample as refused:
                refusals.add(refused.reason, f"sample {sample_key(row, self.source)}")
            if len(images) == self.batch_size:
                yield self._batch(images, labels, refusals)
                images, labels = [], []
        if images or refusals.counts:
            yield self._batch(images, labels, refusals)

    def _label(self, value: Any) -> int:
        if isinstance(value, str) and value in self.class_names:
            return self.class_names.index(value)
        if isinstance(value, (int, np.integer)) and 0 <= value < len(self.class_names):
            return int(value)
        raise RefusedSample("unknown label")

    def _batch(self, images: list[torch.Tensor], labels: list[int], refusals: Refusals) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack(images) if images else torch.empty(0),
            "labels": torch.tensor(labels),
            "refused": refusals.take(),
        }
