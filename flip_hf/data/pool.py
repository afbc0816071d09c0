"""The held-out pairs that a run is validated on: found once, and kept in a file of the run's folder.

Reading them out of the training data at every evaluation would cost a pass over all of it. So the data are read from
their beginning, in an order of shards that is mixed and always the same, until there are as many pairs as are wanted;
what is read on the way is bounded. Every evaluation of the run, resumed or not, then sees the same pairs.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flip_hf.data.decode import RefusedSample, image_bytes
from flip_hf.data.holdout import image_key
from flip_hf.data.reading import Reader, read_rows, row_bytes
from flip_hf.data.sources import Source, open_source
from flip_hf.data.targets import Captions
from flip_hf.data.texts import MAX_CAPTIONS

logger = logging.getLogger(__name__)

# What is read in search of pairs, at most, of all sources together; and what those found may have.
MAX_ROWS = 250_000
MAX_READ_BYTES = 8 * 2**30
MAX_POOL_BYTES = 2**30
# A pool this small tells little: in one of 100 images, one more that is found is a whole percent.
FEW = 100

PAIRS = "pairs.parquet"
ABOUT = "about.json"
_SEED = 0  # of the order of shards, whatever the run's
_ROW_GROUP = 32


@dataclass
class Pool:
    """Held-out images with their captions.

    Attributes:
        images: encoded, by key; see [`image_key`].
        captions: of each, none where no texts are read.
        rows: that were read to find them.
        read_bytes: how much these had.
        held_bytes: how much the images have.
    """

    images: dict[str, bytes] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0
    read_bytes: int = 0
    held_bytes: int = 0

    def add(self, image: Any, captions: list[str]) -> None:
        """Adds a pair, or another caption to an image that is there already.

        Raises:
            RefusedSample: there is no image that can be read.
        """
        key = image_key(image)
        if key not in self.images:
            encoded = image_bytes(image)
            key = key or ""  # bytes that were read have one
            self.images[key] = encoded
            self.captions[key] = []
            self.held_bytes += len(encoded)
        known = self.captions[key]
        known += [caption for caption in captions if caption not in known][: MAX_CAPTIONS - len(known)]


@dataclass(frozen=True)
class PoolFacts:
    """Facts of a pool beside its pairs, as `about.json` has it.

    Attributes:
        wanted: what was asked for, by option.
        images: how many there are.
        captions: how many these have.
        rows: how many were read to find them.
        key: of the pool, from its images' keys: results of pools with another one cannot be compared.
    """

    wanted: dict[str, Any]
    images: int
    captions: int
    rows: int
    key: str

    def in_words(self) -> str:
        """One sentence for the log."""
        return (
            f"Validated on {self.images:,} held-out images with {self.captions:,} captions, found in {self.rows:,} rows"
        )


def collect(sources: list[Source], count: int) -> Pool:
    """Finds held-out pairs: of sources with a `holdout` those of it, of others all.

    Args:
        sources: their `target_column` holds captions, or is None.
        count: images wanted, of each source as many.
    """
    pool = Pool()
    read_captions = Captions()
    for number, source in enumerate(sources, start=1):
        wanted = count * number // len(sources)
        share = number / len(sources)
        for row in _rows(source):
            if len(pool.images) >= wanted or _is_spent(pool, share):
                break
            pool.rows += 1
            pool.read_bytes += row_bytes(row)
            if source.holdout and not source.is_held_out(row):
                continue
            try:
                captions = [] if source.target_column is None else read_captions(source.target(row))
                pool.add(source.image(row), captions)
            except RefusedSample:
                continue  # counted in training, where it is met too
    return pool


def _is_spent(pool: Pool, share: float) -> bool:
    limits = ((pool.rows, MAX_ROWS), (pool.read_bytes, MAX_READ_BYTES), (pool.held_bytes, MAX_POOL_BYTES))
    return any(used >= share * limit for used, limit in limits)


def _rows(source: Source) -> Iterator[dict]:
    rows = read_rows(source.shards, Reader(0, 1), epoch=0, seed=_SEED, report=lambda reason, detail: None)
    return (row for _, row in rows)


def write_pool(pool: Pool, folder: Path, wanted: dict[str, Any]) -> PoolFacts:
    """Writes a pool; `about.json` comes last, so that a pool that has it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).unlink(missing_ok=True)
    table = pa.table(
        {
            "image": pa.array(pool.images.values(), pa.binary()),
            "captions": pa.array(pool.captions.values(), pa.list_(pa.string())),
        }
    )
    pq.write_table(table, folder / PAIRS, row_group_size=_ROW_GROUP, compression="none")
    captions = sum(map(len, pool.captions.values()))
    key = image_key("".join(sorted(pool.images)).encode()) or ""
    facts = PoolFacts(wanted, len(pool.images), captions, pool.rows, key)
    (folder / ABOUT).write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")
    return facts


def read_facts(folder: Path) -> PoolFacts | None:
    """Reads what is known of a written pool; None where there is none."""
    try:
        facts = PoolFacts(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return facts if (folder / PAIRS).is_file() else None


def open_pool(folder: Path, captions: bool) -> Source:
    """Opens a written pool, whose targets are lists of captions, or none are read."""
    path = str(folder / PAIRS)
    if not captions:
        return open_source(path, image_column="image", kind="image")
    return open_source(path, image_column="image", target_column="captions")
