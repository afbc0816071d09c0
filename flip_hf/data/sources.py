"""Opens any data set as one kind of stream: rows with undecoded images, in shards."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Image, IterableDataset, load_dataset_builder, load_from_disk
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from flip_hf.data import scenes, shapes
from flip_hf.data.decode import RefusedSample
from flip_hf.data.files import (
    MAX_FILE_BYTES,
    check_regular_files,
    files_below,
    fill_in_variables,
    has_extension,
    is_remote,
    list_files,
)
from flip_hf.data.holdout import is_held_out
from flip_hf.data.parquet import ParquetShards
from flip_hf.data.paths import FilePolicy, FilesBelow, permitted
from flip_hf.data.reading import DatasetShards, Reader, Shards, read_rows, take_rows
from flip_hf.data.splits import UnknownSplit, check_only_split, configurations, pick_files
from flip_hf.data.tar import TarShards
from flip_hf.data.texts import MAX_JSON_BYTES, check_json_lines, read_json
from flip_hf.redaction import redact, shown

EMBEDDED = {data.name: data for data in (shapes.DATA, scenes.DATA)}
USUAL_COLUMNS = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "img"),
    "caption": ("caption", "text", "txt", "captions"),
    "label": ("label", "labels", "cls"),
}
EITHER = "either"  # a label or a caption
SHARD_EXTENSIONS = (".tar", ".parquet")
# What `datasets` opens by itself.
_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "state.json", "dataset_info.json", "dataset_dict.json")
# Tar shards have no schema: the columns are those of the first rows, any one of which may be damaged.
_ROWS_LOOKED_AT = 32


@dataclass(frozen=True)
class Source:
    """An opened data set.

    Attributes:
        shards: its rows, images undecoded.
        image_column: where the image is; dots lead into nested values (`json.url`), `;` parts alternatives.
        target_column: where the caption, or in evaluation the label, is; None of data that are opened as images alone.
        name: what the user called it, without its credentials: messages, results and checkpoints name it so.
        class_names: names of the classes, if `target_column` has them.
        files: what images may name by a path; None where they are bytes.
        has_text_targets: whether `target_column` holds texts, as far as the first rows tell.
        holdout: the share of its images that is held out; see `holdout.py`.
    """

    shards: Shards
    image_column: str
    target_column: str | None
    name: str
    class_names: tuple[str, ...] | None = None
    files: FilePolicy | None = None
    has_text_targets: bool = False
    holdout: float = 0.0

    def image(self, row: dict) -> Any:
        """The encoded image of a row, see [`column_value`], or the file of it.

        Raises:
            RefusedSample: it is a path that `files` does not allow; see [`permitted`].
        """
        return permitted(column_value(row, self.image_column), self.files)

    def target(self, row: dict) -> Any:
        """The caption or label of a row, see [`column_value`]; None of images alone."""
        return None if self.target_column is None else column_value(row, self.target_column)

    def is_held_out(self, row: dict) -> bool:
        """Tells whether a row is of the held-out part; one without a usable image is of neither."""
        if not self.holdout:
            return False
        try:
            return is_held_out(self.image(row), self.holdout)
        except RefusedSample:
            return False

    def rows(self) -> Iterator[dict]:
        """All rows that can be read and are not held out, in their own order."""
        rows = read_rows(self.shards, Reader(0, 1), epoch=0, seed=None, report=lambda reason, detail: None)
        return (row for _, row in rows if not self.is_held_out(row))


def column_value(row: dict, column: str) -> Any:
    """The value under a column name; None where there is nothing.

    Dots lead into nested dictionaries and JSON texts; of alternatives (`jpg;png`) the first that is there counts.

    Raises:
        RefusedSample: the value was too large to be read, or is in a text that is no JSON or too much of it.
    """
    for name in column.split(";"):
        value = _nested_value(row, name)
        if isinstance(value, RefusedSample):
            raise value
        if value is not None:
            return value
    return None


def _nested_value(row: dict, column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, RefusedSample):
            return value
        if isinstance(value, (bytes, str)):
            value = read_json(value)
        value = value.get(part) if isinstance(value, dict) else None
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def _open(data: str, config: str | None, split: str) -> Shards:
    if os.path.isdir(data):
        return _open_folder(data, config, split)
    if has_extension(data, SHARD_EXTENSIONS):
        return _open_files(list_files(data))
    if is_remote(data):
        for extension in SHARD_EXTENSIONS:
            files = files_below(data, extension)
            if files:
                return _open_files(pick_files(data, files, extension, config, split, shown(data)))
        raise FileNotFoundError(f"There are no {' or '.join(SHARD_EXTENSIONS)} files in {shown(data)!r}.")
    if data.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no file or folder {shown(data)!r}.")
    return open_named(data, config, split)


def _open_folder(path: str, config: str | None, split: str) -> Shards:
    check_regular_files(path, _TABLES)
    for table in files_below(path, "metadata.jsonl"):
        check_json_lines(table)
    name = shown(path)
    if any(os.path.exists(os.path.join(path, table)) for table in ("dataset_dict.json", "state.json")):
        return _open_saved(path, split, name)
    for extension in SHARD_EXTENSIONS:
        files = files_below(path, extension)
        if files:
            return _open_files(pick_files(path, files, extension, config, split, name))
    described = configurations(path)
    if config is not None or any("data_files" in each for each in described.values()):
        return open_named(path, config, split)
    builder = load_dataset_builder("imagefolder", data_dir=path)
    splits = list(builder.config.data_files)  # pyright: ignore[reportArgumentType]
    if splits == ["train"]:
        check_only_split(path, split, name)
        split = "train"
    elif split not in splits:
        raise UnknownSplit(name, split, list(map(str, splits)))
    return _as_shards(builder.as_streaming_dataset(split=split), False, FilesBelow(path))


def _open_saved(path: str, split: str, name: str) -> Shards:
    """What `save_to_disk` wrote: several splits, or one that may know which it is."""
    below = FilesBelow(path)
    table = os.path.join(path, "dataset_dict.json")
    if os.path.exists(table):
        with open(table, "rb") as file:
            known = list(read_json(file.read(MAX_JSON_BYTES + 1))["splits"])
        if split not in known:
            raise UnknownSplit(name, split, known)
        return _as_shards(load_from_disk(os.path.join(path, split)), remote=False, files=below)
    dataset: Any = load_from_disk(path)
    if dataset.split is None:
        check_only_split(path, split, name)
    elif split != str(dataset.split):
        raise UnknownSplit(name, split, [str(dataset.split)])
    return _as_shards(dataset, remote=False, files=below)


def _open_files(files: Sequence[str]) -> Shards:
    return TarShards(files) if has_extension(files[0], ".tar") else ParquetShards(files)


def open_named(data: str, config: str | None, split: str) -> Shards:
    """A data set of the Hub, or a folder in its layout."""
    try:
        builder = load_dataset_builder(data, config)
    except ConnectionError as error:
        raise FileNotFoundError(
            f"There is no {shown(data)!r} here, and the Hub cannot be asked for it: {redact(str(error))}."
        ) from error
    files: dict[str, list[str]] = builder.config.data_files  # pyright: ignore[reportAssignmentType]
    if not isinstance(builder, WebDataset) and not _is_plain_parquet(builder):
        below = None
        if isinstance(builder, FolderBasedBuilder):  # which lists the repository's files itself
            below = FilesBelow(_common_folder(itertools.chain.from_iterable(files.values())))
        return _as_shards(builder.as_streaming_dataset(split=split), remote=True, files=below)
    if split not in files:
        raise UnknownSplit(shown(data), split, list(map(str, files)))
    if isinstance(builder, WebDataset):
        return TarShards(files[split])
    return ParquetShards(files[split], builder.info.features)


def _is_plain_parquet(builder: Any) -> bool:
    """Whether a builder reads parquet files as they are: a card may ask for filters, columns or types of its own."""
    config = builder.config
    return isinstance(builder, Parquet) and config.columns is config.filters is config.features is None


def _common_folder(files: Iterable[str]) -> str:
    return os.path.commonprefix([str(file) for file in files]).rpartition("/")[0]


def _has_texts(rows: list[dict], column: str, kinds: tuple[type, ...] = (str, bytes)) -> bool:
    try:
        return any(isinstance(column_value(row, column), kinds) for row in rows)
    except RefusedSample:  # met, and counted, when it is read
        return False


def _named_paths(rows: list[dict], column: str, data: str | Sequence[str]) -> FilePolicy | None:
    """What a column that the user named may name in turn, where it holds paths: files below the data set's folder."""
    if not _has_texts(rows, column, (str,)):
        return None
    first = data if isinstance(data, str) else data[0]
    if os.path.isdir(first):
        return FilesBelow(first)
    if first.endswith(SHARD_EXTENSIONS):
        return FilesBelow(os.path.dirname(list_files(first)[0]) or ".")
    return FilesBelow(first if is_remote(first) else f"hf://datasets/{first}")


def _as_shards(dataset: Any, remote: bool, files: FilePolicy | None = None) -> DatasetShards:
    if not isinstance(dataset, IterableDataset):
        dataset = dataset.to_iterable_dataset(num_shards=min(64, max(1, len(dataset))))
    # Plain bytes, text and numbers: what cannot be decoded is for us to count, not an error inside the stream.
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return DatasetShards(dataset, remote, files)


def _first_rows(shards: Shards, data: str, split: str) -> list[dict]:
    problems: list[str] = []
    rows = read_rows(shards, Reader(0, 1), epoch=0, seed=None, report=lambda *told: problems.append(", ".join(told)))
    first = take_rows((row for _, row in rows), _ROWS_LOOKED_AT if isinstance(shards, TarShards) else 1, MAX_FILE_BYTES)
    if not first:
        why = f" ({problems[0]})" if problems else ""
        raise ValueError(f"The data set {data!r} has no samples in its split {split!r}{why}.")
    return first


def _find_column(columns: list[str], wanted: str | None, kind: str, data: str) -> str:
    found = [name for name in USUAL_COLUMNS[kind] if name in columns]
    if wanted is None and found:
        return found[0]
    if wanted is None or not any(part in columns or part.split(".")[0] in columns for part in wanted.split(";")):
        named = f"has no {kind} column {wanted!r}" if wanted else f"has no {kind} column of a usual name"
        raise ValueError(
            f"The data set {data!r} {named}. Its columns are: {', '.join(sorted(columns))}. Name the right one with "
            f"--{kind}_column."
        )
    return wanted


def _find_columns(
    columns: list[str], image_column: str | None, target_column: str | None, kind: str, data: str
) -> tuple[str | None, str]:
    """The column of the caption or label, None of images alone, and that of the image."""
    if kind == EITHER:
        kind = _label_or_caption(columns, data)
    target = None if kind == "image" else _find_column(columns, target_column, kind, data)
    return target, _find_column(columns, image_column, "image", data)


def _label_or_caption(columns: list[str], data: str) -> str:
    """What the columns of usual names hold, `label` or `caption`.

    Raises:
        ValueError: there are both.
    """
    found = {kind: [name for name in USUAL_COLUMNS[kind] if name in columns] for kind in ("label", "caption")}
    if found["label"] and found["caption"]:
        raise ValueError(
            f"The data set {data!r} has labels ({found['label'][0]}) and captions ({found['caption'][0]}). Say which "
            f"are to be evaluated: --label_column {found['label'][0]}, or --eval_caption_column {found['caption'][0]}."
        )
    return "caption" if found["caption"] else "label"


def _features(shards: Shards) -> dict[str, Any] | None:
    if isinstance(shards, DatasetShards):
        return shards.dataset.features
    return shards.features if isinstance(shards, ParquetShards) else None


def open_source(
    data: str | Sequence[str],
    *,
    split: str = "train",
    config: str | None = None,
    image_column: str | None = None,
    target_column: str | None = None,
    kind: str = "caption",
) -> Source:
    """Opens a data set for streaming.

    Args:
        data: `shapes` or `scenes` (embedded), a Hub id, a folder (tar or parquet shards, an image folder, or what
            `save_to_disk` wrote), or tar or parquet files as a path, URL or pattern (`*`, `{0000..0099}`), or several
            such files. URLs are whatever fsspec opens: `https://`, `hf://`, `s3://` with s3fs installed, and so on; all
            but `http(s)://` may name a folder of shards. Variables in a URL, `${TOKEN}`, are filled in.
        split: name of the split.
        config: name of the Hub data set's configuration.
        image_column: column of the image; found by its usual names if None. Of a table, it may be named to hold paths
            of image files, below the data set's own folder.
        target_column: column of the caption or label; found by its usual names if None.
        kind: what `target_column` holds, `caption` or `label`, or `either` of them, whichever is there; or `image`: it
            is not looked for, images do alone.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the split is unknown, there is no sample, or a column is missing; the message lists the columns.
    """
    name = shown(data) if isinstance(data, str) else f"{shown(data[0])} and {len(data) - 1} more"
    data = fill_in_variables(data) if isinstance(data, str) else [fill_in_variables(each) for each in data]
    if isinstance(data, str) and data in EMBEDDED:
        shards = _as_shards(EMBEDDED[data].load(split), remote=False)
    elif isinstance(data, str):
        shards = _open(data, config, split)
    else:
        shards = _open_files([file for pattern in data for file in list_files(pattern)])
    if isinstance(shards, ParquetShards):  # their schema tells the columns, and no others are ever read
        columns = shards.columns
        target_column, found = _find_columns(columns, image_column, target_column, kind, name)
        shards = shards.select(found, target_column)
        rows = _first_rows(shards, name, split)
    else:
        rows = _first_rows(shards, name, split)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        target_column, found = _find_columns(columns, image_column, target_column, kind, name)
    features = _features(shards)
    feature = features.get(target_column) if features and target_column else None
    files = shards.files if isinstance(shards, DatasetShards) else None
    if image_column is not None and not isinstance(shards, TarShards):
        files = files or _named_paths(rows, found, data)
    if image_column is None and isinstance(shards, TarShards):
        found = ";".join(USUAL_COLUMNS["image"])  # each sample has an extension of its own
    return Source(
        shards=shards,
        image_column=found,
        target_column=target_column,
        name=name,
        class_names=tuple(feature.names) if isinstance(feature, ClassLabel) else None,
        files=files,
        has_text_targets=target_column is not None and _has_texts(rows, target_column),
    )
