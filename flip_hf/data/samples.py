"""Samples of one source: rows shuffled in blocks, decoded and transformed, from any position on.

Rows are shuffled in blocks: a reader reads a block of undecoded rows, permutes it, and yields from it. A position is
then the block's place and how many of it were used, and reading the block again restores it exactly; a rolling buffer
would have to be saved row by row, and the libraries' own lose it. It is exact as long as the data and the size of the
block stay what they were; a remote shard that was unreadable then and is readable now adds its rows. The block's bound
in bytes is part of the position: it may change with the number of sources, or from one release to the next.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from flip_hf.data.decode import RefusedSample, choose_caption
from flip_hf.data.positions import Piece, SourcePosition, whole_epoch
from flip_hf.data.reading import Place, Reader, read_rows, row_bytes
from flip_hf.data.refusals import BadDataError, Refusals
from flip_hf.data.sources import Source, column_value
from flip_hf.redaction import shown

Transform = Callable[[Any, np.random.Generator, int], torch.Tensor]
Sample = tuple[torch.Tensor, str | None]

# Rows of a block have at most so many bytes together, in one worker, all its sources together.
MAX_BLOCK_BYTES = 256 * 2**20

# A reader that finds nothing to use in so many whole epochs in a row gives up.
MAX_EMPTY_EPOCHS = 3


class SourceReader:
    """One reader's endless samples of one source, and where it stands.

    Args:
        source: where rows come from; `target_column` holds captions, or is None where none are wanted.
        transform: (encoded image, generator, S) to a uint8 tensor (3, S, S).
        reader: whose part of the rows.
        position: where to begin.
        seed: of order and augmentation.
        shuffle_block: rows shuffled together.
        block_bytes: a block ends before, with the row that brings its encoded bytes to so many.
        refusals: where used and refused samples are counted.

    Attributes:
        image_size: S of the samples yielded from now on.
    """

    image_size: int

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
        """Yields (image, caption or None) for ever; after each, `position` is the one behind it.

        Raises:
            BadDataError: there is nothing to be found.
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
                    f"in {MAX_EMPTY_EPOCHS} whole passes: {self.refusals.reasons()}. If the data set is small, use "
                    "fewer workers."
                )

    def _read(self, piece: Piece) -> Iterator[Sample]:
        begun = piece.used
        key = (self.seed, piece.epoch, piece.index, piece.count)
        for rows, begin, last, problems in self._blocks(piece):
            if begun:
                block_bytes = piece.block_bytes
            else:  # else they were counted when the block was read first
                block_bytes = self.block_bytes
                for reason, detail in problems:
                    self.refusals.add(self.source.name, reason, detail)
            order = np.random.default_rng((*key, *begin)).permutation(len(rows))
            # Taken from the end of a list, no row is held longer than it is needed.
            left = [rows[number] for number in order[begun:][::-1]]
            rows.clear()
            for offset in range(begun, len(order)):
                piece.shard, piece.row = begin
                piece.used = offset + 1
                piece.last = last
                piece.block_bytes = block_bytes
                rng = np.random.default_rng((*key, *begin, offset))
                sample = self._sample(left.pop(), rng)
                if sample is not None:
                    self.refusals.accept(self.source.name)
                    yield sample
            begun = 0

    def _blocks(self, piece: Piece) -> Iterator[tuple[list[dict], Place, int, list[tuple[str, str]]]]:
        """Yields (rows, place of the first, shard of the last, what was wrong on the way) until the piece ends."""
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
            caption = choose_caption(self.source.target(row), rng) if wanted else None
            return self.transform(self.source.image(row), rng, self.image_size), caption
        except RefusedSample as refused:
            self.refusals.add(self.source.name, refused.reason, f"sample {sample_key(row, self.source)}")
            return None


def sample_key(row: dict, source: Source) -> str:
    """What to call a row in a message: its key and shard, or the image's file name."""
    if isinstance(row.get("__key__"), str):
        return f"{row['__key__']} of {shown(str(row['__url__']))}" if "__url__" in row else row["__key__"]
    try:
        image = column_value(row, source.image_column)
    except RefusedSample:
        image = None
    path = image.get("path") if isinstance(image, dict) else image
    return os.path.basename(path) if path and isinstance(path, str) else "without a name"
