"""Deals the rows of a data set to readers in a reproducible order, and reads them despite passing failures.

A reader is one worker of one process. The order of shards and the part of each reader depend only on the seed and the
epoch, so that a place in an epoch is two numbers: the reader's n-th shard and the row in it.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from datasets import Audio, Dataset, Image, IterableDataset, LargeList, List, Video

from flip_hf.data.paths import FilePolicy
from flip_hf.data.refusals import BadDataError
from flip_hf.redaction import redact

logger = logging.getLogger(__name__)

# Seconds between attempts to resume a remote shard; after the last one it is skipped.
RETRY_WAITS = (1, 2, 4, 8, 16)
# Failures that another attempt does not fix: missing files, and errors in a file itself.
_LASTING = (FileNotFoundError, PermissionError, ValueError, TypeError, LookupError, AssertionError)
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)

# Consecutive shards that yield nothing but errors, after which the run ends.
MAX_BROKEN_SHARDS = 16

_OTHER_BYTES = 32  # of a number or the like

_MAX_SHARDS = 64  # into which a table in one piece is split

_STRIDE = 7919  # a prime, so that consecutive shards begin far from each other

Place = tuple[int, int]  # (n-th shard of the reader, row in it)


@dataclass(frozen=True)
class Reader:
    """One of `count` readers, all workers of all processes together."""

    index: int
    count: int


class Shards(Protocol):
    """A data set in shards that are read from their beginning or from any row."""

    remote: bool

    @property
    def num_shards(self) -> int: ...

    def name(self, shard: int) -> str:
        """Returns the shard's name for messages."""
        ...

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row number, row) from row `first` on, only rows dealt to `part`; see [`TarShards.read`]."""
        ...

    def select(self, image: str, target: str | None, /) -> "Shards":
        """Returns the same rows with only the columns of the image and the target.

        Dots in their names lead into nested values, `;` separates alternatives.
        """
        ...


class DatasetShards:
    """A data set of `datasets` as shards.

    Args:
        table: the rows; pictures, audio and video are returned as stored, not decoded.
        remote: whether reading may fail temporarily.
        files: the files that paths in its rows may name; None if rows hold bytes.
        urls: the files that the rows are in, as far as they are known.
    """

    def __init__(
        self,
        table: Dataset | IterableDataset,
        remote: bool,
        files: FilePolicy | None = None,
        urls: Sequence[str] = (),
    ):
        self.urls = tuple(urls)
        self.remote = remote
        self.files = files
        self._table = table
        self.dataset = _undecoded(table)

    @property
    def columns(self) -> list[str] | None:
        """The names of all columns, or None if they are known only from rows."""
        return None if self.dataset.features is None else list(self.dataset.features)

    @property
    def num_rows(self) -> int | None:
        """The number of rows, or None if it is known only after reading them."""
        return len(self._table) if isinstance(self._table, Dataset) else None

    def select(self, *columns: str | None) -> "DatasetShards":
        """Returns the same rows with only these columns; see [`ParquetShards.select`]."""
        names = {part for each in columns if each for name in each.split(";") for part in (name, name.split(".")[0])}
        kept = [name for name in self.columns or () if name in names]
        return DatasetShards(self._table.select_columns(kept), self.remote, self.files, self.urls) if kept else self

    @property
    def num_shards(self) -> int:
        return self.dataset.num_shards

    def name(self, shard: int) -> str:
        """Returns the shard's name for messages."""
        return f"shard {shard}"

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row number, row) of a shard; see [`Shards`]."""
        dataset = self.dataset.shard(self.num_shards, shard)
        rows: Any = dataset.skip(first) if first else dataset
        # Batches of one, because in a DataLoader's worker, iterating over a dataset itself would split the rows again.
        for index, batch in enumerate(rows.iter(batch_size=1), start=first):
            if part is None or index % part.count == part.index:
                yield index, {name: values[0] for name, values in batch.items()}


def _undecoded(table: Dataset | IterableDataset) -> IterableDataset:
    """Turns decoding off, so that a row that cannot be decoded is counted by us and does not end the stream."""
    if isinstance(table, Dataset):
        table = table.to_iterable_dataset(num_shards=min(_MAX_SHARDS, max(1, len(table))))
    for name, feature in (table.features or {}).items():
        stored = _as_stored(feature)
        if stored != feature:
            table = table.cast_column(name, stored)
    return table


def _as_stored(feature: Any) -> Any:
    """Returns a feature whose pictures, audio and video, at any depth, are not decoded."""
    if isinstance(feature, dict):
        return {name: _as_stored(each) for name, each in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return replace(feature, feature=_as_stored(feature.feature))
    return replace(feature, decode=False) if isinstance(feature, (Image, Audio, Video)) else feature


def row_bytes(row: object) -> int:
    """Estimates the memory that a row takes: its encoded bytes and texts, and a little for every other value."""
    total = 0
    values = [row]
    while values:
        value = values.pop()
        if isinstance(value, (bytes, bytearray, str)):
            total += len(value)
        elif isinstance(value, dict):
            values.extend(value)
            values.extend(value.values())
        elif isinstance(value, (list, tuple)):
            values.extend(value)
        elif value is not None:
            total += _OTHER_BYTES
    return total


def take_rows(rows: Iterable[dict], count: int, max_bytes: int) -> list[dict]:
    """Takes the first `count` rows, or fewer if these reach `max_bytes`."""
    taken: list[dict] = []
    held = 0
    for row in itertools.islice(rows, count):
        taken.append(row)
        held += row_bytes(row)
        if held >= max_bytes:
            break
    return taken


def epoch_shards(num_shards: int, reader: Reader, epoch: int, seed: int | None) -> tuple[list[int], bool]:
    """Returns the shards that a reader visits in an epoch, in order, and whether it shares their rows with others.

    With at least one shard per reader, each shard has one reader, and the readers with an extra shard change every
    epoch. With fewer, all readers read all shards and alternate by row. Either way every row has exactly one reader per
    epoch.
    """
    order = np.arange(num_shards)
    if seed is not None:
        order = np.random.default_rng((seed, epoch)).permutation(num_shards)
    if num_shards < reader.count:
        return order.tolist(), True
    return order[(reader.index + epoch) % reader.count :: reader.count].tolist(), False


def count_epoch_shards(num_shards: int, reader: Reader, epoch: int) -> int:
    """Returns the number of shards of [`epoch_shards`]."""
    if num_shards < reader.count:
        return num_shards
    return len(range((reader.index + epoch) % reader.count, num_shards, reader.count))


def read_rows(
    shards: Shards,
    reader: Reader,
    *,
    epoch: int,
    seed: int | None,
    start: Place = (0, 0),
    stop: int | None = None,
    step: int = 1,
    report: Callable[[str, str], None],
) -> Iterator[tuple[Place, dict]]:
    """Yields a reader's rows of one epoch as ((n-th shard, row in it), row).

    When reading a remote shard fails, it is reopened at that row after a wait. A shard that cannot be resumed is
    skipped, and reading continues with the next one.

    Args:
        shards: the data.
        reader: the reader whose rows are read.
        epoch: number of the epoch.
        seed: seed of the order of shards; None keeps their own order.
        start: the place to begin at.
        stop: the reader's n-th shard to end before; None reads to the last one.
        step: reads every `step`-th of the reader's shards from `start` on.
        report: called with (reason, detail) for every damaged shard, by one of its readers.

    Raises:
        BadDataError: many consecutive shards yielded nothing but errors, so the connection is broken, not the shards.
    """
    order, shared = epoch_shards(shards.num_shards, reader, epoch, seed)
    broken = 0
    for nth in range(start[0], len(order) if stop is None else stop, step):
        shard = order[nth]
        first = start[1] if nth == start[0] else 0
        mine = not shared or shard % reader.count == reader.index
        problems: list[str] = []

        def damage(reason: str, detail: str, shard: int = shard, mine: bool = mine, to: list[str] = problems) -> None:
            to.append(f"{reason}, {shards.name(shard)}{detail}")
            if mine:
                report(reason, f"{shards.name(shard)}{detail}")

        # The first row goes to a different reader in each shard and epoch, or small shards would all go to the first.
        turn = Reader((reader.index - _STRIDE * shard - epoch) % reader.count, reader.count)
        index = None
        for index, row in _read_shard(shards, shard, first, turn if shared else None, damage):
            yield (nth, index), row
        broken = broken + 1 if problems and index is None else 0
        if broken == MAX_BROKEN_SHARDS:
            raise BadDataError(f"{broken} shards in a row could not be read; the last one: {problems[-1]}.")


def _read_shard(
    shards: Shards, shard: int, first: int, part: Reader | None, damage: Callable[[str, str], None]
) -> Iterator[tuple[int, dict]]:
    failures = 0
    while True:
        try:
            for index, row in shards.read(shard, first, part, lambda reason: damage(reason, "")):
                first = index + 1
                failures = 0
                yield index, row
            return
        except Exception as error:  # archives, connections, schemas: any type
            reason = redact(f"{type(error).__name__}: {error}")  # the client's message may contain the whole URL
            if failures == len(RETRY_WAITS) or not _may_pass(shards, error):
                damage("unreadable shard", f": {reason}")
                return
            wait = RETRY_WAITS[failures]
            failures += 1
            logger.warning("Reading %s was interrupted (%s); retrying in %d s.", shards.name(shard), reason, wait)
        time.sleep(wait)


def _may_pass(shards: Shards, error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        # fsspec raises it whenever a web server does not describe a file, also if it is overloaded or silent
        status = getattr(error.__cause__, "status", None)
        return _may_pass(shards, error.__cause__) if status is None else shards.remote and status in _PASSING_STATUS
    return shards.remote and (isinstance(error, asyncio.TimeoutError) or not isinstance(error, _LASTING))
