"""Collects what the examination of a data set finds, in memory that is bounded by a few numbers a sample."""

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from flip_hf.curation.duplicates import Looks
from flip_hf.curation.examination import Damage, Examined, Lengths
from flip_hf.curation.hashing import COLOURS

# What is kept in memory of a usable sample.
RECORD = np.dtype(
    [
        ("place", np.uint64),
        ("image", np.uint64, 2),
        ("caption", np.uint64),
        ("looks", np.uint64),
        ("has_looks", np.bool_),
        ("colours", np.uint8, COLOURS),
        ("width", np.int32),
        ("height", np.int32),
        ("bytes", np.int32),
    ]
)
_ROW_BITS = 40
# Samples named for each reason, the first ones of the data.
EXAMPLES = 5


def places_of(shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Packs (shard, row) into a number each, uint64, in the order of the data."""
    return shards.astype(np.uint64) << np.uint64(_ROW_BITS) | rows.astype(np.uint64)


def shards_and_rows(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpacks the numbers of [`places_of`]."""
    rows = places & np.uint64((1 << _ROW_BITS) - 1)
    return (places >> np.uint64(_ROW_BITS)).astype(np.int32), rows.astype(np.int64)


def looks_of(records: np.ndarray) -> Looks:
    """Returns the looks in records of [`RECORD`]."""
    return Looks(records["looks"], records["colours"], records["has_looks"])


class Example(NamedTuple):
    """A sample that stands for others; those earlier in the data sort first."""

    shard: int
    row: int
    key: str


@dataclass
class Findings:
    """Everything found so far.

    Attributes:
        samples: number of samples seen, usable or not.
        refused: number of samples that training would skip, by reason.
        examples: the first samples of each reason.
        damage: losses larger than a sample, each with its number.
        lengths: lengths of the captions.
        captions: number of captions.
    """

    samples: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    damage: Counter[Damage] = field(default_factory=Counter)
    lengths: Lengths = field(default_factory=Lengths)
    captions: int = 0
    _records: list[np.ndarray] = field(default_factory=list)

    @property
    def usable(self) -> int:
        return self.samples - self.refused.total()

    def add(self, batch: Examined) -> None:
        """Adds a batch of samples."""
        samples = batch.samples
        self.samples += samples.num_rows
        self.damage.update(batch.damage)
        self.lengths.add(batch.lengths)
        usable = samples.filter(samples["refused"].is_null())
        self.captions += int(usable["captions"].to_numpy().sum())
        self._records.append(_records(usable))
        self._add_refused(samples.filter(samples["refused"].is_valid()).to_pylist())

    def _add_refused(self, rows: Iterable[dict]) -> None:
        for row in rows:
            reason = row["refused"]
            self.refused[reason] += 1
            known = self.examples.get(reason, [])
            example = Example(row["shard"], row["row"], row["key"])
            self.examples[reason] = heapq.nsmallest(EXAMPLES, [*known, example])

    def records(self) -> np.ndarray:
        """Returns the usable samples, as [`RECORD`], in the order of the data."""
        found = np.concatenate(self._records) if self._records else np.empty(0, RECORD)
        self._records = [found[np.argsort(found["place"])]]
        return self._records[0]


def _records(usable: pa.RecordBatch) -> np.ndarray:
    records = np.empty(usable.num_rows, RECORD)
    shards, rows = (usable[name].to_numpy() for name in ("shard", "row"))
    records["place"] = places_of(shards, rows)
    records["image"] = np.frombuffer(b"".join(usable["image_hash"].to_pylist()), np.uint64).reshape(-1, 2)
    records["caption"] = usable["caption_hash"].to_numpy()
    records["looks"] = usable["perceptual_hash"].fill_null(0).to_numpy()
    records["has_looks"] = usable["perceptual_hash"].is_valid().to_numpy(zero_copy_only=False)
    records["colours"] = np.frombuffer(b"".join(usable["colours"].to_pylist()), np.uint8).reshape(-1, COLOURS)
    for name in ("width", "height", "bytes"):
        records[name] = usable[name].to_numpy()
    return records
