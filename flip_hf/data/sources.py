"""Opens any data set as one kind of stream, and deals its rows to readers in a repeatable order.

A reader is one worker of one process. Rows come undecoded, in shards; the order of shards and the part of each reader
follow from the seed and the epoch alone, so that a position in the stream is three numbers.
"""

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Image, IterableDataset, load_dataset, load_from_disk

from flip_hf.data.shapes import shapes_dataset

EMBEDDED = "shapes"
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
CAPTION_COLUMNS = ("caption", "text", "txt", "captions")
LABEL_COLUMNS = ("label", "labels", "cls")
_BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Source:
    """An opened data set.

    Attributes:
        dataset: the stream of rows, images undecoded.
        image_column: where the image is; dots lead into nested values (`json.url`).
        target_column: where the caption, or in evaluation the label, is.
        name: what the user called it.
        class_names: names of the classes, if `target_column` has them.
    """

    dataset: IterableDataset
    image_column: str
    target_column: str
    name: str
    class_names: tuple[str, ...] | None = None

    def image(self, row: dict) -> Any:
        return column_value(row, self.image_column)

    def target(self, row: dict) -> Any:
        return column_value(row, self.target_column)


def column_value(row: dict, column: str) -> Any:
    """The value under a column name; dots lead into nested dictionaries; None where there is nothing."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------------------------------


def expand_braces(pattern: str) -> list[str]:
    """Expands `shard-{00000..00099}.tar`, the notation of WebDataset users; other text is returned as it is."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return list(itertools.chain.from_iterable(expand_braces(_BRACES.sub(n, pattern, count=1)) for n in numbers))


def _open_folder(path: str, split: str) -> Any:
    if os.path.exists(os.path.join(path, "state.json")):
        return load_from_disk(path)
    for extension, builder in _BUILDERS.items():
        files = sorted(glob.glob(os.path.join(glob.escape(path), "**", f"*{extension}"), recursive=True))
        if files:
            return load_dataset(builder, data_files={split: files}, split=split, streaming=True)
    return load_dataset("imagefolder", data_dir=path, split=split, streaming=True)


def _open(data: str, config: str | None, split: str) -> Any:
    extension = os.path.splitext(data)[1]
    if os.path.isdir(data):
        return _open_folder(data, split)
    if extension in _BUILDERS:
        files = expand_braces(data)
        return load_dataset(_BUILDERS[extension], data_files={split: files}, split=split, streaming=True)
    if data.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no file or folder {data!r}.")
    return load_dataset(data, config, split=split, streaming=True)


def _as_stream(dataset: Any) -> IterableDataset:
    if not isinstance(dataset, IterableDataset):
        dataset = dataset.to_iterable_dataset(num_shards=min(64, max(1, len(dataset))))
    # Plain bytes, text and numbers: what cannot be decoded is for us to count, not an error inside the stream.
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _find_column(row: dict, wanted: str | None, candidates: tuple[str, ...], kind: str, data: str) -> str:
    if wanted is None:
        wanted = next((name for name in candidates if name in row), None)
    if wanted is None or (wanted not in row and wanted.split(".")[0] not in row):
        named = f"has no {kind} column {wanted!r}" if wanted else f"has no {kind} column of a usual name"
        raise ValueError(
            f"The data set {data!r} {named}. Its columns are: {', '.join(sorted(row))}. Name the right one with "
            f"--{kind}_column."
        )
    return wanted


def open_source(
    data: str,
    *,
    split: str = "train",
    config: str | None = None,
    image_column: str | None = None,
    target_column: str | None = None,
    kind: str = "caption",
) -> Source:
    """Opens a data set for streaming.

    Args:
        data: `shapes` (the embedded data), a Hub id, a folder (tar or parquet shards, an image folder, or what
            `save_to_disk` wrote), or tar or parquet files as a path, URL or pattern (`*`, `{0000..0099}`).
        split: name of the split.
        config: name of the Hub data set's configuration.
        image_column: column of the image; found by its usual names if None.
        target_column: column of the caption or label; found by its usual names if None.
        kind: `caption` or `label`: what `target_column` holds.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the split is unknown, there is no sample, or a column is missing; the message lists the columns.
    """
    dataset = shapes_dataset(split) if data == EMBEDDED else _open(data, config, split)
    dataset = _as_stream(dataset)
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The data set {data!r} has no samples in its split {split!r}.")
    candidates = CAPTION_COLUMNS if kind == "caption" else LABEL_COLUMNS
    target_column = _find_column(row, target_column, candidates, kind, data)
    feature = (dataset.features or {}).get(target_column)
    return Source(
        dataset=dataset,
        image_column=_find_column(row, image_column, IMAGE_COLUMNS, "image", data),
        target_column=target_column,
        name=data,
        class_names=tuple(feature.names) if isinstance(feature, ClassLabel) else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Dealing rows to readers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """One of `count` readers, all workers of all processes together."""

    index: int
    count: int


def epoch_shards(num_shards: int, reader: Reader, epoch: int, seed: int | None) -> tuple[list[int], bool]:
    """The shards that a reader visits in an epoch, in order, and whether it must share their rows.

    With at least one shard a reader, each shard has one reader, and the readers with one shard more change every epoch.
    With fewer, all read all shards and take turns row by row. Either way every row has exactly one reader an epoch.
    """
    order = np.arange(num_shards)
    if seed is not None:
        order = np.random.default_rng((seed, epoch)).permutation(num_shards)
    if num_shards < reader.count:
        return order.tolist(), True
    return order[(reader.index + epoch) % reader.count :: reader.count].tolist(), False


def _iterate(dataset: IterableDataset) -> Iterator[dict]:
    """The rows, all of them also in a DataLoader's worker, where iterating a dataset itself deals them out again."""
    for batch in dataset.iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def read_rows(
    dataset: IterableDataset,
    reader: Reader,
    *,
    epoch: int,
    seed: int | None,
    start: tuple[int, int] = (0, 0),
    on_error: Callable[[Exception], None],
) -> Iterator[tuple[tuple[int, int], dict]]:
    """Yields a reader's rows of one epoch as ((n-th shard, row in it), row), from the position `start` on.

    A shard that cannot be read on is left, after a call of `on_error`, and reading goes on with the next.
    """
    num_shards = dataset.num_shards
    shards, shared = epoch_shards(num_shards, reader, epoch, seed)
    for nth in range(start[0], len(shards)):
        first = start[1] if nth == start[0] else 0
        shard = dataset.shard(num_shards, shards[nth])
        rows = enumerate(_iterate(shard.skip(first) if first else shard), start=first)
        while True:
            try:
                index, row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # truncated archives, lost connections, schema errors: any kind
                on_error(error)
                break
            if not shared or index % reader.count == reader.index:
                yield (nth, index), row
