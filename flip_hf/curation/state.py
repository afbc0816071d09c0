"""Read the state that an earlier call has left: it may be damaged, or something else under the same name."""

import json
from collections.abc import Sequence
from pathlib import Path

from flip_hf.console.files import read_text
from flip_hf.console.json_types import JsonObject

_MAX_BYTES = 2**30  # a manifest of millions of shards


def read_state(path: Path, names: Sequence[str]) -> JsonObject:
    """Reads a JSON object that has some names.

    Raises:
        ValueError: it is not one.
    """
    try:
        found = json.loads(read_text(path, "the state of a command", _MAX_BYTES))
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(name in found for name in names):
        raise damaged(path)
    return found


def damaged(path: Path) -> ValueError:
    """Returns the error of a file that this command has not written so."""
    return ValueError(f"{path} is damaged, or was not written by this command: remove its folder, or name a new one.")
