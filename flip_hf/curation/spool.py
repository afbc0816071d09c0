"""Keeps the samples of a data set on disk while they are shuffled: files of rows, each written whole or not at all.

A track is the part of a shard that one worker reads in one go, from its first row on; its rows are spooled in files one
after the other, so that a killed process loses what it held in memory, and no more.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flip_hf.console.files import is_plain_file, replacing
from flip_hf.curation.contents import LABEL, LIST, NONE, TEXT, forms_of
from flip_hf.curation.findings import places_of
from flip_hf.curation.state import damaged, make_folder
from flip_hf.data.texts import is_unicode

# A row for each sample; of one that cannot be used, only where it is, its name and the reason.
SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("refused", pa.string()),
        ("image", pa.binary()),
        ("extension", pa.string()),
        ("captions", pa.string()),  # JSON, by column
        ("forms", pa.string()),  # of the captions, a letter for each column
        ("checksum", pa.uint32()),  # of the image and the captions, CRC-32
    ]
)
_OF_USABLE = ("image", "extension", "captions", "forms", "checksum")
# Extensions by which images are found in tar shards; those of other formats are called img.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
OTHER_EXTENSION = "img"
_MAX_LABEL = 2**31 - 1
# A file ends with the row that brings it to one of these.
FILE_BYTES = 64 * 2**20
FILE_ROWS = 2048
# Files that are open at once.
_OPEN = 128
_NAME = re.compile(r"\d{8,}-\d{6,}\.arrow")


@dataclass(frozen=True)
class Progress:
    """The state of a track after its last file.

    Attributes:
        files: number of files.
        next_row: the first row that is not spooled.
        is_finished: whether the whole track is.
        damage: what was found damaged in it, each as (reason, detail).
    """

    files: int = 0
    next_row: int = 0
    is_finished: bool = False
    damage: tuple[tuple[str, str], ...] = ()


class Spool:
    """The files of all tracks, which an earlier call may have left: what is not as it writes them is refused.

    Args:
        folder: their folder; made if it does not exist.
        shards: number of shards of the data.
        parts: tracks of each shard.
        columns: names of the columns of captions.

    Raises:
        ValueError: the folder is a link or a file.
    """

    def __init__(self, folder: Path, shards: int, parts: int, columns: Sequence[str]):
        self.folder = folder
        self.shards = shards
        self.parts = parts
        self.columns = columns
        make_folder(folder)

    def write(self, track: int, rows: list[dict[str, Any]], progress: Progress) -> None:
        """Writes the next file of a track; `progress` is the state after it."""
        about = json.dumps([progress.next_row, progress.is_finished, progress.damage])
        rows = [row if "refused" in row else {**row, "checksum": _checksum(row)} for row in rows]
        table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"progress": about})
        with replacing(self._path(track, progress.files - 1)) as path, pa.OSFile(str(path), "wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)

    def _path(self, track: int, number: int) -> Path:
        return self.folder / f"{track:08d}-{number:06d}.arrow"

    def paths(self) -> list[Path]:
        """Returns the files in the order of their tracks and rows."""
        return sorted(path for path in self.folder.glob("*.arrow") if not path.name.startswith("."))

    def progress(self) -> dict[int, Progress]:
        """Returns the state of every track that was begun.

        Raises:
            ValueError: a file is damaged, missing among others, or of something else.
        """
        found: dict[int, Progress] = {}
        for path in self.paths():
            if not _NAME.fullmatch(path.name) or not is_plain_file(path):
                raise damaged(path)
            track, number = map(int, path.stem.split("-"))
            next_row, is_finished, damage = _progress_of(path)
            before = found.get(track, Progress())
            follows = number == before.files and next_row >= before.next_row and not before.is_finished
            if track >= self.shards * self.parts or not follows:
                raise damaged(path)
            found[track] = Progress(before.files + 1, next_row, is_finished, before.damage + damage)
        return found

    def index(self) -> "Index":
        """Reads where the samples are, in the order of the data.

        Raises:
            ValueError: a file is damaged.
        """
        places, files, numbers = ([np.empty(0, kind)] for kind in (np.uint64, np.int32, np.int32))
        refused: Counter[str] = Counter()
        forms: set[str] = set()
        for number, path in enumerate(self.paths()):
            rows = _open(path)
            self._check(path, rows)
            usable = rows["refused"].is_null().to_numpy()
            refused.update(rows["refused"].drop_null().to_pylist())
            forms.update(rows["forms"].drop_null().unique().to_pylist())
            places.append(places_of(rows["shard"].to_numpy(), rows["row"].to_numpy())[usable])
            numbers.append(np.flatnonzero(usable).astype(np.int32))
            files.append(np.full(len(numbers[-1]), number, np.int32))
        place = np.concatenate(places)
        order = np.argsort(place)
        return Index(place[order], np.concatenate(files)[order], np.concatenate(numbers)[order], refused, forms)

    def _check(self, path: Path, rows: pa.Table) -> None:
        """Checks the values of a file but for images and captions; see [`spooled_sample`].

        Raises:
            ValueError: one is missing, or no such value is written.
        """
        shard = int(path.stem.split("-")[0]) // self.parts
        is_usable = rows["refused"].is_null()
        forms = rows["forms"].drop_null().unique().to_pylist()
        is_sound = (
            not any(rows[name].null_count for name in ("shard", "row", "key"))
            and all(rows[name].is_valid().equals(is_usable) for name in _OF_USABLE)
            and set(rows["shard"].unique().to_pylist()) <= {shard}
            and set(rows["extension"].drop_null().unique().to_pylist()) <= {*EXTENSIONS.values(), OTHER_EXTENSION}
            and all(len(form) == len(self.columns) and set(form) <= {TEXT, LIST, LABEL, NONE} for form in forms)
        )
        if not is_sound:
            raise damaged(path)

    def refused(self) -> Iterator[dict[str, Any]]:
        """Yields the shard, row, key and reason of samples that cannot be used, in the order of tracks."""
        for path in self.paths():
            rows = _open(path).select(["shard", "row", "key", "refused"])
            yield from rows.filter(rows["refused"].is_valid()).to_pylist()


@dataclass(frozen=True)
class Index:
    """Places of the N usable samples.

    Attributes:
        places: (N,), in the data; see `places_of`.
        files: (N,), number of the spool's file.
        rows: (N,), row in the file.
        refused: number of samples that cannot be used, by reason.
        forms: the forms of captions that occur.
    """

    places: np.ndarray
    files: np.ndarray
    rows: np.ndarray
    refused: Counter[str]
    forms: set[str]

    def take(self, order: np.ndarray) -> "Index":
        """Returns the samples of some numbers, in their order."""
        return Index(self.places[order], self.files[order], self.rows[order], self.refused, self.forms)


def _progress_of(path: Path) -> tuple[int, bool, tuple[tuple[str, str], ...]]:
    try:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_file(file).schema
        next_row, is_finished, damage = json.loads(schema.metadata[b"progress"])
        found = tuple((reason, detail) for reason, detail in damage)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError):
        raise damaged(path) from None
    is_sound = type(next_row) is int and next_row >= 0 and isinstance(is_finished, bool)
    if not (is_sound and all(isinstance(text, str) for each in found for text in each) and schema.equals(SCHEMA)):
        raise damaged(path)
    return next_row, is_finished, found


@lru_cache(_OPEN)
def _open(path: Path) -> pa.Table:
    """Maps a file into memory; only what is used of it is read.

    Raises:
        ValueError: it is damaged.
    """
    try:
        rows = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        rows.validate(full=True)  # else places of values could be outside of the file
    except (pa.ArrowException, OSError, ValueError):
        raise damaged(path) from None
    if not rows.schema.equals(SCHEMA):
        raise damaged(path)
    return rows


def spooled_sample(path: Path, row: int, columns: Sequence[str]) -> dict[str, Any]:
    """Reads one usable sample of a file, as a row of [`SCHEMA`] with `captions` parsed.

    Raises:
        ValueError: the file is damaged, or the captions are not of the forms in it.
    """
    sample = _open(path).slice(row, 1).to_pylist()[0]
    if sample["checksum"] != _checksum(sample):
        raise damaged(path)
    try:
        captions = json.loads(sample["captions"])
    except (ValueError, RecursionError):
        raise damaged(path) from None
    is_sound = isinstance(captions, dict) and all(map(_is_caption, captions.values()))
    if not is_sound or forms_of(captions, columns) != sample["forms"]:
        raise damaged(path)
    return {**sample, "captions": captions}


def _checksum(sample: dict[str, Any]) -> int:
    return zlib.crc32(sample["captions"].encode(), zlib.crc32(sample["image"]))


def _is_caption(value: Any) -> bool:
    """Returns whether a value is a `CaptionValue` that can be written."""
    if isinstance(value, int):
        return not isinstance(value, bool) and 0 <= value <= _MAX_LABEL
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and is_unicode(text) for text in texts)
