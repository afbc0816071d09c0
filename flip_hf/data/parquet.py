"""Reads parquet files in small pieces, only the needed columns, and within bounds on memory.

The `parquet` builder of `datasets` reads whole row groups with all their columns, and trusts the sizes they claim: a
picture of 500 MB can hide in 22 kB. Arrow's own reader is used here with bounds; see `parquet_pages.py`.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features, Image
from datasets.features.features import Json
from datasets.table import cast_array_to_feature
from pyarrow.parquet import ParquetFile

from flip_hf.data.files import MAX_FILE_BYTES, is_remote, open_at
from flip_hf.data.parquet_pages import (
    MAX_FOOTER_BYTES,
    Chunk,
    GuardedFile,
    OversizedPartError,
    SmallerBatchError,
    check_footer,
)
from flip_hf.data.paths import FilePolicy
from flip_hf.data.reading import Reader
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.texts import read_json
from flip_hf.redaction import redact, shown

# Rows are read in batches of about this size, as far as the footer can be trusted.
_BATCH_BYTES = 32 * 2**20
_MAX_BATCH_ROWS = 4096
# A column is read in steps of this size, or page by page if pages are larger.
_BUFFER_BYTES = 2**18
# Memory of a Python object, of which each value of a list becomes one.
_OBJECT_BYTES = 64
_OF_ANY_LENGTH = (pa.types.is_binary, pa.types.is_string, pa.types.is_large_binary, pa.types.is_large_string)
# Columns that name a sample in messages; see `sample_key`.
_NAMES = ("__key__", "__url__")


@dataclass(frozen=True)
class _Open:
    """An opened file: its reader, the underlying file, and the columns to read with their features."""

    reader: ParquetFile
    file: GuardedFile
    columns: dict[str, Any]


class ParquetShards:
    """Parquet files, each a shard, whose rows are dictionaries of the selected columns.

    Args:
        files: paths or URLs.
        features: types of the columns, as in a data set's card; by default those of the first sound file.
        paths: the files that a column of paths may name, if there is such a column.

    Raises:
        FileNotFoundError: a local file does not exist, or no file can be opened.
        ValueError: none is a parquet file.
    """

    def __init__(self, files: Sequence[str], features: Features | None = None, paths: FilePolicy | None = None):
        self.urls = tuple(files)
        self.files = paths
        self.remote = any(is_remote(url) for url in self.urls)
        self.selected: tuple[str, ...] | None = None
        self.columns, found = self._first_schema()
        self.features: dict[str, Any] = found if features is None else dict(features)
        # A card says which classes the labels of all files are of; without one, each file says it for itself.
        self._classes = {} if features is not None else _class_names(found)

    @property
    def num_shards(self) -> int:
        return len(self.urls)

    def name(self, shard: int) -> str:
        """Returns the shard's name for messages."""
        return shown(self.urls[shard])

    def select(self, *columns: str | None) -> "ParquetShards":
        """Returns the same files with only these columns.

        Args:
            columns: their names; dots lead into nested values, `;` separates alternatives.
        """
        wanted = [name for column in columns if column for name in column.split(";")]
        shards = copy.copy(self)
        shards.selected = (*(part for name in wanted for part in (name, name.split(".")[0])), *_NAMES)
        return shards

    def read(
        self, shard: int, first: int, part: Reader | None, damage: Callable[[str], None]
    ) -> Iterator[tuple[int, dict]]:
        """Yields (row number, row) of a shard; see [`TarShards.read`].

        A row group that is damaged or too large is reported and skipped; the rows after it keep their numbers. A cell
        that is too large, or cannot be converted to a Python value, is a [`RefusedSample`].

        Raises:
            Exception: of many types, if the file cannot be opened or the connection is lost.
        """
        with open_at(self.urls[shard]) as file:
            opened = self._open(file)
            begin = 0
            for group in range(opened.reader.metadata.num_row_groups):
                rows = opened.reader.metadata.row_group(group).num_rows
                if rows < 0:
                    raise ValueError("a row group with a negative number of rows")
                if max(first, begin) < begin + rows:
                    yield from _read_group(opened, group, begin, first, part, damage)
                begin += rows

    def _open(self, file: Any) -> _Open:
        check_footer(file)
        guarded = GuardedFile(file)
        reader = _reader(guarded)
        schema = reader.schema_arrow
        names = [name for name in schema.names if self.selected is None or name in self.selected]
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have the same name: {', '.join(names)}")
        if not set(names) - set(_NAMES):
            raise ValueError(f"it has none of the columns wanted, only: {', '.join(schema.names[:32])}")
        self._check_classes(schema, names)
        columns = {name: self._feature(name, schema.field(name).type) for name in names}
        leaves = [reader.schema.column(index) for index in range(len(reader.schema))]
        lists = [leaf for leaf in leaves if leaf.max_repetition_level and leaf.path.split(".")[0] in _first(names)]
        texts = [leaf.path for leaf in lists if leaf.physical_type == "BYTE_ARRAY"]
        if texts:  # as indices, so that a list of a few bytes cannot become a million copies of one text
            reader = _reader(guarded, metadata=reader.metadata, read_dictionary=texts)
        return _Open(reader, guarded, columns)

    def _check_classes(self, schema: pa.Schema, names: Sequence[str]) -> None:
        """Refuses labels that mean other classes than those of the first file, as in a folder of several data sets."""
        labels = [name for name in names if name in self._classes]
        own = _class_names(_features_of(schema)) if labels else {}
        for name in labels:
            if own.get(name, self._classes[name]) != self._classes[name]:
                first = self.name(0)
                raise ValueError(f"its classes in {name!r} are not those of {first!r}: give the data sets separately")

    def _feature(self, name: str, kind: pa.DataType) -> Any:
        """Returns the type that a column must be cast to or parsed as, or None if it needs no conversion."""
        feature = self.features.get(name)
        try:
            differs = feature is not None and Features({name: feature}).arrow_schema.field(name).type != kind
        except Exception:  # a type that only `datasets` can make
            differs = True
        return feature if differs or isinstance(feature, Json) else None

    def _first_schema(self) -> tuple[list[str], dict[str, Any]]:
        """Returns the columns and features of the first sound file; damaged ones are counted when they are read."""
        for url in self.urls:
            if "://" not in url and not os.path.exists(url):
                raise FileNotFoundError(f"There is no file {shown(url)!r}.")
        problem: Exception = FileNotFoundError("There is no file.")
        for number, url in enumerate(self.urls):
            try:
                with open_at(url) as file:
                    check_footer(file)
                    schema = _reader(GuardedFile(file)).schema_arrow
                    return schema.names, _features_of(schema)
            except Exception as error:  # schemas, connections: any type
                problem = error if number == 0 else problem
        kind = FileNotFoundError if isinstance(problem, FileNotFoundError) else ValueError
        raise kind(f"{self.name(0)!r} cannot be read as parquet: {redact(str(problem))}.") from problem


def _reader(file: GuardedFile, **options: Any) -> ParquetFile:
    return ParquetFile(
        file,
        pre_buffer=False,
        buffer_size=_BUFFER_BYTES,
        thrift_string_size_limit=MAX_FOOTER_BYTES,
        thrift_container_size_limit=1_000_000,
        **options,
    )


def _first(names: Sequence[str]) -> set[str]:
    """Returns the possible first parts of columns' paths; a name that contains dots has several."""
    return {name.split(".")[0] for name in names}


def _class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """Returns the names of classes by the columns whose labels are stored with them."""
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _features_of(schema: pa.Schema) -> dict[str, Any]:
    """Returns the types of columns, as stored in the file or derived from Arrow's, where there is such a type."""
    stored: dict = {}
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"] or {}
    except (ValueError, LookupError, TypeError, RecursionError):
        pass  # no features are stored, or not in a readable form
    features: dict[str, Any] = {}
    for field in schema:
        for metadata in ({"info": {"features": {field.name: stored.get(field.name)}}}, None):
            if metadata is not None and field.name not in stored:
                continue
            try:
                one = pa.schema([field], metadata={"huggingface": json.dumps(metadata)} if metadata else None)
                features[field.name] = Features.from_arrow_schema(one)[field.name]
                break
            except Exception:  # a type that this version of `datasets` does not know
                continue
    return {name: Image(decode=False) if isinstance(each, Image) else each for name, each in features.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Row groups
# ---------------------------------------------------------------------------------------------------------------------


def _read_group(
    opened: _Open, group: int, begin: int, first: int, part: Reader | None, damage: Callable[[str], None]
) -> Iterator[tuple[int, dict]]:
    """Yields the rows of a row group; the first has the number `begin`."""
    file = opened.file
    end = begin + opened.reader.metadata.row_group(group).num_rows
    row = max(first, begin)
    try:
        chunks, rows = _plan(opened, group)
    except OversizedPartError:
        damage("oversized row group")
        return
    while row < end:
        file.watch(chunks, rows)
        try:
            for number, values in _read_batches(opened, group, rows, begin, row, part):
                if number >= end:
                    return
                if values is not None:
                    yield number, values
                row = number + 1
        except Exception as error:  # Arrow raises many types for damaged data
            if file.failure is not None:
                raise
            cause = file.refusal or error
            if isinstance(cause, SmallerBatchError) and cause.rows < rows:
                rows = cause.rows
                continue
            oversized = isinstance(cause, (OversizedPartError, SmallerBatchError, MemoryError, pa.ArrowCapacityError))
            damage("oversized row group" if oversized else "damaged row group")
            return
        if row < end:
            damage("truncated row group")
            return


def _plan(opened: _Open, group: int) -> tuple[list[Chunk], int]:
    """Returns the chunks of the wanted columns in a row group, and the number of rows to read at once.

    Raises:
        OversizedPartError: cells of a fixed size are too large, even if they are empty.
    """
    metadata = opened.reader.metadata.row_group(group)
    chunks: list[Chunk] = []
    size = sum(_fixed_size(opened.reader.schema_arrow.field(name).type) for name in opened.columns)
    for index in range(metadata.num_columns):
        column = metadata.column(index)
        leaf = opened.reader.schema.column(index)
        if column.path_in_schema.split(".")[0] not in _first(list(opened.columns)):
            continue
        starts = [column.data_page_offset, column.dictionary_page_offset or 0]
        start = min(place for place in starts if place > 0) if max(starts) > 0 else 0
        chunks.append(
            Chunk(
                start=start,
                end=start + max(0, column.total_compressed_size) + 100,  # some writers omit a header; PARQUET-816
                values=column.num_values,
                is_bytes=leaf.physical_type == "BYTE_ARRAY",
                has_lists=leaf.max_repetition_level > 0,
            )
        )
        size += max(leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0, 0)
        size += max(0, column.total_uncompressed_size) // max(1, metadata.num_rows)
        if leaf.max_repetition_level and column.num_values * max(8, leaf.length) > 16 * MAX_FILE_BYTES:
            raise OversizedPartError("too many values of lists")
    return chunks, max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(1, size)))


def _fixed_size(kind: pa.DataType) -> int:
    """Returns the bytes that an empty cell of a type with fixed-length lists takes.

    Raises:
        OversizedPartError: these are more than [`MAX_FILE_BYTES`].
    """
    children = [kind.field(index).type for index in range(kind.num_fields)]
    size = sum(_fixed_size(child) for child in children) or 8
    size *= kind.list_size if pa.types.is_fixed_size_list(kind) else 1
    if size > MAX_FILE_BYTES:
        raise OversizedPartError(f"cells of {size:,} bytes")
    return size


def _read_batches(
    opened: _Open, group: int, rows: int, begin: int, first: int, part: Reader | None
) -> Iterator[tuple[int, dict | None]]:
    """Yields (row number, row) from row `first` on, with None in place of other readers' rows."""
    number = begin
    names = list(opened.columns)
    for batch in opened.reader.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
        opened.file.begin_batch()
        if number + batch.num_rows > first:
            cells = _Cells(batch, opened)
            for index in range(max(0, first - number), batch.num_rows):
                mine = part is None or (number + index) % part.count == part.index
                yield number + index, cells.row(index) if mine else None
        number += batch.num_rows


class _Cells:
    """The rows of a batch, converted to Python one by one, as a million rows may share a text that Arrow holds once."""

    def __init__(self, batch: pa.RecordBatch, opened: _Open):
        self.features = {name: each for name, each in opened.columns.items() if each is not None}
        self.arrays = {name: batch.column(name) for name in opened.columns}
        large = batch.nbytes > MAX_FILE_BYTES
        self.checked = {name for name, array in self.arrays.items() if large or _can_grow(array.type)}

    def row(self, index: int) -> dict[str, Any]:
        return {name: self._cell(name, array, index) for name, array in self.arrays.items()}

    def _cell(self, name: str, array: pa.Array, index: int) -> Any:
        if name in self.checked and _size(array.slice(index, 1)) > MAX_FILE_BYTES:
            return RefusedSample("oversized file")
        feature = self.features.get(name)
        try:
            if isinstance(feature, Json):
                text = array[index].as_py()
                return read_json(text) if isinstance(text, (bytes, str)) else text
            if feature is not None:
                return cast_array_to_feature(array.slice(index, 1), feature)[0].as_py()
            return array[index].as_py()
        except RefusedSample as refused:
            return refused
        except UnicodeDecodeError:
            return RefusedSample("text is not UTF-8")
        except (ArithmeticError, ValueError):  # a date beyond Python's range, or a value beyond its type's
            return RefusedSample("damaged value")


def _can_grow(kind: pa.DataType) -> bool:
    """Returns whether a cell may be larger in Python than its share of Arrow's memory."""
    children = [kind.field(index).type for index in range(kind.num_fields)]
    listed = pa.types.is_dictionary(kind) or (children and not pa.types.is_struct(kind))
    return bool(listed) or any(_can_grow(child) for child in children)


def _size(array: pa.Array) -> int:
    """Returns the bytes that an array's values take as Python values."""
    if isinstance(array, pa.ExtensionArray):
        return _size(array.storage)
    if isinstance(array, pa.DictionaryArray):
        if not _has_lengths(array.dictionary.type):
            return array.nbytes
        return _total(_lengths(array.dictionary).take(array.indices))
    if isinstance(array, pa.StructArray):
        return sum(_size(child) for child in array.flatten())
    if pa.types.is_nested(array.type):
        values = array.flatten() if hasattr(array, "flatten") else array
        return _OBJECT_BYTES * len(values) + (_size(values) if values is not array else array.nbytes)
    return _total(_lengths(array)) if _has_lengths(array.type) else array.nbytes


def _lengths(array: pa.Array) -> Any:
    return pc.call_function("binary_length", [array])


def _total(numbers: Any) -> int:
    return pc.call_function("sum", [numbers]).as_py() or 0


def _has_lengths(kind: pa.DataType) -> bool:
    return any(test(kind) for test in _OF_ANY_LENGTH)
