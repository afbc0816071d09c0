"""Reads the state that an earlier call has left: it may be damaged, or something else under the same name."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from flip_hf.console.files import is_plain_file, read_text
from flip_hf.console.json_types import JsonObject

_MAX_BYTES = 2**30  # a manifest of millions of shards


def read_state(path: Path, kinds: Mapping[str, type | UnionType]) -> JsonObject:
    """Reads a JSON object that has some names, each with a value of some type; numbers are not negative.

    Raises:
        ValueError: it is not one, or is a link.
    """
    if not is_plain_file(path):
        raise damaged(path)
    try:
        found = json.loads(read_text(path, "the state of a command", _MAX_BYTES))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(name in found for name in kinds):
        raise damaged(path)
    if not all(_is_of(found[name], kind) for name, kind in kinds.items()):
        raise damaged(path)
    return found


def _is_of(value: Any, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and not (isinstance(value, int) and value < 0)


def make_folder(path: Path) -> None:
    """Makes a folder of a command's state, unless it exists.

    Raises:
        ValueError: a link or a file has its name.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise damaged(path)
    path.mkdir(parents=True, exist_ok=True)


def damaged(path: Path) -> ValueError:
    """Returns the error of a file that this command has not written so."""
    return ValueError(f"{path} is damaged, or was not written by this command: remove the folder, or name a new one.")
