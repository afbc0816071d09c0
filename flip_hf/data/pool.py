"""Collects the held-out pairs for validation once, and keeps them in a file of the run's folder.

Reading them from the training data at every evaluation would cost a pass over all of it. Instead the data are read
once, in a fixed shuffled order of shards and within bounds, until there are enough pairs. Every evaluation of the run,
resumed or not, then sees the same pairs.
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
from flip_hf.data.texts import MAX_CAPTIONS

logger = logging.getLogger(__name__)

# Limits on what is read to find pairs, over all sources, and on the bytes of the pairs found.
MAX_ROWS = 250_000
MAX_READ_BYTES = 8 * 2**30
MAX_POOL_BYTES = 2**30
# A smaller pool says little: among 100 images, a single one is a whole percent.
FEW = 100

PAIRS = "pairs.parquet"
ABOUT = "about.json"
_SEED = 0  # of the order of shards, independent of the run's seed
_ROW_GROUP = 32


@dataclass
class Pool:
    """Held-out images with their captions.

    Attributes:
        images: encoded images by key; see [`image_key`].
        captions: captions by key, empty if no texts are read.
        rows: number of rows read to find them.
        read_bytes: bytes of these rows.
        held_bytes: bytes of the images.
    """

    images: dict[str, bytes] = field(default_factory=dict)
    captions: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0
    read_bytes: int = 0
    held_bytes: int = 0

    def add(self, image: Any, captions: list[str]) -> None:
        """Adds a pair, or another caption for an image that is already there.

        Raises:
            RefusedSample: the image cannot be read.
        """
        key = image_key(image)
        if key not in self.images:
            encoded = image_bytes(image)
            key = key or ""  # every image that was read has a key
            self.images[key] = encoded
            self.captions[key] = []
            self.held_bytes += len(encoded)
        known = self.captions[key]
        known += [caption for caption in captions if caption not in known][: MAX_CAPTIONS - len(known)]


@dataclass(frozen=True)
class PoolFacts:
    """Metadata of a pool, as stored in `about.json`.

    Attributes:
        wanted: the options that asked for it.
        images: number of images.
        captions: number of their captions.
        rows: number of rows read to find them.
        key: hash of the images' keys: results on pools with different keys are not comparable.
    """

    wanted: dict[str, Any]
    images: int
    captions: int
    rows: int
    key: str

    def in_words(self) -> str:
        """Describes the pool in a sentence for the log."""
        return (
            f"Validated on {self.images:,} held-out images with {self.captions:,} captions, found in {self.rows:,} rows"
        )


def collect(sources: list[Source], count: int) -> Pool:
    """Collects held-out pairs of sources with a `holdout`, and any pairs of other sources.

    Args:
        sources: the data; their `target_column` holds captions, or is None.
        count: number of images wanted, taken equally from each source.
    """
    pool = Pool()
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
                captions = [] if source.target_column is None else source.texts(row)
                pool.add(source.image(row), captions)
            except RefusedSample:
                continue  # training meets it, too, and counts it
    return pool


def _is_spent(pool: Pool, share: float) -> bool:
    limits = ((pool.rows, MAX_ROWS), (pool.read_bytes, MAX_READ_BYTES), (pool.held_bytes, MAX_POOL_BYTES))
    return any(used >= share * limit for used, limit in limits)


def _rows(source: Source) -> Iterator[dict]:
    rows = read_rows(source.shards, Reader(0, 1), epoch=0, seed=_SEED, report=lambda reason, detail: None)
    return (row for _, row in rows)


def write_pool(pool: Pool, folder: Path, wanted: dict[str, Any]) -> PoolFacts:
    """Writes a pool; `about.json` comes last, so a pool that has it is complete."""
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
    """Reads the metadata of a written pool, or returns None if there is none."""
    try:
        facts = PoolFacts(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return facts if (folder / PAIRS).is_file() else None


def open_pool(folder: Path, captions: bool) -> Source:
    """Opens a written pool; targets are lists of captions, or absent if `captions` is False."""
    path = str(folder / PAIRS)
    if not captions:
        return open_source(path, image_column="image", kind="image")
    return open_source(path, image_column="image", target_column="captions")
