"""Opening a described data set: from the Hub, from a local copy, or a user's own data."""

from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from torch.utils.data import DataLoader

from flip_hf.console.files import read_text
from flip_hf.data.class_names import check_class_names
from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.extent import shared_file
from flip_hf.data.files import files_below
from flip_hf.data.loader import make_loader
from flip_hf.data.opening import SHARD_EXTENSIONS
from flip_hf.data.reading import Reader
from flip_hf.data.sources import Source, open_source
from flip_hf.data.targets import Captions, ClassIndex, ClassVector
from flip_hf.evaluation.encoder import ImageTransform
from flip_hf.evaluation.registry import DataSet
from flip_hf.redaction import shown


def read_classes(path: str | Path) -> tuple[tuple[str, ...], ...]:
    """Reads the names of classes from a file, one class a line, in the order of the labels.

    Synonyms follow the usual name after semicolons: `airplane; aeroplane; jet`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no names, one is missing, or it cannot be read (see `read_text`).
    """
    lines = [line.strip() for line in read_text(path, "class names").rstrip().splitlines()]
    if not lines:
        raise ValueError(f"{path} has no class names: write one a line, in the order of the labels.")
    if "" in lines:
        number = lines.index("") + 1
        raise ValueError(
            f"{path} has no name in line {number}, so the names below may belong to other labels: write one a line, in "
            "the order of the labels."
        )
    classes = [tuple(name.strip() for name in line.split(";")) for line in lines]
    for number, names in enumerate(classes, start=1):
        if not all(names):
            raise ValueError(
                f"{path} has an empty name between semicolons in line {number}: write synonyms as in "
                "'airplane; aeroplane; jet'."
            )
    return tuple(classes)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Reads the usual name of each class from a file, without synonyms; see [`read_classes`]."""
    return tuple(names[0] for names in read_classes(path))


def _local_copy(data_set: DataSet, split: str, data_dir: str) -> tuple[str, str | None]:
    """Returns the folder of a data set below `data_dir`, and the split in it.

    The folder is `name/split` if that holds shards, which are then all of the split; else `name`.
    """
    folder = Path(data_dir) / data_set.name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no copy of {data_set.name!r} in {data_dir}: put it into {folder}, as tar or parquet shards in "
            "one folder per split, as an image folder, or as save_to_disk wrote it."
        )
    inner = folder / split
    if inner.is_dir() and any(files_below(str(inner), extension) for extension in SHARD_EXTENSIONS):
        return str(inner), None
    return str(folder), split


def open_split(data_set: DataSet, split: str, data_dir: str | None) -> Source:
    """Opens one split, `train`, `validation` or `test`, under the data set's own name for it.

    Raises:
        FileNotFoundError: `data_dir` has no copy of the data set.
        ValueError: the data set has no such split, or is not on the Hub; see also [`open_source`].
    """
    if split not in data_set.splits:
        known = ", ".join(data_set.splits) or "none"
        raise ValueError(f"{data_set.title} has no split for {split!r}, only: {known}.")
    called: str | None = data_set.splits[split]
    columns = (data_set.image_column, data_set.target_column)
    if data_dir is None and data_set.path is None:
        raise ValueError(
            f"{data_set.title} is not on the Hub; get a copy and name its folder with --data_dir. {data_set.note or ''}"
        )
    path = data_set.path or ""
    config = data_set.config
    if data_dir is not None:
        path, called = _local_copy(data_set, called, data_dir)
        config = None
        if not any(files_below(path, ".tar")):  # columns of other formats are found by their usual names
            columns = (None, None)
    return open_source(
        path,
        split=called,
        config=config,
        image_column=columns[0],
        target_column=columns[1],
        kind="caption" if data_set.task == "retrieval" else "label",
    )


def check_apart(training: Source, test: Source) -> None:
    """Checks that no file of the training data is measured on, as it would be where one file is named as the data.

    Raises:
        ValueError: they share a file.
    """
    shared = shared_file(training.shards, test.shards)
    if shared is not None:
        raise ValueError(
            f"{shown(shared)} would be trained on and measured on. This task needs training data of its own: put both "
            "into one folder, named after their splits, as train.parquet and test.parquet or as the folders train and "
            "test."
        )


def _class_names_file(data_set: DataSet, data_dir: str | None) -> tuple[str, ...] | None:
    """Reads the class names beside a data set, in its local copy or its repository on the Hub."""
    if data_set.class_names_file is None:
        return None
    if data_dir is not None:
        path = Path(data_dir) / data_set.name / data_set.class_names_file
        return read_class_names(path) if path.is_file() else None
    return read_class_names(hf_hub_download(data_set.path or "", data_set.class_names_file, repo_type="dataset"))


def named_classes(data_set: DataSet, source: Source, data_dir: str | None) -> DataSet:
    """Adds class names to a data set: those of its description, of the data, or of a file beside them.

    Raises:
        ValueError: they are unknown, do not match the number of labels, or contradict the data's own; see
            [`check_class_names`].
    """
    if data_set.task == "retrieval":
        return data_set
    names = data_set.class_names or source.class_names or _class_names_file(data_set, data_dir)
    if not names:
        raise ValueError(
            f"The data set {source.name!r} does not name its classes in {source.target_column!r}. Give "
            "--class_names FILE, one name a line in the order of the labels."
        )
    if source.class_names is not None and len(source.class_names) != len(names):
        raise ValueError(
            f"{data_set.title} is described with {len(names)} classes, but {source.name!r} has "
            f"{len(source.class_names)} in {source.target_column!r}; give --class_names with one line a class."
        )
    advice = "Say which with --text_labels index or --text_labels name."
    check_class_names(source, names, data_set.text_labels, advice)
    return replace(data_set, class_names=names)


def target_reader(data_set: DataSet) -> Captions | ClassVector | ClassIndex:
    """Makes the function from a value of the target column to a target."""
    if data_set.task == "retrieval":
        return Captions(data_set.caption_form)
    if data_set.metric == "map_11_points":
        return ClassVector(len(data_set.class_names or ()))
    return ClassIndex(data_set.class_names or (), data_set.text_labels)


def eval_loader(
    data_set: DataSet,
    source: Source,
    transform: ImageTransform,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int,
) -> DataLoader:
    """Makes the loader of one pass over this process's part of a split."""
    process = Reader(accelerator.process_index, accelerator.num_processes)
    stream = EvalStream(
        source,
        transform.pixels,
        target_reader(data_set),
        batch_size=batch_size,
        process=process,
        background=transform.background,
    )
    return make_loader(stream, num_workers=num_workers, pin_memory=accelerator.device.type == "cuda")
