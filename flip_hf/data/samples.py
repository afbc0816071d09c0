"""Yields the samples of one source: rows shuffled in blocks, decoded and transformed, from any position on.

A reader reads a block of undecoded rows, permutes it, and yields from it. A position is then the block's place and the
number of its rows used, and reading the block again restores it exactly; a rolling shuffle buffer would have to be
saved row by row, and those of other libraries are lost. The position is exact as long as the data and the block size do
not change; a remote shard that was unreadable then and is readable now adds its rows. The block's limit in bytes is
part of the position because it may change with the number of sources or between releases.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from flip_hf.data.columns import column_value
from flip_hf.data.decode import RefusedSample
from flip_hf.data.positions import Piece, SourcePosition, whole_epoch
from flip_hf.data.reading import Place, Reader, read_rows, row_bytes
from flip_hf.data.refusals import BadDataError, Refusals
from flip_hf.data.sources import Source
from flip_hf.redaction import shown

Transform = Callable[[Any, np.random.Generator, int], torch.Tensor]


class Sample(NamedTuple):
    """One sample of a batch.

    Attributes:
        image: uint8 (3, S, S).
        caption: None if no captions are wanted.
        noise: random numbers in [0, 1) for the mask of its text, float32; None if it stays whole.
    """

    image: torch.Tensor
    caption: str | None
    noise: np.ndarray | None


# Bytes of the rows of a block, per worker, over all its sources.
MAX_BLOCK_BYTES = 256 * 2**20

# Consecutive whole epochs without a usable sample, after which a reader gives up.
MAX_EMPTY_EPOCHS = 3


class SourceReader:
    """One reader's endless samples of one source, and its position.

    Args:
        source: the data; its `target_column` is None if no captions are wanted.
        transform: maps (encoded image, generator, S) to a uint8 tensor (3, S, S).
        reader: the reader whose rows are read.
        position: the position to begin at.
        seed: seed of order and augmentation.
        shuffle_block: rows shuffled together.
        block_bytes: a block ends early, with the row that brings its encoded bytes to this limit.
        refusals: counts used and refused samples.

    Attributes:
        image_size: S of the samples yielded from now on.
        text_noise: the length of their noise from now on; 0 for none.
    """

    image_size: int
    text_noise: int = 0

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
        block_bytes: int = MAX_BLOCK_BYTES,
    ):
        self.source = source
        self.transform = transform
        self.reader = reader
        self.position = position
        self.seed = seed
        self.refusals = refusals
        self.shuffle_block = shuffle_block
        self.block_bytes = block_bytes

    def samples(self) -> Iterator[Sample]:
        """Yields samples forever; after each one, `position` is the one following it.

        Raises:
            BadDataError: there is no usable sample.
        """
        pieces = self.position.pieces
        empty_epochs = 0
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
                    f"in {MAX_EMPTY_EPOCHS} whole epochs: {self.refusals.reasons()}. If the data set is small, use "
                    "fewer workers."
                )

    def _read(self, piece: Piece) -> Iterator[Sample]:
        begun = piece.used
        key = (self.seed, piece.epoch, piece.index, piece.count)
        for rows, begin, last, problems in self._blocks(piece):
            if begun:
                block_bytes = piece.block_bytes
            else:  # otherwise they were counted when the block was first read
                block_bytes = self.block_bytes
                for reason, detail in problems:
                    self.refusals.add(self.source.name, reason, detail)
            order = np.random.default_rng((*key, *begin)).permutation(len(rows))
            words = np.array((*key, *begin, 0), np.uint32)  # from which a generator is made twice as fast
            # Rows are popped from the end of a list, so that none is held longer than needed.
            left = [rows[number] for number in order[begun:][::-1]]
            rows.clear()
            for offset in range(begun, len(order)):
                piece.shard, piece.row = begin
                piece.used = offset + 1
                piece.last = last
                piece.block_bytes = block_bytes
                words[-1] = offset
                sample = self._sample(left.pop(), np.random.default_rng(words))
                if sample is not None:
                    self.refusals.accept(self.source.name)
                    yield sample
            begun = 0

    def _blocks(self, piece: Piece) -> Iterator[tuple[list[dict], Place, int, list[tuple[str, str]]]]:
        """Yields (rows, place of the first, shard of the last, problems) of each block until the piece ends."""
        rows: list[dict] = []
        problems: list[tuple[str, str]] = []
        begin = place = piece.place
        held = 0
        max_bytes = piece.block_bytes if piece.used else self.block_bytes

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
            held += row_bytes(row)
            del row
            if len(rows) == self.shuffle_block or (max_bytes is not None and held >= max_bytes):
                yield rows, begin, place[0], problems
                rows = []
                problems = []
                held = 0
                max_bytes = self.block_bytes
        yield rows, begin, place[0], problems

    def _sample(self, row: dict, rng: np.random.Generator) -> Sample | None:
        if self.source.is_held_out(row):
            self.refusals.hold_out(self.source.name)
            return None
        try:
            wanted = self.source.target_column is not None
            caption = self.source.caption(row, rng) if wanted else None
            image = self.transform(self.source.image(row), rng, self.image_size)
            # Last, so that captions and crops do not depend on it.
            return Sample(image, caption, rng.random(self.text_noise, np.float32) if self.text_noise else None)
        except RefusedSample as refused:
            self.refusals.add(self.source.name, refused.reason, f"sample {sample_key(row, self.source)}")
            return None


def sample_key(row: dict, source: Source) -> str:
    """Returns a row's name for messages: its key and shard, or the image's file name."""
    key = own_key(row, source)
    if key is not None and isinstance(row.get("__key__"), str) and "__url__" in row:
        return f"{key} of {shown(str(row['__url__']))}"
    return key or "without a name"


def own_key(row: dict, source: Source) -> str | None:
    """Returns a row's own name, its key in an archive, list or folder, or its image's file name; else None."""
    if isinstance(row.get("__key__"), str):
        return row["__key__"]
    try:
        image = column_value(row, source.image_column)
    except RefusedSample:
        return None
    path = image.get("path") if isinstance(image, dict) else image
    return os.path.basename(path) if path and isinstance(path, str) else None
