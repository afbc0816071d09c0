"""Finds the splits of a local folder as `datasets` finds those of a data set on the Hub, without network access.

A folder's card (`README.md`) may say which files form which split of which configuration. Otherwise the names of
folders and files decide: `train/`, `data/test-00000-of-00001.parquet`, `val.tar`. If they do not, all files are the
split `train`. The patterns are those of `datasets`, matched here against one listing of the folder; `datasets` would
walk the folder for each of sixty patterns, which takes a minute for 20,000 pictures.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import yaml
from datasets.data_files import ALL_DEFAULT_PATTERNS, FILES_TO_IGNORE, SPLIT_PATTERN_SHARDED, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from fsspec.utils import glob_translate
from huggingface_hub import DatasetCardData
from huggingface_hub.repocard import metadata_load

from flip_hf.redaction import shown

# Files that may be a data set's card; later ones take precedence.
CARDS = ("README.md", ".huggingface.yaml")
_MAX_CARD_BYTES = 2**22
# Fields of a configuration that do not change how its files are read.
_HARMLESS = {"data_files", "data_dir", "default", "version", "description"}
UNDIVIDED = "train"
_SIGNS = re.compile(r"[*?/]|\[[^]]*\]")  # wildcards and separators of a pattern


def list_folder(folder: str) -> list[str]:
    """Lists the relative paths of a folder's files in order.

    Hidden files, and folders such as `__MACOSX`, are skipped. Links to folders are followed, but never in a circle.
    """
    found: list[str] = []
    entered: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        relative = os.path.relpath(place, folder)
        kept = [name for name in folders if not name.startswith((".", "__"))]
        folders[:] = [name for name in kept if _is_new(place, name, entered)]
        visible = (name for name in files if not name.startswith("."))
        found.extend(name if relative == "." else os.path.join(relative, name) for name in visible)
    return sorted(found)


def _is_new(place: str, name: str, entered: set[str]) -> bool:
    """Returns whether a folder, with links resolved, is not already being walked."""
    path = os.path.join(place, name)
    if not os.path.islink(path):
        return True
    target = os.path.realpath(path)
    is_circle = f"{os.path.realpath(place)}{os.sep}".startswith(f"{target}{os.sep}")
    is_new = not is_circle and target not in entered
    entered.add(target)
    return is_new


def find_splits(files: Sequence[str]) -> dict[str, list[str]]:
    """Infers splits from the names of files and of their folders; all files are `train` if there are none.

    Args:
        files: relative paths of the files that may hold data.
    """
    candidates = [file for file in files if os.path.basename(file) not in FILES_TO_IGNORE]
    sharded = _match(candidates, [SPLIT_PATTERN_SHARDED.replace("{split}", "*")])
    if sharded:
        names = list(dict.fromkeys(os.path.basename(file).rpartition("-of-")[0][:-6] for file in sharded))
        return {name: _match(candidates, [SPLIT_PATTERN_SHARDED.format(split=name)]) for name in names}
    for patterns in ALL_DEFAULT_PATTERNS:
        splits = {str(split): _match(candidates, each) for split, each in patterns.items()}
        found = {split: matched for split, matched in splits.items() if matched}
        if found:
            return found
    return {}


def are_divided(files: Sequence[str], splits: dict[str, list[str]]) -> bool:
    """Returns whether files are really divided, rather than all in the one default split."""
    return set(splits) != {UNDIVIDED} or len(splits[UNDIVIDED]) < len(files)


def _match(files: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """Returns the files that match any of the patterns, in the order of the patterns, each once."""
    matched: dict[str, None] = {}
    for pattern in patterns:
        expression = re.compile(glob_translate(pattern))
        # Searching for the longest literal part first takes a tenth of the time.
        literal = max(_SIGNS.split(pattern), key=len).strip("/")
        matched.update(
            (file, None) for file in files if literal in file and expression.match(file.replace(os.sep, "/"))
        )
    return list(matched)


# ---------------------------------------------------------------------------------------------------------------------
# Cards
# ---------------------------------------------------------------------------------------------------------------------


def read_configs(folder: str) -> MetadataConfigs:
    """Reads the configurations in a folder's card; empty if there are none.

    Raises:
        ValueError: the card is too large, or its metadata are damaged.
    """
    card: dict = {}
    for name in CARDS:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            if os.path.getsize(path) > _MAX_CARD_BYTES:
                raise ValueError("it is too large for a card")
            card.update(_read_card(path))
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{shown(path)} cannot be read as the card of a data set: {reason}.") from None
    try:
        return MetadataConfigs.from_dataset_card_data(DatasetCardData(configs=card.get("configs")))
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The card in {shown(folder)!r} has damaged configs: {reason}") from None


def _read_card(path: str) -> dict:
    if path.endswith(".yaml"):
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file) or {}
    return metadata_load(path) or {}


def config_splits(
    configs: MetadataConfigs, config: str | None, files: Sequence[str], data: str
) -> dict[str, list[str]]:
    """Returns the files of each split of a configuration.

    Args:
        configs: the folder's configurations.
        config: name of a configuration; None selects the default one.
        files: relative paths of the folder's files; a card can name only these.
        data: the folder's name for messages.

    Raises:
        ValueError: there is no such configuration, it must be named, or it needs something that is unsupported here.
    """
    chosen = config or configs.get_default_config_name()
    if chosen is None or chosen not in configs:
        listed = ", ".join(map(str, configs)) or "none"
        said = f"has no configuration {config!r}, only: {listed}" if config else f"has several configurations: {listed}"
        raise ValueError(f"The data set {data!r} {said}." + ("" if config else " Name one."))
    described = configs[chosen]
    others = sorted(set(described) - _HARMLESS)
    if others:
        raise ValueError(
            f"The configuration {chosen!r} of {data!r} asks for {', '.join(others)}, which is not supported for local "
            "folders. Load it with `datasets`, and name the folder that save_to_disk writes."
        )
    base = os.path.normpath(str(described.get("data_dir") or "."))
    inside = [os.path.relpath(file, base) for file in files if base == "." or PurePosixPath(file).is_relative_to(base)]
    if "data_files" not in described:
        splits = find_splits(inside)
    else:
        patterns = sanitize_patterns(described["data_files"])
        splits = {split: _match(inside, map(_relative, each)) for split, each in patterns.items()}
        for split, each in patterns.items():
            if not splits[split]:
                raise ValueError(
                    f"The card of {data!r} names {', '.join(map(repr, each))} for its split {split!r}, but no such "
                    "file is in the folder."
                )
    return {split: [os.path.normpath(os.path.join(base, file)) for file in found] for split, found in splits.items()}


def _relative(pattern: str) -> str:
    return pattern.removeprefix("./")


def no_such_split(data: str, split: str, splits: Iterable[str], divided: bool = True) -> ValueError:
    """Makes the error for a split that a data set does not have."""
    why = "" if divided else f" Nothing in it is named after a split, so all of it is {UNDIVIDED!r}."
    return ValueError(
        f"The data set {data!r} has no split {split!r}, only: {', '.join(map(str, splits))}.{why} Choose one with the "
        "option of the command: --split, --train_split, --test_split, --eval_split or --retain_split."
    )
