"""Reads lists of pictures: tables in CSV, TSV or JSON lines whose rows name a picture's file and its caption.

The readers of `datasets` stop at the first line that does not parse, Arrow's crashes the process at a deeply nested
one, and an unclosed quote turns the rest of a file into one text. Here rows are read within bounds, and a broken row
costs only itself.
"""

import codecs
import copy
import csv
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from flip_hf.data.files import StoredFile, is_remote, open_at
from flip_hf.data.paths import FilesBelow
from flip_hf.data.reading import Reader
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.texts import MAX_JSON_BYTES, read_json
from flip_hf.redaction import shown

JSON_LINES = (".jsonl", ".ndjson")
LIST_EXTENSIONS = (".csv", ".tsv", *JSON_LINES)
# Rows per shard: shuffling the shards mixes a sorted list, and a reader parses at most this many rows to resume.
_SHARD_ROWS = 256
# A row with more lines has a quote that is never closed.
_MAX_LINES = 64
_MAX_LINE_BYTES = MAX_JSON_BYTES
_DELIMITERS = "\t,;|"
# Lines from which the columns of JSON lines are taken.
_LINES_LOOKED_AT = 32

_Line = tuple[int, bytes | None]  # offset, and content or None if it is too long


@dataclass(frozen=True)
class _Form:
    """The format of a list's rows.

    Attributes:
        columns: names of the columns.
        delimiter: separator of the values; None for JSON lines.
        start: offset of the first row, in bytes.
    """

    columns: tuple[str, ...]
    delimiter: str | None
    start: int


class _Lines:
    """The lines of a file from an offset on; those taken since [`begin`] can be given back."""

    def __init__(self, file: IO[bytes], offset: int):
        self._file = file
        self._offset = offset
        self._returned: deque[_Line] = deque()
        self.taken: list[_Line] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Returns the next line.

        Raises:
            csv.Error: it is too long, or there are too many lines since [`begin`].
        """
        if len(self.taken) == _MAX_LINES:
            raise csv.Error("too many lines")
        line = self._returned.popleft() if self._returned else self._read()
        if line[1] == b"":
            if self.taken:  # within a row
                raise csv.Error("the file ends")
            raise StopIteration
        self.taken.append(line)
        if line[1] is None:
            raise csv.Error("too long")
        # Text that is not UTF-8 is reported where it is used; a file's name may have any bytes.
        return line[1].decode("utf-8", "surrogateescape")

    def _read(self) -> _Line:
        offset = self._offset
        line = self._file.readline(_MAX_LINE_BYTES + 1)
        self._offset += len(line)
        if len(line) <= _MAX_LINE_BYTES:
            return offset, line
        while line and not line.endswith(b"\n"):
            line = self._file.readline(_MAX_LINE_BYTES)
            self._offset += len(line)
        return offset, None

    def begin(self) -> None:
        """Forgets the lines taken so far."""
        self.taken = []

    def give_back(self) -> None:
        """Gives back all taken lines but the first, which is broken while they may be sound."""
        self._returned.extendleft(reversed(self.taken[1:]))


def _rows(file: IO[bytes], form: _Form, offset: int) -> Iterator[tuple[int, dict | None]]:
    """Yields (offset, row) of every row from `offset` on, None for a broken row; empty lines are skipped."""
    lines = _Lines(file, offset)
    split = None if form.delimiter is None else csv.reader(lines, delimiter=form.delimiter, strict=True)
    while True:
        lines.begin()
        try:
            values: Any = next(lines if split is None else split)
        except StopIteration:
            return
        except csv.Error:
            if not lines.taken:
                return
            lines.give_back()
            yield lines.taken[0][0], None
            continue
        if not values or (isinstance(values, str) and not values.strip()):
            continue
        row = _parsed(values) if isinstance(values, str) else _named(values, form.columns)
        if row is None:
            lines.give_back()
        yield lines.taken[0][0], row


def _parsed(line: str) -> dict | None:
    try:
        row = read_json(line)
    except RefusedSample:
        return None
    return row if isinstance(row, dict) else None


def _named(values: list[str], columns: tuple[str, ...]) -> dict | None:
    return dict(zip(columns, values, strict=True)) if len(values) == len(columns) else None


def _form_of(path: str) -> _Form:
    """Infers the format of a list from its name and its first lines.

    Raises:
        ValueError: the list has no such lines, or they are not text.
        OSError: the list cannot be read.
    """
    if not is_remote(path) and not os.path.exists(path):
        raise FileNotFoundError(f"There is no file {shown(path)!r}.")
    with open_at(path) as file:
        begin = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(begin)
        head = file.readline(_MAX_LINE_BYTES)
        if b"\0" in head or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{shown(path)} is not text in UTF-8: save it as UTF-8.")
        if not head.strip():
            raise ValueError(f"{shown(path)} is empty or begins with an empty line.")
        if path.lower().endswith(JSON_LINES):
            file.seek(begin)
            form = _Form((), None, begin)
            rows = (row for _, row in itertools.islice(_rows(file, form, begin), _LINES_LOOKED_AT))
            columns = dict.fromkeys(str(name) for row in rows if row is not None for name in row)
            if not columns:
                raise ValueError(f"None of the first lines of {shown(path)} is a JSON object.")
            return _Form(tuple(columns), None, begin)
    text = head.decode("utf-8", "replace")
    delimiter = max(_DELIMITERS, key=text.count)
    columns = next(csv.reader([text], delimiter=delimiter), [])
    return _Form(tuple(name.strip() for name in columns), delimiter, begin + len(head))


def list_columns(path: str) -> tuple[str, ...]:
    """Returns the names of a list's columns; see [`ListShards`] for what it raises."""
    return _form_of(path).columns


def _folder_of(file: str) -> str:
    return file.rpartition("/")[0] if is_remote(file) else os.path.dirname(os.path.abspath(file))


class ListShards:
    """Lists in CSV, TSV or JSON lines, in shards of a few hundred rows.

    A row is a dictionary of the columns, with `__key__`, the picture's path as written in the list, and `__url__`. A
    CSV file is in UTF-8 and begins with the names of its columns. The delimiter is a tab, comma, semicolon or `|`,
    whichever is most frequent in the first line.

    Args:
        files: paths or URLs.
        root: the folder that pictures must be in; by default each list's own. Paths are relative to the list.

    Raises:
        ValueError: a list is empty, or not text in UTF-8.
        OSError: a list cannot be read.
    """

    def __init__(self, files: Sequence[str], root: str | None = None):
        self.files = tuple(files)
        self.remote = any(is_remote(file) for file in self.files)
        self._folders = [_folder_of(file) for file in self.files]
        self._policies = [FilesBelow(root or folder) for folder in self._folders]
        self._forms = [_form_of(file) for file in self.files]
        self.columns = list(dict.fromkeys(name for form in self._forms for name in form.columns))
        self._image = ""
        self._wanted: set[str] | None = None
        self._shards = [place for number in range(len(self.files)) for place in self._places(number)]

    def _places(self, number: int) -> Iterator[tuple[int, int, int]]:
        """Yields where the shards of a list begin: (number of the list, byte offset, number of rows before)."""
        with open_at(self.files[number]) as file:
            form = self._forms[number]
            file.seek(form.start)
            for row, (offset, _) in enumerate(_rows(file, form, form.start)):
                if row % _SHARD_ROWS == 0:
                    yield number, offset, row

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def name(self, shard: int) -> str:
        """Returns the shard's name for messages."""
        number, _, row = self._shards[shard]
        return f"{shown(self.files[number])} from row {row + 1:,}"

    def select(self, image: str, target: str | None, /) -> "ListShards":
        """Returns the same lists with only the column that names the picture and that of the target."""
        names = [name for column in (image, target) if column for name in column.split(";")]
        shards = copy.copy(self)
        shards._image = image
        shards._wanted = {part for name in names for part in (name, name.split(".")[0])}
        return shards

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row number, row) of a shard; see [`TarShards.read`]. A broken line yields a refused row."""
        number, offset, before = self._shards[shard]
        with open_at(self.files[number], offset) as file:
            rows = itertools.islice(_rows(file, self._forms[number], offset), _SHARD_ROWS)
            for index, (_, row) in enumerate(rows):
                if index >= first and (part is None or index % part.count == part.index):
                    yield index, self._row(number, before + index, row)

    def _row(self, number: int, index: int, values: dict | None) -> dict[str, Any]:
        url = self.files[number]
        if values is None:
            row = dict.fromkeys(self._wanted or self.columns, RefusedSample("damaged line"))
            return {**row, "__key__": f"row {index + 1:,}", "__url__": url}
        path = values.get(self._image)
        row = {name: value for name, value in values.items() if self._wanted is None or name in self._wanted}
        row |= {"__key__": path if isinstance(path, str) else f"row {index + 1:,}", "__url__": url}
        if isinstance(path, str) and path.strip():
            row[self._image] = self._picture(number, path.strip())
        return row

    def _picture(self, number: int, path: str) -> StoredFile | RefusedSample:
        folder = self._folders[number]
        try:
            if is_remote(folder):
                return self._policies[number].allow(path if "://" in path else f"{folder}/{path}")
            return self._policies[number].allow(path if "://" in path else os.path.join(folder, path))
        except RefusedSample as refused:
            return refused

    def check_pictures(self, rows: Sequence[dict], data: str) -> None:
        """Checks, before work begins, that pictures of some rows are where the list says.

        Raises:
            ValueError: not one is there; the message names one, and where it was looked for.
        """
        found = [row.get(self._image) for row in rows]
        stored = [each for each in found if isinstance(each, StoredFile)]
        outside = [each for each in found if isinstance(each, RefusedSample) and each.reason.startswith("path")]
        if outside and not stored:
            name = next(row["__key__"] for row in rows if row.get(self._image) in outside)
            hint = (
                "Pictures are not downloaded: download them first, with img2dataset or a similar tool."
                if "://" in name
                else "Pictures must be below the list's own folder: move the list to a folder above them."
            )
            raise ValueError(f"The list {data!r} names {shown(name)!r}, which is not in its folder. {hint}")
        if stored and not any(is_remote(each.path) or os.path.exists(each.path) for each in stored):
            raise ValueError(
                f"None of the first {len(stored)} pictures that {data!r} names exists, such as {stored[0].path!r}: "
                "paths are relative to the list."
            )
