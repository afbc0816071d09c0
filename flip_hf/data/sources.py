"""Opens any data set as one kind of stream: rows with undecoded images, in shards."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import ClassLabel

from flip_hf.data import scenes, shapes
from flip_hf.data.captions import CaptionColumn, Prompts, Table, all_texts, draw_caption, feature_at, open_column
from flip_hf.data.columns import column_value, has_weights, is_among, read_weights
from flip_hf.data.decode import RefusedSample, choose_caption
from flip_hf.data.files import MAX_FILE_BYTES, fill_in_variables, is_remote, list_files
from flip_hf.data.holdout import is_held_out
from flip_hf.data.lists import ListShards
from flip_hf.data.opening import (
    EITHER,
    LISTED_COLUMNS,
    SHARD_EXTENSIONS,
    USUAL_COLUMNS,
    Wanted,
    open_files,
    open_shards,
)
from flip_hf.data.pairs import PairShards
from flip_hf.data.parquet import ParquetShards
from flip_hf.data.paths import FilePolicy, FilesBelow, permitted
from flip_hf.data.reading import DatasetShards, Reader, Shards, read_rows, take_rows
from flip_hf.data.tar import TarShards
from flip_hf.data.targets import Captions
from flip_hf.redaction import shown

EMBEDDED = {data.name: data for data in (shapes.DATA, scenes.DATA)}
# Tar shards have no schema: columns are taken from the first rows, any of which may be damaged.
_ROWS_LOOKED_AT = 32
_MAX_LISTED = 32  # columns listed in a message


@dataclass(frozen=True)
class Source:
    """An opened data set.

    Attributes:
        shards: its rows, images undecoded.
        image_column: column of the image; dots lead into nested values (`json.url`), `;` separates alternatives.
        target_column: column of the caption or, in evaluation, the label; None for data opened as images alone.
        name: the user's name for it, without credentials, as used in messages, results and checkpoints.
        class_names: names of the classes, if `target_column` has them.
        files: the files that image paths may name; None if images are bytes.
        has_text_targets: whether `target_column` holds texts, judging by the first rows.
        holdout: the fraction of its images that is held out; see `holdout.py`.
        captions: the columns that captions are drawn from, if there are several or they hold labels; empty if
            `target_column` holds the captions themselves.
    """

    shards: Shards
    image_column: str
    target_column: str | None
    name: str
    class_names: tuple[str, ...] | None = None
    files: FilePolicy | None = None
    has_text_targets: bool = False
    holdout: float = 0.0
    captions: tuple[CaptionColumn, ...] = ()

    @property
    def captions_from_labels(self) -> bool:
        """True if every caption is made of a label, so that many samples have equal ones."""
        return bool(self.captions) and all(column.labels is not None for column in self.captions)

    def image(self, row: dict) -> Any:
        """Returns the encoded image of a row, see [`column_value`], or its file.

        Raises:
            RefusedSample: it is a path that `files` does not allow; see [`permitted`].
        """
        return permitted(column_value(row, self.image_column), self.files)

    def target(self, row: dict) -> Any:
        """Returns the caption or label of a row, see [`column_value`], or None for images alone."""
        return None if self.target_column is None else column_value(row, self.target_column)

    def caption(self, row: dict, rng: np.random.Generator) -> str:
        """Draws the caption of a row; see [`choose_caption`] and [`draw_caption`].

        Raises:
            RefusedSample: it has none that can be used.
        """
        return draw_caption(row, self.captions, rng) if self.captions else choose_caption(self.target(row), rng)

    def texts(self, row: dict) -> list[str]:
        """Returns all captions that a row has as texts; see [`Captions`] and [`all_texts`].

        Raises:
            RefusedSample: it has none that can be used.
        """
        return all_texts(row, self.captions) if self.captions else Captions()(self.target(row))

    def is_held_out(self, row: dict) -> bool:
        """Returns whether a row is held out; False for a row without a usable image."""
        if not self.holdout:
            return False
        try:
            return is_held_out(self.image(row), self.holdout)
        except RefusedSample:
            return False

    def without_images(self) -> "Source":
        """Returns the same data without images, for the captions alone; with them if some are held out by image."""
        return self if self.holdout else replace(self, shards=self.shards.select("", self.target_column))

    def rows(self) -> Iterator[dict]:
        """Yields all readable rows that are not held out, in their own order."""
        rows = read_rows(self.shards, Reader(0, 1), epoch=0, seed=None, report=lambda reason, detail: None)
        return (row for _, row in rows if not self.is_held_out(row))


def _has_texts(rows: list[dict], column: str, kinds: tuple[type, ...] = (str, bytes)) -> bool:
    try:
        return any(isinstance(column_value(row, column), kinds) for row in rows)
    except RefusedSample:  # counted when it is read
        return False


def _named_paths(rows: list[dict], column: str, data: str | Sequence[str]) -> FilePolicy | None:
    """Returns the files that paths in a column named by the user may name: those below the data set's folder."""
    if not _has_texts(rows, column, (str,)):
        return None
    first = data if isinstance(data, str) else data[0]
    if os.path.isdir(first):
        return FilesBelow(first)
    if first.endswith(SHARD_EXTENSIONS):
        return FilesBelow(os.path.dirname(list_files(first)[0]) or ".")
    return FilesBelow(first if is_remote(first) else f"hf://datasets/{first}")


def _first_rows(shards: Shards, data: str, split: str | None) -> list[dict]:
    problems: list[str] = []
    rows = read_rows(
        shards, Reader(0, 1), epoch=0, seed=None, report=lambda *reasons: problems.append(", ".join(reasons))
    )
    many = isinstance(shards, (TarShards, ListShards))
    first = take_rows((row for _, row in rows), _ROWS_LOOKED_AT if many else 1, MAX_FILE_BYTES)
    if not first:
        why = f" ({problems[0]})" if problems else ""
        raise ValueError(f"The data set {data!r} has no samples in its split {split!r}{why}.")
    return first


def _find_column(columns: list[str], usual: tuple[str, ...], wanted: str | None, kind: str, data: str) -> str:
    found = [name for name in usual if name in columns]
    if wanted is None and found:
        return found[0]
    if wanted is None or not is_among(wanted, columns):
        named = f"has no {kind} column {wanted!r}" if wanted else f"has no {kind} column with a usual name"
        listed = sorted(columns)
        more = f" and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
        raise ValueError(
            f"The data set {data!r} {named}. Its columns are: {', '.join(listed[:_MAX_LISTED])}{more}. "
            f"{_what_is_missing(listed, kind)}"
        )
    return wanted


def _what_is_missing(columns: list[str], kind: str) -> str:
    """Advises what to do about a column that was not found."""
    if kind == "image" and "url" in columns:
        return "Pictures are not downloaded from URLs: download them first, with img2dataset or a similar tool."
    labels = next((name for name in USUAL_COLUMNS["label"] if name in columns), None)
    prompts = f"To make captions of the labels, give --caption_column {labels}."
    if kind == "caption" and set(columns) <= {"image", "label"}:
        texts = "Put a text beside each picture, a.txt beside a.jpg, or describe them in a metadata.jsonl."
        return texts if labels is None else f"{texts} {prompts}"
    if kind == "caption" and labels is not None:
        return f"Name the right one with --caption_column. {prompts}"
    return f"Name the right one with --{kind}_column."


def _find_columns(columns: list[str], wanted: Wanted, listed: bool, data: str) -> tuple[str | None, str]:
    """Finds the column of the caption or label, None for images alone, and that of the image.

    Args:
        columns: the existing columns.
        wanted: the columns to look for.
        listed: whether rows name files of pictures.
        data: the data set's name for messages.
    """
    usual = LISTED_COLUMNS if listed else USUAL_COLUMNS
    target = None if wanted.kind == "image" else _find_target(columns, wanted, usual, data)
    return target, _find_column(columns, usual["image"], wanted.image, "image", data)


def _find_target(columns: list[str], wanted: Wanted, usual: dict[str, tuple[str, ...]], data: str) -> str:
    """Finds the column of the caption or label; columns with weights become alternatives."""
    if wanted.target is None and wanted.likely is not None and is_among(wanted.likely, columns):
        return wanted.likely
    kind = _label_or_caption(columns, usual, data) if wanted.kind == EITHER else wanted.kind
    if wanted.weighted and wanted.target is not None and has_weights(wanted.target, columns):
        names = [name for name, _ in read_weights(wanted.target)]
        return ";".join(_find_column(columns, (), name, kind, data) for name in names)
    return _find_column(columns, usual[kind], wanted.target, kind, data)


def _label_or_caption(columns: list[str], usual: dict[str, tuple[str, ...]], data: str) -> str:
    """Returns the kind of target in the columns with usual names, `label` or `caption`.

    Raises:
        ValueError: both kinds exist.
    """
    found = {kind: [name for name in usual[kind] if name in columns] for kind in ("label", "caption")}
    if found["label"] and found["caption"]:
        raise ValueError(
            f"The data set {data!r} has labels ({found['label'][0]}) and captions ({found['caption'][0]}). Choose what "
            f"to evaluate: --label_column {found['label'][0]}, or --eval_caption_column {found['caption'][0]}."
        )
    return "caption" if found["caption"] else "label"


def _with_columns(
    shards: Shards, wanted: Wanted, data: str, split: str | None
) -> tuple[Shards, str, str | None, list[dict]]:
    """Returns the shards with only the columns of the image and the target, and their first rows."""
    listed = isinstance(shards, ListShards) or (isinstance(shards, ParquetShards) and shards.files is not None)
    rows: list[dict] = []
    columns = getattr(shards, "columns", None)  # known from a schema before anything is read
    if columns is None:
        rows = _first_rows(shards, data, split)
        columns = list(dict.fromkeys(column for row in rows for column in row))
    target, image = _find_columns(columns, wanted, listed, data)
    if isinstance(shards, PairShards) and wanted.target is None and target is not None:
        # Each row may have another kind of text.
        kinds = ("label", "caption") if wanted.kind == EITHER else (wanted.kind,)
        usual = next(USUAL_COLUMNS[kind] for kind in kinds if target in USUAL_COLUMNS[kind])
        target = ";".join(name for name in usual if name in columns)
    if isinstance(shards, TarShards) and wanted.image is None:
        image = ";".join(USUAL_COLUMNS["image"])  # each sample may have another extension
    shards = shards.select(image, target)
    return shards, image, target, rows or _first_rows(shards, data, split)


def _with_columns_of_tar(
    shards: TarShards, wanted: Wanted, data: str, split: str | None
) -> tuple[Shards, str, str | None, list[dict]]:
    """Does the same for tar shards, with keys that end at the last dot if no columns are found otherwise.

    Raises:
        ValueError: columns are missing, or the pictures and texts of samples are not adjacent.
    """
    try:
        found = _with_columns(shards, wanted, data, split)
    except ValueError:
        if parted := shards.find_parted():
            raise _are_parted(data, parted) from None
        dotted = TarShards(shards.urls, keys_have_dots=True)
        try:
            return _with_columns(dotted, wanted, data, split)
        except ValueError:
            pass
        raise
    _, image, target, rows = found
    if target is not None and not any(_has(row, image) and _has(row, target) for row in rows):
        if parted := shards.find_parted():
            raise _are_parted(data, parted)
    return found


def _are_parted(data: str, members: tuple[str, str]) -> ValueError:
    return ValueError(
        f"In {data!r}, {members[0]!r} and {members[1]!r} belong to one sample, but other members are between them. "
        "Rewrite the archive with its members sorted by name: tar --sort=name -cf NEW.tar FOLDER."
    )


def _has(row: dict, column: str) -> bool:
    try:
        return column_value(row, column) is not None
    except RefusedSample:
        return True


def _features(shards: Shards) -> dict[str, Any] | None:
    if isinstance(shards, DatasetShards):
        return shards.dataset.features
    return shards.features if isinstance(shards, ParquetShards) else None


def open_source(
    data: str | Sequence[str],
    *,
    split: str | None = "train",
    config: str | None = None,
    image_column: str | None = None,
    target_column: str | None = None,
    kind: str = "caption",
    prompts: Prompts | None = None,
    likely_column: str | None = None,
) -> Source:
    """Opens a data set for streaming.

    Args:
        data: `shapes` or `scenes` (embedded), a Hub id, a folder (see `opening.py` for its possible contents), or tar
            or parquet files or lists given as a path, URL or pattern (`*`, `{0000..0099}`), or several such files. URLs
            may be any that fsspec opens: `https://`, `hf://`, `s3://` with s3fs installed, and so on; all but
            `http(s)://` may name a folder of shards. Variables in a URL, `${TOKEN}`, are filled in.
        split: name of the split; None for everything in a folder. Files named directly are all read.
        config: name of a configuration of a data set on the Hub or of a folder with a card.
        image_column: column of the image; by default found by its usual names. In a table, a column named here may
            hold paths of image files below the data set's own folder.
        target_column: column of the caption or label; by default found by its usual names.
        kind: content of `target_column`: `caption`, `label`, or `either` of them, whichever exists; `image` opens
            images alone, without a target.
        prompts: how labels become captions, in training: `target_column` may then hold labels, or be several columns
            with weights, `caption:3 alt_text:1`. By default it is not looked into.
        likely_column: a column of labels that, if it exists, is taken before those with usual names.

    Raises:
        FileNotFoundError: the data do not exist.
        ValueError: the format is not supported, the split or the configuration is unknown, there is no sample, or a
            column is missing or holds something else; the message lists what exists.
    """
    name = shown(data) if isinstance(data, str) else f"{shown(data[0])} and {len(data) - 1} more"
    data = fill_in_variables(data) if isinstance(data, str) else [fill_in_variables(each) for each in data]
    wanted = Wanted(kind, image_column, target_column, prompts is not None, likely_column)
    opened = _open(data, config, split, wanted)
    find = _with_columns_of_tar if isinstance(opened, TarShards) else _with_columns
    shards, image, target, rows = find(opened, wanted, name, split)  # pyright: ignore[reportArgumentType]
    if isinstance(shards, ListShards):
        shards.check_pictures(rows, name)
    files = shards.files if isinstance(shards, (DatasetShards, ParquetShards)) else None
    if image_column is not None and isinstance(shards, (DatasetShards, ParquetShards)):
        files = files or _named_paths(rows, image, data)
    captions = ()
    if prompts is not None and target is not None:
        columns = getattr(opened, "columns", None) or list(dict.fromkeys(column for row in rows for column in row))
        captions = _captions(Table(name, columns, _features(opened), rows), target_column, target, prompts)
    feature = feature_at(_features(shards) or {}, target or "")
    return Source(
        shards=shards,
        image_column=image,
        target_column=target,
        name=name,
        class_names=tuple(feature.names) if isinstance(feature, ClassLabel) else None,
        files=files,
        has_text_targets=target is not None and _has_texts(rows, target),
        captions=captions,
    )


def _check_notation(data: str) -> None:
    """Refuses what other programs take as data: several data sets in one word, and commands that write tar files.

    Raises:
        ValueError: it is one of these; the message has the notation here.
    """
    if data.startswith("pipe:"):
        raise ValueError(f"{shown(data)!r} is a command, and no command is run: give the path or URL that it reads.")
    if "::" in data and not is_remote(data):  # in URLs it chains file systems
        several = " ".join(repr(shown(each)) for each in data.split("::"))
        raise ValueError(f"{shown(data)!r} is several data sets in one word: separate them by spaces, {several}.")


def _open(data: str | Sequence[str], config: str | None, split: str | None, wanted: Wanted) -> Shards:
    for each in [data] if isinstance(data, str) else data:
        _check_notation(each)
    if isinstance(data, str) and data in EMBEDDED:
        return DatasetShards(EMBEDDED[data].load(split or "train"), remote=False)
    if isinstance(data, str):
        return open_shards(data, config, split, wanted)
    return open_files([file for pattern in data for file in list_files(pattern)])


def _captions(table: Table, asked: str | None, target: str, prompts: Prompts) -> tuple[CaptionColumn, ...]:
    """Returns the columns that captions are drawn from; none where one column holds the captions themselves.

    Args:
        table: what is known of the data set.
        asked: the column or columns that the user named, if any.
        target: the columns found.
        prompts: how labels become captions.

    Raises:
        ValueError: a column holds neither text nor labels, or the class names given do not fit the labels.
    """
    weighted = asked is not None and has_weights(asked, table.columns)
    named = read_weights(asked) if asked is not None and weighted else ((target, 1.0),)
    columns = tuple(open_column(table, name, weight, prompts) for name, weight in named)
    return columns if len(columns) > 1 or any(column.labels is not None for column in columns) else ()
