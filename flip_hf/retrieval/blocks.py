"""Blocks of a data set's rows, decoded in batches: the unit of work that processes share and a restart skips.

A block is a range of row numbers of one shard. What is in it, and how its samples form batches, depends on the data and
on two options alone, not on the processes and workers that read it, nor on where an earlier run ended.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from flip_hf.data.class_names import spoken
from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.reading import Reader, read_rows
from flip_hf.data.refusals import BadDataError
from flip_hf.data.rendering import Colour
from flip_hf.data.samples import own_key
from flip_hf.data.sources import Source
from flip_hf.data.targets import Captions, ClassIndex
from flip_hf.redaction import redact

# The reason that reading gives for damage that another attempt may not find.
UNREADABLE = "unreadable shard"


class Block(NamedTuple):
    """Rows `number * rows` up to `(number + 1) * rows` of a shard."""

    shard: int
    number: int


class Sample(NamedTuple):
    """The part of a sample that is kept beside its features."""

    row: int
    key: str
    captions: list[str]


@dataclass
class Ending:
    """Facts about a block that are known once it was read.

    Attributes:
        rows: how many were read.
        is_last: whether the shard ends in it.
        refused: row, key and reason of each sample that cannot be used.
        damage: reason and place of each damaged part of the shard.
    """

    rows: int = 0
    is_last: bool = False
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    damage: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Batch:
    """Samples of a batch of images.

    Attributes:
        block: the block that they are of.
        samples: the samples, in the images' order.
        ending: present with the last batch of a block, which may have no samples.
        unread: why the rest of the shard cannot be read, from this block on, of which nothing is kept then.
        error: why nothing more can be read; all else is empty then.
    """

    block: Block
    samples: list[Sample]
    ending: Ending | None = None
    unread: str | None = None
    error: str | None = None


class UnreadShard(Exception):
    """A shard cannot be read to its end; a later run may still read it."""


class BlockStream(IterableDataset):
    """One pass over the blocks that are not there yet: dictionaries of `images` (B, ...) and `about`, a [`Batch`].

    Args:
        source: the data; captions are read if it has a `target_column`.
        transform: maps an image to a tensor.
        rows: rows of a block.
        batch_size: samples of a batch; the last one of a block may be smaller.
        process: this process among all.
        there: the blocks to skip, and whether the shard ends in each.
        background: colour of transparent parts.
        skip_unreadable: take what cannot be read of a shard for damage, as if the shard ended there.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], torch.Tensor],
        *,
        rows: int,
        batch_size: int,
        process: Reader,
        there: Mapping[Block, bool],
        background: Colour,
        skip_unreadable: bool = False,
    ):
        self.source = source
        self.transform = transform
        self.rows = rows
        self.batch_size = batch_size
        self.process = process
        self.there = there
        self.background = background
        self.skip_unreadable = skip_unreadable
        self.read_captions = None if source.target_column is None else caption_reader(source)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        reader = Reader(self.process.index * workers + worker, self.process.count * workers)
        try:
            for numbers, shard in self._shares(reader):
                yield from self._shard(shard, numbers)
        except BadDataError as error:
            yield {"images": torch.empty(0), "about": Batch(Block(0, 0), [], error=str(error))}

    def _shares(self, reader: Reader) -> Iterator[tuple[Iterator[int], int]]:
        """Yields the numbers of a reader's blocks in each shard: whole shards where there is one for each reader."""
        count = self.source.shards.num_shards
        if count >= reader.count:
            for shard in range(reader.index, count, reader.count):
                yield itertools.count(), shard
            return
        for shard in range(count):
            # The first block goes to another reader in each shard, as some shards have no other.
            yield itertools.count((reader.index - shard) % reader.count, reader.count), shard

    def _shard(self, shard: int, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
        for number in numbers:
            block = Block(shard, number)
            is_last = self.there.get(block)
            if is_last is None:
                try:
                    is_last = yield from self._block(block)
                except UnreadShard as error:
                    yield {"images": torch.empty(0), "about": Batch(block, [], unread=str(error))}
                    return
            if is_last:
                return

    def _block(self, block: Block) -> Generator[dict[str, Any], None, bool]:
        """Yields the batches of a block, and returns whether its shard ends in it."""
        ending = Ending()
        images: list[torch.Tensor] = []
        samples: list[Sample] = []
        for row, values in self._rows_of(block, ending):
            key = redact(as_unicode(own_key(values, self.source) or f"{block.shard}/{row}"))
            try:
                images.append(self.transform(decode_image(self.source.image(values), self.background)))
                samples.append(Sample(row, key, self._captions(values)))
            except RefusedSample as error:
                ending.refused.append((row, key, error.reason))
            if len(samples) == self.batch_size:
                yield {"images": torch.stack(images), "about": Batch(block, samples)}
                images = []
                samples = []
        if ending.is_last and not ending.rows and block.number:
            return True  # the shard ends before this block, in one that may be another reader's
        stacked = torch.stack(images) if images else torch.empty(0)
        yield {"images": stacked, "about": Batch(block, samples, ending)}
        return ending.is_last

    def _rows_of(self, block: Block, ending: Ending) -> Iterator[tuple[int, dict]]:
        """Yields (row number, row) of a block, and notes what is damaged and whether the shard ends.

        Reading goes on to the first row after the block, which shows whether there is one; damage on the way is this
        block's. Damage before its first row was on the way of the block before.

        Raises:
            BadDataError: a remote shard could not be read; a later run may still read it.
            UnreadShard: a local one could not be read.
        """
        begin = block.number * self.rows
        end = begin + self.rows
        begun = block.number == 0

        def report(reason: str, detail: str) -> None:
            if reason == UNREADABLE and not self.skip_unreadable:
                if self.source.shards.remote:
                    raise BadDataError(f"{detail}. The same command resumes from here")
                raise UnreadShard(detail)
            if begun:
                ending.damage.append((reason, detail))

        places = read_rows(
            self.source.shards,
            Reader(0, 1),
            epoch=0,
            seed=None,
            start=(block.shard, begin),
            stop=block.shard + 1,
            report=report,
        )
        for (_, row), values in places:
            begun = True
            if row >= end:
                return
            ending.rows += 1
            yield row, values
        ending.is_last = True

    def _captions(self, row: dict) -> list[str]:
        """Returns the captions of a row; none where it has no usable one, as its picture can be used all the same."""
        try:
            return [] if self.read_captions is None else self.read_captions(self.source.target(row))
        except RefusedSample:
            return []


def as_unicode(name: str) -> str:
    """Returns a name with what is not UTF-8 in it, as in the name of a file, as codes: files hold nothing else."""
    return name.encode("utf-8", "backslashreplace").decode()


class ClassCaption:
    """Turns a label into the name of its class, as the only caption."""

    def __init__(self, class_names: tuple[str, ...]):
        self.class_names = class_names
        self.read_index = ClassIndex(class_names)

    def __call__(self, value: object) -> list[str]:
        return [as_unicode(spoken(self.class_names[self.read_index(value)]))]


def caption_reader(source: Source) -> Callable[[object], list[str]]:
    """Makes the function from a value of a source's target column to captions: texts, or the names of classes."""
    return Captions() if source.class_names is None else ClassCaption(source.class_names)
