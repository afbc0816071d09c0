"""Batches of one worker: rows drawn from the sources, shuffled, decoded, transformed, tokenized and collated.

Rows are shuffled in blocks: a reader reads a block of undecoded rows, permutes it, and yields from it. A position is
then the block's place and how many of it were used, and reading the block again restores it exactly; a rolling buffer
would have to be saved row by row, and the libraries' own lose it. It is exact as long as the data and the size of the
block stay what they were; a remote shard that was unreadable then and is readable now adds its rows.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from flip_hf.data.decode import RefusedSample, choose_caption, decode_image
from flip_hf.data.positions import Piece, SourcePosition, whole_epoch
from flip_hf.data.reading import Place, Reader, read_rows
from flip_hf.data.refusals import BadDataError, Refusals
from flip_hf.data.sources import Source

Transform = Callable[..., torch.Tensor]
Sample = tuple[torch.Tensor, str]

# A reader that finds nothing to use in so many whole epochs in a row gives up.
MAX_EMPTY_EPOCHS = 3
_DRAWS = 1024  # drawn at once: a generator costs more than a number


class SourceReader:
    """One reader's endless samples of one source, and where it stands.

    Args:
        source: where rows come from; `target_column` holds captions.
        transform: (image, generator) to a uint8 tensor (3, S, S).
        reader: whose part of the rows.
        position: where to begin.
        seed: of order and augmentation.
        shuffle_block: rows shuffled together.
        refusals: where used and refused samples are counted.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        reader: Reader,
        position: SourcePosition,
        *,
        seed: int,
        shuffle_block: int,
        refusals: Refusals,
    ):
        self.source, self.transform, self.reader, self.position = source, transform, reader, position
        self.seed, self.shuffle_block, self.refusals = seed, shuffle_block, refusals

    def samples(self) -> Iterator[Sample]:
        """Yields (image, caption) for ever; after each, `position` is the one behind it.

        Raises:
            BadDataError: there is nothing to be found.
        """
        pieces, empty_epochs = self.position.pieces, 0
        while True:
            is_own_epoch = not pieces
            if is_own_epoch:
                pieces.append(whole_epoch(self.reader, self.position.next_epoch, self.source.shards.num_shards))
                self.position.next_epoch += 1
            found = 0
            for sample in self._read(pieces[0]):
                found += 1
                yield sample
            pieces.pop(0)
            empty_epochs = 0 if found else empty_epochs + is_own_epoch
            if empty_epochs == MAX_EMPTY_EPOCHS:
                raise BadDataError(
                    f"{self.source.name!r} gave reader {self.reader.index + 1} of {self.reader.count} no usable sample "
                    f"in {MAX_EMPTY_EPOCHS} whole passes: {self.refusals.reasons()}. If the data set is small, use "
                    "fewer workers."
                )

    def _read(self, piece: Piece) -> Iterator[Sample]:
        begun = piece.used
        key = (self.seed, piece.epoch, piece.index, piece.count)
        for rows, begin, last, problems in self._blocks(piece):
            if not begun:  # else they were counted when the block was read first
                for reason, detail in problems:
                    self.refusals.add(self.source.name, reason, detail)
            order = np.random.default_rng((*key, *begin)).permutation(len(rows))
            for offset in range(begun, len(rows)):
                piece.shard, piece.row = begin
                piece.used, piece.last = offset + 1, last
                rng = np.random.default_rng((*key, *begin, offset))
                sample = self._sample(rows[order[offset]], rng)
                if sample is not None:
                    self.refusals.accept(self.source.name)
                    yield sample
            begun = 0

    def _blocks(self, piece: Piece) -> Iterator[tuple[list[dict], Place, int, list[tuple[str, str]]]]:
        """Yields (rows, place of the first, shard of the last, what was wrong on the way) until the piece ends."""
        rows: list[dict] = []
        problems: list[tuple[str, str]] = []
        begin = place = piece.place

        def report(reason: str, detail: str) -> None:
            problems.append((reason, detail))

        for place, row in read_rows(
            self.source.shards,
            piece.reader,
            epoch=piece.epoch,
            seed=self.seed,
            start=piece.place,
            stop=piece.stop,
            step=piece.step,
            report=report,
        ):
            begin = begin if rows else place
            rows.append(row)
            if len(rows) == self.shuffle_block:
                yield rows, begin, place[0], problems
                rows, problems = [], []
        yield rows, begin, place[0], problems

    def _sample(self, row: dict, rng: np.random.Generator) -> Sample | None:
        try:
            caption = choose_caption(self.source.target(row), rng)
            return self.transform(decode_image(self.source.image(row)), rng), caption
        except RefusedSample as refused:
            self.refusals.add(self.source.name, refused.reason, f"sample {sample_key(row, self.source)}")
            return None


def sample_key(row: dict, source: Source) -> str:
    """What to call a row in a message: its key and shard, or the image's file name."""
    if isinstance(row.get("__key__"), str):
        return f"{row['__key__']} of {row['__url__']}" if "__url__" in row else row["__key__"]
    try:
        image = source.image(row)
    except RefusedSample:
        image = None
    path = image.get("path") if isinstance(image, dict) else None
    return os.path.basename(path) if path else "without a name"


class TrainStream(IterableDataset):
    """An endless stream of training batches for one process.

    Args:
        sources: where rows come from; their `target_column` holds captions.
        transform: (image, generator) to a uint8 tensor (3, S, S).
        tokenize: list of captions to a dict of tensors (B, T).
        batch_size: samples a batch.
        process: this process among all.
        seed: of order, mixture and augmentation.
        shuffle_block: rows of a source shuffled together; 1 keeps the shards' own order.
        weights: how often each source is drawn from, in any unit; equally often if None.
        max_bad_fraction: more unusable samples than this among a worker's last ones end the run.

    [`TrainLoader`] sets `workers`, the states of this process's workers to go on from (see `_Worker.state`), and
    `first_worker`, whose batch comes next.
    """

    def __init__(
        self,
        sources: list[Source],
        transform: Transform,
        tokenize: Callable[[list[str]], dict[str, torch.Tensor]],
        *,
        batch_size: int,
        process: Reader,
        seed: int,
        shuffle_block: int,
        weights: list[float] | None = None,
        max_bad_fraction: float = 1.0,
    ):
        self.sources, self.transform, self.tokenize = sources, transform, tokenize
        self.batch_size, self.process, self.max_bad_fraction = batch_size, process, max_bad_fraction
        self.seed, self.shuffle_block = seed, shuffle_block
        self.weights = np.array(weights or [1.0] * len(sources)) / sum(weights or [1.0] * len(sources))
        self.workers: list[dict] = []
        self.first_worker = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields batches, each with its `worker`, that worker's `state` and what was counted on the way (`counts`).

        The last one is `{"error": message}` where the data cannot be gone on with: an exception would reach the main
        process as a page of traceback.
        """
        info = get_worker_info()
        num_workers, number = (info.num_workers, info.id) if info else (1, 0)
        number = (number + self.first_worker) % num_workers
        reader = Reader(self.process.index * num_workers + number, self.process.count * num_workers)
        worker = _Worker(self, reader, self.workers[number])
        try:
            for batch in worker.batches():
                yield {**batch, "worker": number, "state": worker.state(), "counts": worker.refusals.take()}
        except BadDataError as error:
            yield {"error": str(error)}


class _Worker:
    """One reader at work on all sources."""

    def __init__(self, stream: TrainStream, reader: Reader, state: dict):
        self.stream, self.reader = stream, reader
        self.refusals = Refusals(stream.max_bad_fraction, tuple(state["window"]))
        self.draws = state["draws"]
        self.positions = [SourcePosition.from_json(values) for values in state["sources"]]

    def state(self) -> dict:
        """What `batches` goes on from, JSON-able: the draws, the window of the refusals, and a position a source."""
        return {
            "draws": self.draws,
            "window": [self.refusals.good, self.refusals.bad],
            "sources": [position.to_json() for position in self.positions],
        }

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yields `{"pixel_values": (B, 3, S, S) in uint8, "input_ids", "attention_mask": (B, T)}` for ever."""
        stream = self.stream
        samples = [
            SourceReader(
                source,
                stream.transform,
                self.reader,
                position,
                seed=stream.seed,
                shuffle_block=stream.shuffle_block,
                refusals=self.refusals,
            ).samples()
            for source, position in zip(stream.sources, self.positions, strict=True)
        ]
        while True:
            batch = [next(samples[self._draw()]) for _ in range(stream.batch_size)]
            images, captions = zip(*batch, strict=True)
            yield {"pixel_values": torch.stack(images), **stream.tokenize(list(captions))}

    def _draw(self) -> int:
        """The source of the next sample: it follows from the seed, the reader and the number of draws before."""
        block, number = divmod(self.draws, _DRAWS)
        self.draws += 1
        if len(self.positions) == 1:
            return 0
        if number == 0 or not hasattr(self, "_drawn"):
            rng = np.random.default_rng((self.stream.seed, self.reader.index, self.reader.count, block))
            self._drawn = rng.choice(len(self.positions), size=_DRAWS, p=self.stream.weights)
        return int(self._drawn[number])


def initial_state(sources: int) -> dict:
    """The state of a worker that has read nothing; see `_Worker.state`."""
    return {"draws": 0, "window": [0, 0], "sources": [SourcePosition([]).to_json() for _ in range(sources)]}
