"""Tracks the positions of a data set's readers, and redistributes the rows they have left to other readers.

A reader reads [`Piece`]s: rows of one epoch, first those left over to it, then epoch after epoch of its own. When the
number of readers changes, every unfinished piece is kept with its blocks and their order, and goes to one of the new
readers; their own epochs begin after the furthest epoch begun. So every epoch is read to its end by some reader, and
nothing is read twice.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from flip_hf.data.reading import Place, Reader, count_epoch_shards


@dataclass
class Piece:
    """Rows of an epoch that are still to be read: the end of a block, and the shards after it.

    Attributes:
        index, count: the reader that the rows were dealt to, and the number of readers.
        epoch: epoch of the rows.
        shard, row: start of the current block: the reader's n-th shard and the row in it.
        used: rows of the block used so far, in its shuffled order; 0 if it was not begun.
        last: the n-th shard where the block ends.
        step: the piece has every `step`-th shard.
        stop: the n-th shard before which it ends.
        block_bytes: byte limit of the block that was begun, see [`SourceReader`]; None in checkpoints without one.
    """

    index: int
    count: int
    epoch: int
    shard: int
    row: int
    used: int
    last: int
    step: int
    stop: int
    block_bytes: int | None = None

    @property
    def reader(self) -> Reader:
        return Reader(self.index, self.count)

    @property
    def num_shards(self) -> int:
        """The number of shards with rows of the piece, counted when its block was begun."""
        return len(range(self.shard, self.stop, self.step))

    @property
    def place(self) -> Place:
        return self.shard, self.row


def split_piece(piece: Piece, parts: int) -> list[Piece]:
    """Splits a piece by its shards; a block that was begun stays whole, with the rest of its last shard.

    Args:
        piece: the piece to split.
        parts: maximum number of pieces beside the one that was begun.
    """
    first = piece.last + piece.step if piece.used else piece.shard
    begun = [replace(piece, stop=min(piece.stop, piece.last + 1))] if piece.used else []
    starts = range(first, piece.stop, piece.step)[:parts]
    return begun + [replace(piece, shard=s, row=0, used=0, last=s, step=parts * piece.step) for s in starts]


def whole_epoch(reader: Reader, epoch: int, num_shards: int) -> Piece:
    """Returns a reader's entire part of an epoch."""
    return Piece(reader.index, reader.count, epoch, 0, 0, 0, 0, 1, count_epoch_shards(num_shards, reader, epoch))


@dataclass
class SourcePosition:
    """A reader's position in one data set: the unfinished pieces, and its own epoch that comes after them."""

    pieces: list[Piece]
    next_epoch: int = 0

    def to_json(self) -> list:
        """Returns the position as nested lists of numbers."""
        return [self.next_epoch, *(list(astuple(piece)) for piece in self.pieces)]

    @classmethod
    def from_json(cls, values: list) -> "SourcePosition":
        return cls([Piece(*piece) for piece in values[1:]], values[0])


def deal_again(old: Sequence[SourcePosition], count: int, num_shards: int) -> list[SourcePosition]:
    """Deals what the old readers, all of them in order, have left of one data set to `count` new readers.

    Old readers may be in different epochs: all epochs up to the furthest one begun are read to their end.
    """
    next_epoch = max(position.next_epoch for position in old)
    owed = [piece for position in old for piece in position.pieces]
    for index, position in enumerate(old):
        for epoch in range(position.next_epoch, next_epoch):
            owed.append(whole_epoch(Reader(index, len(old)), epoch, num_shards))
    new = [SourcePosition([], next_epoch) for _ in range(count)]
    parts = [part for piece in owed for part in split_piece(piece, _parts(len(owed), count))]
    # The largest first, each to the reader with the least to do so far.
    loads = [(0, number) for number in range(count)]
    for part in sorted(parts, key=lambda part: part.num_shards, reverse=True):
        load, number = heapq.heappop(loads)
        new[number].pieces.append(part)
        heapq.heappush(loads, (load + part.num_shards, number))
    for position in new:
        position.pieces.sort(key=lambda piece: piece.epoch)
    return new


def _parts(pieces: int, readers: int) -> int:
    """Returns the number of parts per piece that gives all readers equally many, or nearly so in a large run."""
    if pieces == 0:
        return 1
    even = readers // math.gcd(pieces, readers)
    return even if pieces * even <= 8 * max(pieces, readers) else max(1, math.ceil(4 * readers / pieces))
