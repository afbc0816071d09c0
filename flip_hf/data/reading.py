"""Deals the rows of a data set to readers in a repeatable order, and reads them whatever the weather.

A reader is one worker of one process. The order of shards and the part of each reader follow from the seed and the
epoch alone, so that a place in an epoch is two numbers: the reader's n-th shard and the row in it.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from datasets import Audio, Dataset, Image, IterableDataset, LargeList, List, Video

from flip_hf.data.paths import FilePolicy
from flip_hf.data.refusals import BadDataError
from flip_hf.redaction import redact

logger = logging.getLogger(__name__)

# Seconds between attempts to go on with a remote shard; then it is left.
RETRY_WAITS = (1, 2, 4, 8, 16)
# Failures that another attempt does not mend: what is not there, and what is wrong in a file itself.
_LASTING = (FileNotFoundError, PermissionError, ValueError, TypeError, LookupError, AssertionError)
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)

# So many shards in a row that give nothing but errors end the run.
MAX_BROKEN_SHARDS = 16

_OTHER_BYTES = 32  # of a number and the like

_MAX_SHARDS = 64  # of a table that is in one piece

_STRIDE = 7919  # a prime: consecutive shards begin far from each other

Place = tuple[int, int]  # (n-th shard of the reader, row in it)


@dataclass(frozen=True)
class Reader:
    """One of `count` readers, all workers of all processes together."""

    index: int
    count: int


class Shards(Protocol):
    """A data set in pieces that are read from their beginning, or from a row on."""

    remote: bool

    @property
    def num_shards(self) -> int: ...

    def name(self, shard: int) -> str:
        """What to call a shard in a message."""
        ...

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row's number, row) from row `first` on, `part`'s turns alone; see [`TarShards.read`]."""
        ...

    def select(self, image: str, target: str | None, /) -> "Shards":
        """The same rows, of which the columns of the image and of the target alone are read.

        Dots in their names lead into nested values, `;` parts alternatives.
        """
        ...


class DatasetShards:
    """A data set of `datasets` as shards.

    Args:
        table: yields rows; pictures, sounds and films in them are not decoded, but given as they are stored.
        remote: whether reading it may fail for a while and then work again.
        files: what its rows may name by a path; None where they hold bytes.
    """

    def __init__(self, table: Dataset | IterableDataset, remote: bool, files: FilePolicy | None = None):
        self.remote = remote
        self.files = files
        self._table = table
        self.dataset = _undecoded(table)

    @property
    def columns(self) -> list[str] | None:
        """The names of all columns; None where only the rows tell."""
        return None if self.dataset.features is None else list(self.dataset.features)

    def select(self, *columns: str | None) -> "DatasetShards":
        """The same rows, of which these columns alone are read; see [`ParquetShards.select`]."""
        names = {part for each in columns if each for name in each.split(";") for part in (name, name.split(".")[0])}
        kept = [name for name in self.columns or () if name in names]
        return DatasetShards(self._table.select_columns(kept), self.remote, self.files) if kept else self

    @property
    def num_shards(self) -> int:
        return self.dataset.num_shards

    def name(self, shard: int) -> str:
        """What to call a shard in a message."""
        return f"shard {shard}"

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row's number, row) of a shard; see [`Shards`]."""
        dataset = self.dataset.shard(self.num_shards, shard)
        rows: Any = dataset.skip(first) if first else dataset
        # Batches of one: in a DataLoader's worker, iterating a dataset itself deals the rows out again.
        for index, batch in enumerate(rows.iter(batch_size=1), start=first):
            if part is None or index % part.count == part.index:
                yield index, {name: values[0] for name, values in batch.items()}


def _undecoded(table: Dataset | IterableDataset) -> IterableDataset:
    """The rows as bytes, text and numbers: what cannot be decoded is for us to count, not an error of a stream."""
    if isinstance(table, Dataset):
        table = table.to_iterable_dataset(num_shards=min(_MAX_SHARDS, max(1, len(table))))
    for name, feature in (table.features or {}).items():
        stored = _as_stored(feature)
        if stored != feature:
            table = table.cast_column(name, stored)
    return table


def _as_stored(feature: Any) -> Any:
    """A feature whose pictures, sounds and films, at any depth, are not decoded."""
    if isinstance(feature, dict):
        return {name: _as_stored(each) for name, each in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return replace(feature, feature=_as_stored(feature.feature))
    return replace(feature, decode=False) if isinstance(feature, (Image, Audio, Video)) else feature


def row_bytes(row: Any) -> int:
    """About how much memory a row takes: its encoded bytes and texts, and a little for every other value."""
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
    """The first so many rows, or fewer where these have `max_bytes` (the last one counted)."""
    taken: list[dict] = []
    held = 0
    for row in itertools.islice(rows, count):
        taken.append(row)
        held += row_bytes(row)
        if held >= max_bytes:
            break
    return taken


def epoch_shards(num_shards: int, reader: Reader, epoch: int, seed: int | None) -> tuple[list[int], bool]:
    """The shards that a reader visits in an epoch, in order, and whether it must share their rows.

    With at least one shard a reader, each shard has one reader, and the readers with one shard more change every epoch.
    With fewer, all read all shards and take turns row by row. Either way every row has exactly one reader an epoch.
    """
    order = np.arange(num_shards)
    if seed is not None:
        order = np.random.default_rng((seed, epoch)).permutation(num_shards)
    if num_shards < reader.count:
        return order.tolist(), True
    return order[(reader.index + epoch) % reader.count :: reader.count].tolist(), False


def count_epoch_shards(num_shards: int, reader: Reader, epoch: int) -> int:
    """How many shards [`epoch_shards`] gives."""
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

    A remote shard that breaks off is opened again at the row where it did, after a wait. One that cannot be read on is
    left, and reading goes on with the next.

    Args:
        shards: the data.
        reader: whose rows.
        epoch: of which pass.
        seed: of the order of shards; their own order if None.
        start: the place to begin at.
        stop: the reader's n-th shard to end before; its last one is read if None.
        step: 2 reads every second of the reader's shards from `start` on, and so on.
        report: called with (reason, detail) for every shard that is damaged, by one of its readers.

    Raises:
        BadDataError: many shards in a row gave nothing but errors: not they are broken, but the way to them.
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

        # Turns begin with another reader in each shard and epoch, or small shards would all go to the first ones.
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
        except Exception as error:  # archives, connections, schemas: any kind
            told = redact(f"{type(error).__name__}: {error}")  # the client's own words may have the whole URL
            if failures == len(RETRY_WAITS) or not _may_pass(shards, error):
                damage("unreadable shard", f": {told}")
                return
            wait = RETRY_WAITS[failures]
            failures += 1
            logger.warning("Reading %s broke off (%s); again in %d s.", shards.name(shard), told, wait)
        time.sleep(wait)


def _may_pass(shards: Shards, error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        # fsspec's word for whatever keeps a web server from describing a file: that it is overloaded, or says nothing
        status = getattr(error.__cause__, "status", None)
        return _may_pass(shards, error.__cause__) if status is None else shards.remote and status in _PASSING_STATUS
    return shards.remote and (isinstance(error, asyncio.TimeoutError) or not isinstance(error, _LASTING))
