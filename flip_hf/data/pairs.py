"""Reads folders of pictures with texts beside them: `a.jpg` and `a.txt`.

This is the layout of captioning tools and of img2dataset's "files" format. A row is what the files would be as a sample
of a tar archive, except that the key ends at a name's last dot.
"""

import codecs
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flip_hf.data.files import OversizedFileError, read_file
from flip_hf.data.paths import FilesBelow
from flip_hf.data.reading import Reader
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.texts import MAX_JSON_BYTES

# Pictures per shard: few enough that shuffling shards mixes subfolders, many enough that a shard is worth opening.
_SHARD_ROWS = 256
IMAGE = "image"


class PairShards:
    """Pictures of a folder, each with the files of its stem; a row has `__key__`, `__url__`, `image`, and their bytes.

    Args:
        folder: path of the folder.
        pictures: paths of the pictures, relative to it.
        others: paths of other files, of which those with a picture's stem are read.
    """

    remote = False

    def __init__(self, folder: str, pictures: Sequence[str], others: Sequence[str]):
        self.folder = folder
        self.pictures = list(pictures)
        self._files = FilesBelow(folder)
        # Maps the extension in lower case to the spellings that occur.
        self._suffixes: dict[str, list[str]] = {}
        stems = {os.path.splitext(picture)[0] for picture in pictures}
        for other in others:
            stem, suffix = os.path.splitext(other)
            written = self._suffixes.setdefault(suffix[1:].lower(), []) if suffix and stem in stems else [suffix]
            if suffix not in written:
                written.append(suffix)
        self._wanted = tuple(self._suffixes)

    @property
    def columns(self) -> list[str]:
        return [IMAGE, *self._suffixes]

    @property
    def num_shards(self) -> int:
        return -(-len(self.pictures) // _SHARD_ROWS)

    def name(self, shard: int) -> str:
        """Returns the shard's name for messages."""
        return f"{self.folder} from {self.pictures[shard * _SHARD_ROWS]}"

    def select(self, *columns: str | None) -> "PairShards":
        """Returns the same pictures with only these files; see [`ParquetShards.select`]."""
        wanted = {
            part for column in columns if column for name in column.split(";") for part in (name, name.split(".")[0])
        }
        shards = PairShards(self.folder, self.pictures, [])
        shards._suffixes = self._suffixes
        shards._wanted = tuple(name for name in self._suffixes if name in wanted)
        return shards

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row number, row) of a shard; see [`TarShards.read`]. Pictures are opened where they are used."""
        begin = shard * _SHARD_ROWS
        for index, picture in enumerate(self.pictures[begin + first : begin + _SHARD_ROWS], start=first):
            if part is None or index % part.count == part.index:
                yield index, self._row(picture)

    def _row(self, picture: str) -> dict[str, Any]:
        stem = os.path.splitext(picture)[0]
        row: dict[str, Any] = {"__key__": stem, "__url__": self.folder}
        try:
            row[IMAGE] = self._files.allow(picture)
        except RefusedSample as refused:
            row[IMAGE] = refused
        for name in self._wanted:
            row[name] = next(
                (text for suffix in self._suffixes[name] if (text := self._text(stem + suffix)) is not None), None
            )
        return row

    def _text(self, path: str) -> bytes | RefusedSample | None:
        """Returns the bytes of a file, or None if it does not exist."""
        try:
            return read_file(self._files.allow(path).path, MAX_JSON_BYTES).removeprefix(codecs.BOM_UTF8)
        except FileNotFoundError:
            return None
        except RefusedSample as refused:
            return refused
        except OversizedFileError:
            return RefusedSample("oversized file")
        except OSError:
            return RefusedSample("unreadable text file")
