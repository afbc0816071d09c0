"""Writes shards of samples, as tar files in WebDataset's layout or as parquet: the same samples give the same bytes."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, List, Value

from flip_hf.curation.contents import LABEL, LIST, TEXT
from flip_hf.data.captions import CaptionColumn

ShardFormat = Literal["tar", "parquet"]
FORMATS: tuple[ShardFormat, ...] = get_args(ShardFormat)
# A row group ends with the row that brings it to one of these.
_GROUP_ROWS = 128
_GROUP_BYTES = 256 * 2**20
_IMAGE = "image"


@dataclass(frozen=True)
class Column:
    """A column of captions.

    Attributes:
        source: its name in the data.
        name: its name in the shards.
        form: `TEXT`, `LIST` or `LABEL`, one for all samples.
        weight: how often training drew from it, relative to the others.
        classes: names of its labels' classes, the usual one first; empty if it holds texts.
    """

    source: str
    name: str
    form: str
    weight: float
    classes: tuple[tuple[str, ...], ...] = ()

    def value(self, captions: dict[str, Any]) -> Any:
        """Returns the value of a sample in the column's form; None if it has none."""
        value = captions.get(self.source)
        return [value] if self.form == LIST and isinstance(value, str) else value


def check_columns(columns: Sequence[CaptionColumn], kind: ShardFormat) -> None:
    """Checks that shards can hold some columns of captions.

    Raises:
        ValueError: two would have the same name, or the name of a class cannot be written.
    """
    written = [_json_name(column.name) if kind == "tar" else _name_of(column) for column in columns]
    if len({*written, _IMAGE}) <= len(written):
        raise ValueError(
            f"Caption columns would have one name in the shards: {', '.join(written)}. Give fewer to --caption_column."
        )
    for column in columns:
        for name in itertools.chain.from_iterable(column.labels.classes if kind == "tar" and column.labels else ()):
            if ";" in name:
                raise ValueError(
                    f"The class {name!r} has a semicolon in its name, which separates synonyms in the list of classes "
                    "of tar shards: give --format parquet, or other names with --class_names."
                )


def make_columns(columns: Sequence[CaptionColumn], forms: set[str]) -> tuple[Column, ...]:
    """Chooses the form of every column, lists where any sample has several captions.

    Args:
        columns: the columns of captions.
        forms: the forms that occur, each with a letter for every column.
    """
    made: list[Column] = []
    for number, column in enumerate(columns):
        letters = {form[number] for form in forms}
        form = next((letter for letter in (LABEL, LIST) if letter in letters), TEXT)
        named = () if column.labels is None else column.labels.classes
        classes = tuple(tuple(names) or (f"class {index}",) for index, names in enumerate(named))
        made.append(Column(column.name, _name_of(column), form, column.weight, classes))
    return tuple(made)


def _name_of(column: CaptionColumn) -> str:
    """Returns the first of the alternatives in a column's name."""
    return column.name.split(";")[0]


class Tar:
    """Tar shards: members `000000012.jpg`, and beside each a `.txt`, a `.cls`, or a `.json` of all columns.

    Args:
        columns: the columns of captions.
    """

    def __init__(self, columns: Sequence[Column]):
        self.columns = columns
        only = columns[0].form if len(columns) == 1 else None
        self._extension = {TEXT: "txt", LABEL: "cls"}.get(only or "", "json")

    def caption_column(self) -> str | None:
        """Returns the option `--caption_column` that reads the captions; None if it need not be given."""
        if self._extension != "json":
            return "cls" if self._extension == "cls" else None
        return _weighted([(f"json.{_json_name(column.name)}", column.weight) for column in self.columns])

    def names_classes(self, column: Column) -> bool:
        """Returns whether the shards themselves name the classes of a column's labels."""
        return False

    def write(self, path: Path, samples: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Writes a shard of numbered samples; see [`spooled_sample`]."""
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, sample in samples:
                _add(archive, _name(number, sample["extension"]), sample["image"])
                if self.columns:
                    _add(archive, _name(number, self._extension), self._text(sample["captions"]))

    def _text(self, captions: dict[str, Any]) -> bytes:
        if self._extension != "json":
            return str(self.columns[0].value(captions)).encode()
        values = {_json_name(column.name): column.value(captions) for column in self.columns}
        return json.dumps({name: value for name, value in values.items() if value is not None}).encode()


def _json_name(name: str) -> str:
    """Returns the name of a column in JSON, without dots, which lead into nested values."""
    return name.split(";")[0].removeprefix("json.").replace(".", "_")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no owner, and of the year 1970
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


class Parquet:
    """Parquet shards with the columns `image`, as `datasets` stores images, and those of captions under their names.

    Args:
        columns: the columns of captions.
    """

    def __init__(self, columns: Sequence[Column]):
        self.columns = columns
        self.features = Features({_IMAGE: Image(), **{column.name: _feature(column) for column in columns}})

    def caption_column(self) -> str | None:
        """Returns the option `--caption_column` that reads the captions; None if there are none."""
        return _weighted([(column.name, column.weight) for column in self.columns])

    def names_classes(self, column: Column) -> bool:
        """Returns whether the shards themselves name the classes of a column's labels, which have no synonyms then."""
        has_names = isinstance(self.features[column.name], ClassLabel)
        return has_names and all(len(names) == 1 for names in column.classes)

    def write(self, path: Path, samples: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Writes a shard of numbered samples; see [`spooled_sample`]."""
        schema = self.features.arrow_schema
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for group in _groups(samples):
                rows = [self._row(number, sample) for number, sample in group]
                writer.write_table(pa.Table.from_pylist(rows, schema))

    def _row(self, number: int, sample: dict[str, Any]) -> dict[str, Any]:
        image = {"bytes": sample["image"], "path": _name(number, sample["extension"])}
        return {_IMAGE: image, **{column.name: column.value(sample["captions"]) for column in self.columns}}


def _name(number: int, extension: str) -> str:
    return f"{number:09d}.{extension}"


def _groups(samples: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    group: list[tuple[int, dict[str, Any]]] = []
    held = 0
    for number, sample in samples:
        group.append((number, sample))
        held += len(sample["image"])
        if len(group) == _GROUP_ROWS or held >= _GROUP_BYTES:
            yield group
            group = []
            held = 0
    if group:
        yield group


def _feature(column: Column) -> Any:
    if column.form == LIST:
        return List(Value("string"))
    if column.form == TEXT:
        return Value("string")
    names = [names[0] for names in column.classes]
    return ClassLabel(names=names) if len(set(names)) == len(names) else Value("int64")


def _weighted(columns: Sequence[tuple[str, float]]) -> str | None:
    if len(columns) <= 1:
        return columns[0][0] if columns else None
    return " ".join(f"{name}:{weight!r}".removesuffix(".0") for name, weight in columns)


def layout_of(kind: ShardFormat, columns: Sequence[Column]) -> Tar | Parquet:
    """Returns the writer of a format."""
    return Tar(columns) if kind == "tar" else Parquet(columns)
