"""Opens any data set as shards: infers its format from its files, or says that it has none that can be read."""

import glob
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import load_dataset, load_dataset_builder, load_from_disk
from datasets.data_files import DataFilesList
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from flip_hf.data.columns import possible_names
from flip_hf.data.files import check_regular_files, files_below, find_file_system, has_extension, is_remote, list_files
from flip_hf.data.lists import LIST_EXTENSIONS, ListShards, list_columns
from flip_hf.data.pairs import PairShards
from flip_hf.data.parquet import ParquetShards
from flip_hf.data.paths import FilePolicy, FilesBelow
from flip_hf.data.reading import DatasetShards, Shards
from flip_hf.data.splits import (
    CARDS,
    UNDIVIDED,
    are_divided,
    config_splits,
    find_splits,
    list_folder,
    no_such_split,
    read_configs,
)
from flip_hf.data.tar import TAR_EXTENSIONS, TarShards
from flip_hf.data.texts import check_json_lines
from flip_hf.redaction import redact, shown

logger = logging.getLogger(__name__)

# Files that hold many samples.
SHARD_EXTENSIONS = (*TAR_EXTENSIONS, ".parquet", *LIST_EXTENSIONS)
# Usual names of the columns with the picture, the caption and the label.
USUAL_COLUMNS = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "img"),
    "caption": ("caption", "text", "txt", "captions"),
    "label": ("label", "labels", "cls"),
}
# Those in a list and in the metadata of a folder, which have a path in place of a picture.
LISTED_COLUMNS = {
    "image": (
        "filepath",
        "file_name",
        "filename",
        "file_path",
        "image_path",
        "img_path",
        "path",
        *USUAL_COLUMNS["image"],
    ),
    "caption": (*USUAL_COLUMNS["caption"], "title"),
    "label": USUAL_COLUMNS["label"],
}
EITHER = "either"  # a label or a caption
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_PICTURES = (*ImageFolder.EXTENSIONS, ".avif", ".heic")
# Files of folders that `datasets` opens itself.
_SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")
_ADVICE = {
    ".arrow": "Name the folder that save_to_disk wrote, with its state.json, or write it as parquet.",
    ".zip": "Unpack it.",
    ".7z": "Unpack it.",
    ".rar": "Unpack it.",
    ".tfrecord": "Write its samples as tar shards.",
    ".mp4": "Write frames of it as pictures.",
    ".json": "Write one JSON object per line, to a file that ends in .jsonl.",
    ".gz": "Unpack it, unless it is a .tar.gz.",
    ".zst": "Unpack it.",
    ".xlsx": "Save it as CSV in UTF-8.",
    ".txt": "A text goes with the picture of the same name: a.txt with a.jpg.",
}
_FORMS = (
    "Supported are .tar, .tar.gz, .tgz and .parquet files; lists in .csv, .tsv and .jsonl; folders of pictures with a "
    "text beside each, or with a metadata.jsonl; and the folders that save_to_disk writes."
)


@dataclass(frozen=True)
class Wanted:
    """The columns and the kind of target to look for in a data set.

    Attributes:
        kind: the target, `caption` or `label`, `either` of them, or `image` if pictures alone are needed.
        image: the column that the user named for the picture, if any.
        target: the column that the user named for the target, if any.
        weighted: whether `target` may be several columns with weights, `caption:3 alt_text:1`.
        likely: a column of labels that, if it exists, is taken before those with usual names.
    """

    kind: str = "caption"
    image: str | None = None
    target: str | None = None
    weighted: bool = False
    likely: str | None = None

    def targets(self, usual: dict[str, tuple[str, ...]]) -> set[str]:
        """Returns possible names of the target's column, and the first parts of nested names."""
        kinds = ("label", "caption") if self.kind == EITHER else (self.kind,)
        if self.target:
            named = possible_names(self.target) if self.weighted else self.target.split(";")
        else:
            named = [name for kind in kinds for name in usual.get(kind, ())]
            named += [] if self.likely is None else self.likely.split(";")
        return {part for name in named for part in (name, name.split(".")[0])}


def open_shards(data: str, config: str | None, split: str | None, wanted: Wanted) -> Shards:
    """Opens a data set; see `open_source`."""
    if os.path.isdir(data):
        return _open_folder(data, config, split, wanted)
    if has_extension(data.lower(), SHARD_EXTENSIONS):
        return open_files(list_files(data))
    if is_remote(data):
        for extension in SHARD_EXTENSIONS:
            files = files_below(data, extension)
            if files:
                return open_files(_of_split(data, files, split))
        raise FileNotFoundError(f"There are no {' or '.join(SHARD_EXTENSIONS)} files in {shown(data)!r}.")
    if os.path.exists(data):
        raise unknown_form(data, [data])
    if data.startswith((".", "/", "~")) or os.path.splitext(data)[1] in _ADVICE:
        found = glob.glob(os.path.expanduser(data))
        if found:
            raise unknown_form(data, found)
        raise FileNotFoundError(f"There is no file or folder {shown(data)!r}.")
    return open_named(data, config, split or UNDIVIDED)


def _of_split(folder: str, files: Sequence[str], split: str | None) -> Sequence[str]:
    """Returns the files of one split among those below a folder given by URL; all files if `split` is None.

    Raises:
        ValueError: there is no such split.
    """
    if split is None:
        return files
    system, path = find_file_system(folder)
    root = system.unstrip_protocol(path).rstrip("/")
    by_name = {file.removeprefix(f"{root}/"): file for file in files}
    splits = find_splits(list(by_name))
    return [by_name[name] for name in splits[_pick(split, splits, list(by_name), root)]]


def open_files(files: Sequence[str], root: str | None = None) -> Shards:
    """Opens files of one kind that hold many samples each, without inferring splits from their names.

    Args:
        files: paths or URLs.
        root: the folder that the pictures of a list must be in; by default the list's own.

    Raises:
        ValueError: the files are of several kinds, or of none.
    """
    kinds = [(TAR_EXTENSIONS, TarShards), ((".parquet",), ParquetShards)]
    for extensions, kind in kinds:
        if all(has_extension(file.lower(), extensions) for file in files):
            return kind(files)
    if all(has_extension(file.lower(), LIST_EXTENSIONS) for file in files):
        return ListShards(files, root)
    others = [file for file in files if not has_extension(file.lower(), SHARD_EXTENSIONS)]
    if others:
        raise unknown_form(others[0], others)
    raise ValueError(f"{shown(files[0])!r} and the other files are of several kinds: name each kind on its own.")


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """The files of a split, by kind; paths are relative to the folder."""

    shards: list[str]
    tables: list[str]
    lists: list[str]
    metadata: list[str]
    pictures: list[str]
    archives: list[str]


def _sorted_out(files: Iterable[str]) -> _Split:
    found = _Split([], [], [], [], [], [])
    kinds = [
        (METADATA, found.metadata),
        (TAR_EXTENSIONS, found.shards),
        ((".parquet",), found.tables),
        (LIST_EXTENSIONS, found.lists),
        (_PICTURES, found.pictures),
        ((".zip",), found.archives),
    ]
    for file in files:
        name = os.path.basename(file).lower()
        place = next((place for endings, place in kinds if _ends(name, endings)), None)
        if place is not None:
            place.append(file)
    return found


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return name in METADATA if endings is METADATA else name.endswith(endings)


def _open_folder(path: str, config: str | None, split: str | None, wanted: Wanted) -> Shards:
    check_regular_files(path, (*METADATA, *_SAVED, *CARDS))
    if any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
        return _open_saved(path, config, split)
    listed = list_folder(path)
    files = [file for file in listed if file.lower().endswith((*SHARD_EXTENSIONS, *_PICTURES, ".zip"))]
    splits = _splits_of(path, config, files)
    if split is None:
        splits = {UNDIVIDED: files}
        split = UNDIVIDED
    if not files:
        raise unknown_form(path, listed)
    split = _pick(split, splits, files, os.path.realpath(path))
    return _open_split(path, splits, split, listed, wanted)


def _pick(split: str, splits: dict[str, list[str]], files: Sequence[str], folder: str) -> str:
    """Picks a split of a folder: the one of that name, or everything in an undivided folder of that name.

    Args:
        split: its name.
        splits: the files of each existing split.
        files: all files that may hold data.
        folder: path of the folder; `data/test` may be a split as a whole.

    Raises:
        ValueError: there is no such split; the message lists the existing ones.
    """
    divided = are_divided(files, splits)
    if not divided and split == folder.rstrip("/").rpartition("/")[2]:
        return UNDIVIDED
    if split not in splits:
        raise no_such_split(shown(folder), split, splits, divided)
    # `datasets` silently skips these.
    left = sorted({file for file in files if file.lower().endswith(SHARD_EXTENSIONS)}.difference(*splits.values()))
    if left:
        logger.warning("%s: skipped %d files that are in no split, such as %s.", shown(folder), len(left), left[0])
    return split


def _splits_of(path: str, config: str | None, files: Sequence[str]) -> dict[str, list[str]]:
    configs = read_configs(path)
    if configs or config is not None:
        return config_splits(configs, config, files, shown(path))
    splits = find_splits(files)
    pictures = [file for file in files if file.lower().endswith(_PICTURES)]
    rest = set(pictures).difference(*splits.values())
    if rest and len(rest) < len(pictures) and len(pictures) == len(files):
        raise ValueError(
            f"{len(rest):,} of the {len(pictures):,} pictures in {shown(path)!r} are in no split, such as "
            f"{min(rest)!r}. Others are in {', '.join(splits)}, by their names or folders: put each split into a "
            "folder named after it."
        )
    return splits


def _open_split(path: str, splits: dict[str, list[str]], split: str, listed: Sequence[str], wanted: Wanted) -> Shards:
    found = _sorted_out(splits[split])
    has_pictures = bool(found.pictures)
    if found.shards:
        return open_files(_in(path, found.shards))
    tables = [file for file in found.metadata if file.lower().endswith(".parquet")]
    if has_pictures and tables:
        return _described_pictures(path, tables)
    if found.tables:
        shards = ParquetShards(_in(path, found.tables))
        usual = any(name in shards.columns for name in USUAL_COLUMNS["image"])
        # Beside pictures, a table without any describes them, such as img2dataset's beside each folder of "files".
        if usual or wanted.image is not None or not has_pictures:
            return shards
    lists = _lists_of_pictures(path, found.lists, wanted)
    if lists and not (has_pictures and (found.metadata or wanted.kind == "image")):
        return ListShards(_in(path, lists), path)
    if has_pictures and not found.metadata and wanted.kind != "image":
        pictures = set(found.pictures)
        pairs = PairShards(path, found.pictures, [file for file in listed if file not in pictures])
        texts = set(pairs.columns[1:])
        # A file beside a picture belongs to it, whatever its extension; if captions are wanted, the message names it.
        if texts if wanted.kind == "caption" else texts & wanted.targets(USUAL_COLUMNS):
            return pairs
    if has_pictures or (found.archives and (wanted.kind == "image" or found.metadata)):
        return _image_folder(path, splits, split)
    if found.lists:
        return ListShards(_in(path, found.lists), path)
    raise unknown_form(path, listed)


def _in(path: str, files: Sequence[str]) -> list[str]:
    return [os.path.join(path, file) for file in files]


def _lists_of_pictures(path: str, lists: Sequence[str], wanted: Wanted) -> list[str]:
    """Selects the lists with columns of pictures and of the target: a folder may also have unrelated tables."""
    kept: list[str] = []
    for file in lists:
        columns = set(list_columns(os.path.join(path, file)))
        images = {wanted.image} if wanted.image else set(LISTED_COLUMNS["image"])
        if columns & images and (wanted.kind == "image" or columns & wanted.targets(LISTED_COLUMNS)):
            kept.append(file)
    return kept


def _described_pictures(path: str, tables: Sequence[str]) -> ParquetShards:
    """Opens the pictures described by the rows of a `metadata.parquet`."""
    if len(tables) > 1:
        raise ValueError(
            f"{shown(path)!r} has several metadata.parquet files in one split: merge them, beside the pictures."
        )
    table = os.path.join(path, tables[0])
    return ParquetShards([table], paths=FilesBelow(os.path.dirname(table)))


def _image_folder(path: str, splits: dict[str, list[str]], split: str) -> DatasetShards:
    """Opens an image folder of `datasets`, with targets from its metadata or from the pictures' folders."""
    endings = (*_PICTURES, ".zip", *METADATA)
    found: dict[str, Any] = {
        name: DataFilesList(_in(os.path.abspath(path), kept), [])
        for name, files in splits.items()
        if (kept := [file for file in files if file.lower().endswith(endings)])
    }
    for file in itertools.chain.from_iterable(found.values()):
        if os.path.basename(file) == "metadata.jsonl":
            check_json_lines(file)
    # All splits together, so that their classes are numbered alike.
    dataset: Any = load_dataset("imagefolder", data_files=found, split=split, streaming=True)
    return DatasetShards(dataset, False, FilesBelow(path), found.get(split, ()))


def _open_saved(path: str, config: str | None, split: str | None) -> DatasetShards:
    """Opens a folder written by `save_to_disk`: a data set, or several splits."""
    if config is not None:
        raise ValueError(f"{shown(path)!r} was written by save_to_disk and has no configurations, such as {config!r}.")
    folder = path
    if os.path.exists(os.path.join(path, "dataset_dict.json")):
        splits = sorted(name for name in os.listdir(path) if os.path.exists(os.path.join(path, name, "state.json")))
        if split not in splits:
            raise no_such_split(shown(path), split or UNDIVIDED, splits)
        folder = os.path.join(path, split)
    table: Any = load_from_disk(folder)
    if folder == path and split is not None:
        own = str(table.split or UNDIVIDED).partition("[")[0]
        if split != own and (table.split is not None or split != os.path.basename(os.path.realpath(path))):
            raise no_such_split(shown(path), split, [own], divided=table.split is not None)
    return DatasetShards(table, False, FilesBelow(path))


def unknown_form(data: str, files: Sequence[str]) -> ValueError:
    """Makes the error for files of an unsupported format; it names what was found and what to do."""
    if not files:
        return ValueError(f"The folder {shown(data)!r} is empty. {_FORMS}")
    endings = Counter(os.path.splitext(file)[1].lower() or "no ending" for file in files)
    listed = ", ".join(f"{count:,} x {ending}" for ending, count in endings.most_common(4))
    advice = next((_ADVICE[ending] for ending, _ in endings.most_common() if ending in _ADVICE), "")
    return ValueError(f"{shown(data)!r} is in no supported format; found: {listed}. {advice or _FORMS}")


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------


def open_named(data: str, config: str | None, split: str) -> Shards:
    """Opens a data set on the Hub, or a folder in its layout."""
    try:
        builder = load_dataset_builder(data, config)
    except ConnectionError as error:
        raise FileNotFoundError(
            f"There is no {shown(data)!r} here, and it cannot be loaded from the Hub: {redact(str(error))}."
        ) from error
    files: dict[str, list[str]] = builder.config.data_files  # pyright: ignore[reportAssignmentType]
    if not isinstance(builder, WebDataset) and not _is_plain_parquet(builder):
        below: FilePolicy | None = None
        if isinstance(builder, FolderBasedBuilder):  # it lists the repository's files itself
            below = FilesBelow(_common_folder(itertools.chain.from_iterable(files.values())))
        rows: Any = builder.as_streaming_dataset(split=split)
        return DatasetShards(rows, True, below)
    if split not in files:
        raise no_such_split(shown(data), split, files)
    if isinstance(builder, WebDataset):
        return TarShards(files[split])
    return ParquetShards(files[split], builder.info.features)


def _is_plain_parquet(builder: Any) -> bool:
    """Returns whether a builder reads plain parquet files: a card may ask for filters, columns or types."""
    config = builder.config
    return isinstance(builder, Parquet) and config.columns is config.filters is config.features is None


def _common_folder(files: Iterable[str]) -> str:
    return os.path.commonprefix([str(file) for file in files]).rpartition("/")[0]
