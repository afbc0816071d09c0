"""Which files of a folder are which split: found as `datasets` finds them, from names or the folder's README."""

import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

from datasets.data_files import DEFAULT_PATTERNS_ALL, DataFilesDict, get_data_patterns, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from flip_hf.data.files import find_file_system, is_remote

logger = logging.getLogger(__name__)

_README = "README.md"


class UnknownSplit(ValueError):
    """A split that a data set does not have; the message lists those that it has."""

    def __init__(self, data: str, split: str, known: Sequence[str]):
        super().__init__(f"The data set {data!r} has no split {split!r}, only: {', '.join(known) or 'none'}.")


def configurations(folder: str) -> MetadataConfigs:
    """The configurations that a folder's README describes, by name; none without a README.

    Raises:
        ValueError: its YAML cannot be read.
    """
    readme = os.path.join(folder, _README)
    if is_remote(folder) or not os.path.isfile(readme):
        return MetadataConfigs()
    try:
        return MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data)  # pyright: ignore
    except Exception as error:  # YAML's, and what `datasets` raises of fields that are not as it knows them
        raise ValueError(f"The YAML at the head of {readme} cannot be read: {error}") from error


def pick_files(
    folder: str, files: Sequence[str], extension: str, config: str | None, split: str, name: str
) -> list[str]:
    """Picks the files of one split.

    A folder whose names tell of no splits has one, `train`, and is also what its own name says: `test` of `data/test`.

    Args:
        folder: path or URL.
        files: all files of the extension below it.
        extension: of the files.
        config: a configuration of the folder's README.
        split: name of the split.
        name: what the user called the data set.

    Raises:
        UnknownSplit: there is no such split.
        ValueError: there is no such configuration.
    """
    base = os.path.realpath(folder) if not is_remote(folder) else folder
    patterns = _patterns(folder, base, config, name)
    for pattern in itertools.chain.from_iterable(patterns.values()):
        if is_remote(pattern) or os.path.isabs(pattern) or ".." in pattern.split("/"):
            raise ValueError(f"The {_README} of {name!r} names files elsewhere, {pattern!r}; only its own are read.")
    found = DataFilesDict.from_patterns(patterns, base_path=base, allowed_extensions=[extension])
    splits = {str(key): {_below(base, file) for file in names} for key, names in found.items() if names}
    if not splits or patterns == sanitize_patterns(DEFAULT_PATTERNS_ALL):
        check_only_split(base, split, name)
        return list(files)
    if split not in splits:
        raise UnknownSplit(name, split, list(splits))
    relative = {file: _below(folder, file) for file in files}
    left = [file for file, below in relative.items() if not any(below in names for names in splits.values())]
    if left:
        of_all = f"{len(left)} of the {len(files)} {extension} files"
        logger.warning("%s in %s are of no split, and left out; the first is %s.", of_all, name, left[0])
    return [file for file, below in relative.items() if below in splits[split]]


def check_only_split(folder: str, split: str, name: str) -> None:
    """Checks the split that is asked for of a folder that tells of none.

    Raises:
        UnknownSplit: it is neither `train` nor the folder's own name.
    """
    if split not in ("train", os.path.basename(os.path.realpath(folder))):
        raise UnknownSplit(name, split, ["train"])


def _patterns(folder: str, base: str, config: str | None, name: str) -> dict[str, Any]:
    described = configurations(folder)
    if config is not None and config not in described:
        known = f"only: {', '.join(described)}" if described else f"for it has no {_README} that describes any"
        raise ValueError(f"The data set {name!r} has no configuration {config!r}, {known}.")
    chosen = described.get(config or described.get_default_config_name() or next(iter(described), ""), {})
    if "data_files" in chosen:
        return sanitize_patterns(chosen["data_files"])
    inner = chosen.get("data_dir")
    patterns = get_data_patterns(os.path.join(base, inner) if inner else base)
    if inner:
        return {split: [os.path.join(inner, each) for each in found] for split, found in patterns.items()}
    return patterns


def _below(folder: str, file: str) -> str:
    if is_remote(folder):
        system, path = find_file_system(folder)
        return os.path.relpath(system._strip_protocol(file), path)
    return os.path.relpath(file, folder)
