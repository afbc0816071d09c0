"""Checks the headers inside a parquet file before Arrow acts on them: a page of a few kB can claim, or be, 2 GiB.

A footer gives the size of everything, and may lie; Arrow allocates what the page headers claim. Both are checked here.
Sources: `parquet.thrift` of apache/parquet-format, and Thrift's compact protocol.
"""

import heapq
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from flip_hf.data.files import MAX_FILE_BYTES

# Footers have about 1 kB per column and row group, of which Arrow makes objects some hundred times as large.
MAX_FOOTER_BYTES = 16 * 2**20
_MAX_STRUCTS = 500_000
# Characters of all columns' paths, each times its depth: Arrow and pyarrow materialise every path.
_MAX_PATHS = 16 * 2**20
# pyarrow writes up to 1,024 cells per page, whatever their size: a page of 300 MB is sound for photos of 300 kB.
_MAX_PAGE_BYTES = 512 * 2**20
# Encoded pictures do not compress, and texts by less than ten times; only pages above MAX_FILE_BYTES are held to it.
_MAX_RATIO = 20
_MAX_PAGE_VALUES = 2**25
# Values of a list column in a row group, which could all belong to one row.
_MAX_LIST_VALUES = 2**24
# Bytes that one batch of rows may unpack beside its largest pages, and bytes that it may hold where cells can be many
# times as large as their stored form.
_MAX_BATCH_BYTES = 256 * 2**20
_MAX_REPEATED_BYTES = 128 * 2**20
_MAX_HEADER_BYTES = 2**20

_STOP = 0
_TRUE = 1
_FALSE = 2
_BYTE = 3
_I32 = 5
_DOUBLE = 7
_BINARY = 8
_LIST = 9
_SET = 10
_MAP = 11
_STRUCT = 12
_VARINTS = (4, _I32, 6)
_MAX_DEPTH = 32
# Fields of a page's header that describe each kind of page.
_DATA_PAGE = 5
_DICTIONARY_PAGE = 7
_DATA_PAGE_V2 = 8
_DELTA_BYTE_ARRAY = 7


class OversizedPartError(Exception):
    """A part of a file asks for more memory than any sound one does."""


class SmallerBatchError(Exception):
    """A batch asks for too much memory; one of `rows` rows may not."""

    def __init__(self, rows: int):
        super().__init__(rows)
        self.rows = rows


# ---------------------------------------------------------------------------------------------------------------------
# Thrift
# ---------------------------------------------------------------------------------------------------------------------


class _Thrift:
    """A walk through a structure in Thrift's compact protocol; raises `IndexError` if the data end early."""

    def __init__(self, data: bytes, place: int = 0):
        self.data = data
        self.place = place
        self.structs = 0

    def varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self.data[self.place]
            self.place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number in a parquet header has no end")

    def int32(self) -> int:
        value = self.varint() & 0xFFFFFFFF  # as Thrift itself truncates it
        return (value >> 1) ^ -(value & 1)

    def fields(self) -> Iterator[tuple[int, int]]:
        """Yields (field, type); the caller reads or skips the value."""
        self.structs += 1
        if self.structs > _MAX_STRUCTS:
            raise OversizedPartError("a parquet header with too many parts")
        field = 0
        while True:
            head = self.data[self.place]
            self.place += 1
            kind = head & 15
            if kind == _STOP:
                return
            field = field + (head >> 4) if head >> 4 else self.int32()
            yield field, kind

    def items(self) -> tuple[int, int]:
        """Returns (number, type) of a list's elements."""
        head = self.data[self.place]
        self.place += 1
        return self.varint() if head >> 4 == 15 else head >> 4, head & 15

    def skip(self, kind: int, depth: int = 0) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("a parquet header is nested too deeply")
        if kind in _VARINTS:
            self.varint()
        elif kind == _BINARY:
            length = self.varint()  # a separate statement, because it moves `place`, too
            self.place += length
        elif kind == _STRUCT:
            for _, each in self.fields():
                self.skip(each, depth + 1)
        elif kind in (_LIST, _SET):
            count, each = self.items()
            self._skip_items(count, (each,), depth)
        elif kind == _MAP:
            count = self.varint()
            kinds = self.data[self.place] if count else 0
            self.place += 1 if count else 0
            self._skip_items(count, (kinds >> 4, kinds & 15), depth)
        elif kind in (_BYTE, _DOUBLE):
            self.place += 1 if kind == _BYTE else 8
        elif kind not in (_TRUE, _FALSE):
            raise ValueError(f"a parquet header has a value of the unknown type {kind}")

    def _skip_items(self, count: int, kinds: tuple[int, ...], depth: int) -> None:
        for _ in range(count):
            for kind in kinds:
                self.skip(_BYTE if kind in (_TRUE, _FALSE) else kind, depth + 1)


# ---------------------------------------------------------------------------------------------------------------------
# The footer
# ---------------------------------------------------------------------------------------------------------------------


def check_footer(file: IO[bytes]) -> None:
    """Checks that a file ends as parquet files do, and that its footer is safe to pass to Arrow.

    Raises:
        OversizedPartError: the footer is too large, or would be in memory.
        ValueError: it is not a parquet file, or a damaged one.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    if size < 12 or tail[4:] != b"PAR1":
        raise ValueError("not a parquet file, or a truncated one" if size else "an empty file")
    (length,) = struct.unpack("<I", tail[:4])
    if length > size - 8:
        raise ValueError("the footer of the parquet file is damaged")
    if length > MAX_FOOTER_BYTES:
        raise OversizedPartError(f"the footer of the parquet file has {length:,} bytes")
    file.seek(size - 8 - length)
    try:
        _check_metadata(_Thrift(file.read(length)))
    except IndexError as error:
        raise ValueError("the footer of the parquet file is damaged") from error


def _check_metadata(footer: _Thrift) -> None:
    for field, kind in footer.fields():
        if field == 2 and kind == _LIST:
            count, each = footer.items()
            if each != _STRUCT:
                raise ValueError("the schema of the parquet file is damaged")
            _check_schema(footer, count)
        else:
            footer.skip(kind)


def _check_schema(footer: _Thrift, count: int) -> None:
    """Walks the schema, a tree in preorder."""
    above: list[list[int]] = []  # for every open group: (children to come, characters of its path)
    total = 0
    for _ in range(count):
        name = children = 0
        for field, kind in footer.fields():
            if (field, kind) == (4, _BINARY):
                name = footer.varint()
                footer.place += name
            elif (field, kind) == (5, _I32):
                children = footer.int32()
            else:
                footer.skip(kind)
        path = name + 1 + (above[-1][1] if above else 0)
        total += path * (len(above) + 1)
        if total > _MAX_PATHS:
            raise OversizedPartError("the schema of the parquet file is too large")
        if above:
            above[-1][0] -= 1
        above.append([children, path])
        while above and above[-1][0] <= 0:
            above.pop()


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """The pages of one column in one row group, as the footer describes them.

    Attributes:
        start, end: byte range in the file.
        values: number of values, nulls included; Arrow reads no page after these.
        is_bytes: whether values may have any length.
        has_lists: whether a row may have any number of values.
    """

    start: int
    end: int
    values: int
    is_bytes: bool
    has_lists: bool
    place: int = -1
    seen: int = 0
    # Bytes in memory: of the dictionary, of the page read last, and of all pages of the current batch.
    dictionary: int = 0
    last: int = 0
    batch: int = 0

    def begin(self) -> None:
        """Forgets the pages seen so far."""
        self.place = self.start
        self.seen = self.dictionary = self.last = self.batch = 0


@dataclass(frozen=True)
class _Page:
    """A page's header: the size of the page stored and unpacked, its content, and where it begins."""

    stored: int
    unpacked: int
    values: int
    is_dictionary: bool
    has_prefixes: bool
    begin: int


def _read_header(data: bytes, place: int) -> _Page:
    header = _Thrift(data, place)
    numbers: dict[tuple[int, int], int] = {}
    for field, kind in header.fields():
        if kind == _I32:
            numbers[0, field] = header.int32()
        elif kind == _STRUCT and field in (_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2):
            for part, each in header.fields():
                if each == _I32:
                    numbers[field, part] = header.int32()
                else:
                    header.skip(each)
        else:
            header.skip(kind)
    if header.place > len(data):
        raise IndexError
    page = _Page(
        stored=numbers.get((0, 3), -1),
        unpacked=numbers.get((0, 2), -1),
        values=max(numbers.get((_DATA_PAGE, 1), 0), numbers.get((_DATA_PAGE_V2, 1), 0)),
        is_dictionary=any(field == _DICTIONARY_PAGE for field, _ in numbers),
        has_prefixes=_DELTA_BYTE_ARRAY in (numbers.get((_DATA_PAGE, 2)), numbers.get((_DATA_PAGE_V2, 4))),
        begin=header.place,
    )
    if page.stored < 0 or page.unpacked < 0:
        raise ValueError("a page of the parquet file is damaged")
    return page


class GuardedFile:
    """A file for Arrow to read that returns the bytes of a page only after checking its header.

    Args:
        file: the underlying file.

    Attributes:
        failure: the exception raised by a read of `file` itself.
        refusal: the exception with which a page was refused.
    """

    closed = False

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.size = file.seek(0, os.SEEK_END)
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self._chunks: Sequence[Chunk] = ()
        self._rows = 1

    def watch(self, chunks: Sequence[Chunk], rows: int) -> None:
        """Checks the pages of these chunks from now on, for batches of `rows` rows."""
        for chunk in chunks:
            chunk.begin()
        self._chunks = chunks
        self._rows = rows
        self.refusal = None

    def begin_batch(self) -> None:
        """Resets the count of unpacked bytes to the pages read last, which are still in memory."""
        for chunk in self._chunks:
            chunk.batch = chunk.last

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        """Reads at most up to the end of the file, as the size may come from a forged number.

        Raises:
            OversizedPartError, SmallerBatchError: a page whose header is among the bytes asks for too much memory.
            ValueError: such a header is damaged.
        """
        try:
            place = self.file.tell()
            room = max(0, self.size - place)
            data = self.file.read(room if size < 0 else min(size, room))
        except Exception as error:
            self.failure = error
            raise
        try:
            for chunk in self._chunks:
                self._look(chunk, place, data)
        except Exception as error:
            self.refusal = self.refusal or error
            raise
        return data

    def _look(self, chunk: Chunk, place: int, data: bytes) -> None:
        if place >= chunk.end:
            return
        while chunk.place < min(place + len(data), chunk.end) and chunk.seen < chunk.values:
            page = self._header(chunk.place, place, data)
            if page.begin + page.stored > self.size:
                raise ValueError("a page of the parquet file is damaged")
            self._check(page, chunk)
            chunk.place = page.begin + page.stored

    def _header(self, at: int, place: int, data: bytes) -> _Page:
        if at >= place:
            try:
                page = _read_header(data, at - place)
                return _Page(**{**vars(page), "begin": place + page.begin})
            except IndexError:  # the header continues after what was read
                pass
        back = self.file.tell()
        self.file.seek(at)
        header = self.file.read(_MAX_HEADER_BYTES)
        self.file.seek(back)
        try:
            page = _read_header(header, 0)
        except IndexError as error:
            raise ValueError("a page of the parquet file is damaged") from error
        return _Page(**{**vars(page), "begin": at + page.begin})

    def _check(self, page: _Page, chunk: Chunk) -> None:
        too_dense = page.unpacked > MAX_FILE_BYTES and page.unpacked > _MAX_RATIO * page.stored
        if too_dense or max(page.stored, page.unpacked) > _MAX_PAGE_BYTES or page.values > _MAX_PAGE_VALUES:
            raise OversizedPartError(f"a page of {page.unpacked:,} bytes, stored in {page.stored:,}")
        chunk.seen += page.values
        if chunk.has_lists and chunk.seen > _MAX_LIST_VALUES:
            raise OversizedPartError(f"{chunk.seen:,} values of lists")
        if chunk.is_bytes and (page.is_dictionary or page.has_prefixes):
            self._check_cells(page, chunk)
        if page.is_dictionary:
            chunk.dictionary = page.unpacked
        else:
            chunk.last = page.unpacked
            chunk.batch += page.unpacked
        # A sound column can have one large page, and a dictionary that grew large before its writer abandoned it.
        held = sum(each.dictionary + each.batch for each in self._chunks)
        largest = heapq.nlargest(2, (size for each in self._chunks for size in (each.dictionary, each.last)))
        if held - sum(largest) > _MAX_BATCH_BYTES:
            self._ask_for_less(self._rows // 16)

    def _check_cells(self, page: _Page, chunk: Chunk) -> None:
        """Checks a page in which a few bits can repeat a cell as large as the page, again and again."""
        size = page.values * page.unpacked
        if chunk.has_lists:  # they are read as indices into the dictionary
            if page.unpacked > _MAX_BATCH_BYTES or (page.has_prefixes and size > 4 * _MAX_BATCH_BYTES):
                raise OversizedPartError(f"lists of up to {page.values:,} values of up to {page.unpacked:,} bytes")
        elif self._rows > 1 and self._rows * page.unpacked > _MAX_REPEATED_BYTES:
            self._ask_for_less(_MAX_REPEATED_BYTES // page.unpacked)

    def _ask_for_less(self, rows: int) -> None:
        if self._rows == 1:
            raise OversizedPartError("a row of which too much would be unpacked")
        raise SmallerBatchError(max(1, rows))
