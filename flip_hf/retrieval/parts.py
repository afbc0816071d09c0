"""One parquet file of features for each block: written whole or not at all, and read in bounded memory."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_hf.console.files import is_plain_file, replacing
from flip_hf.retrieval.blocks import Block, Ending, Sample

PATTERN = "part-*.parquet"
_METADATA = b"flip_hf"
# Rows that are read at once in a search: 64 MB of features of width 512.
READ_ROWS = 2**16
_ROW_GROUP = 2**13
# What is read of a sample that was found.
_SAMPLE = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("captions", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True)
class Part:
    """The contents of a file about its block.

    Attributes:
        block: the block.
        identity: digest of the model, the data and the options that the features are made of.
        images, captions: numbers of both.
        ending: what was refused, and whether the shard ends.
    """

    block: Block
    identity: str
    images: int
    captions: int
    ending: Ending


def part_path(folder: Path, block: Block) -> Path:
    """Returns the path of a block's file; names sort in the order of the data."""
    return folder / f"part-{block.shard:05d}-{block.number:05d}.parquet"


def _vectors(values: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _lists(values: pa.Array, lengths: Sequence[int]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def write_part(
    folder: Path, part: Part, samples: Sequence[Sample], image_features: np.ndarray, text_features: np.ndarray | None
) -> None:
    """Writes a block's file: all of it, on disk, before it has its name.

    Args:
        folder: an existing folder.
        part: what the file says of its block.
        samples: its N samples.
        image_features: (N, E), written as float16.
        text_features: (M, E) of the samples' M captions, one after the other; None if only images are encoded.
    """
    lengths = [len(sample.captions) for sample in samples]
    texts = pa.array([caption for sample in samples for caption in sample.captions], pa.string())
    columns: dict[str, pa.Array] = {
        "key": pa.array([sample.key for sample in samples], pa.string()),
        "shard": pa.array([part.block.shard] * len(samples), pa.int32()),
        "row": pa.array([sample.row for sample in samples], pa.int64()),
        "captions": _lists(texts, lengths),
        "image_features": _vectors(image_features),
    }
    if text_features is not None:
        columns["text_features"] = _lists(_vectors(text_features), lengths)
    about = {"block": part.block, "identity": part.identity, "captions": part.captions, **asdict(part.ending)}
    table = pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(about, sort_keys=True).encode()})
    with replacing(part_path(folder, part.block)) as path:
        # Features do not shrink, and a search reads them faster as they are.
        pq.write_table(table, path, row_group_size=_ROW_GROUP, compression="none", use_dictionary=False)


def read_part(path: Path) -> Part:
    """Reads what a file says of its block.

    Raises:
        ValueError: it is damaged, or no file of features.
    """
    if not is_plain_file(path):
        raise ValueError(f"{path} is not a complete file of features: it is a link, or no file.")
    try:
        metadata = pq.read_metadata(path)
        about: dict[str, Any] = json.loads((metadata.metadata or {})[_METADATA])
        refused = [(row, key, reason) for row, key, reason in about["refused"]]
        damage = [(reason, detail) for reason, detail in about["damage"]]
        ending = Ending(about["rows"], about["is_last"], refused, damage)
        part = Part(Block(*about["block"]), about["identity"], metadata.num_rows, about["captions"], ending)
        _check(part)
        return part
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete file of features: {error}.") from error


def _check(part: Part) -> None:
    """Checks the types of what a file says, which may have come from anyone.

    Raises:
        ValueError: one is wrong.
    """
    ending = part.ending
    numbers = [*part.block, part.captions, ending.rows, *(row for row, _, _ in ending.refused)]
    texts = [part.identity, *(text for _, *texts in ending.refused for text in texts)]
    texts += [text for pair in ending.damage for text in pair]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("wrong value: a number")
    if not all(isinstance(text, str) for text in texts) or not isinstance(ending.is_last, bool):
        raise ValueError("wrong value: a text")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns every error that a damaged file causes into one that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise ValueError(f"{path} is damaged ({error}). The command that made it writes it again.") from error


def read_features(path: Path, width: int, rows: int | None = None) -> Iterator[np.ndarray]:
    """Yields the image features of a file, float16 (N, E), [`READ_ROWS`] at a time.

    Args:
        path: the file.
        width: E.
        rows: how many it must have, if that is known.

    Raises:
        ValueError: it is damaged.
    """
    with _reading(path), pq.ParquetFile(path, memory_map=True) as file:
        kind = file.schema_arrow.field("image_features").type
        if kind != pa.list_(pa.float16(), width) or rows not in (None, file.metadata.num_rows):
            raise ValueError(f"{file.metadata.num_rows} rows of {kind}")
        for batch in file.iter_batches(READ_ROWS, columns=["image_features"], use_threads=False):
            vectors = batch.column(0)
            yield vectors.flatten().to_numpy().reshape(len(vectors), width)


def read_samples(path: Path, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Returns `key`, `shard`, `row` and `captions` of some rows of a file, in the order of `numbers`.

    Raises:
        ValueError: it is damaged.
    """
    with _reading(path):
        table = pq.read_table(path, columns=_SAMPLE.names, memory_map=True).cast(_SAMPLE)
        return table.take(pa.array(numbers, pa.int64())).to_pylist()
