"""Writes the Python files that are published beside weights: only this package's own."""

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

import flip_hf.modeling
from flip_hf.hub.regular import RegularFiles

logger = logging.getLogger(__name__)

PACKAGE = Path(flip_hf.modeling.__file__).parent
NAMES = frozenset(path.name for path in PACKAGE.glob("*_flip.py"))
_MAX_BYTES = 2**20


def named_classes(value: object) -> Iterator[str]:
    """Yields every `module.Class` that a configuration names under `auto_map` or `custom_pipelines`, at any depth."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if name in ("auto_map", "custom_pipelines"):
                yield from _texts(entry)
            else:
                yield from named_classes(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from named_classes(entry)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(entry)


def is_ours(named: str) -> bool:
    """Returns whether `module.Class` is a class in the published files."""
    module, _, name = named.partition(".")
    if f"{module}.py" not in NAMES:
        return False
    return isinstance(getattr(importlib.import_module(f"flip_hf.modeling.{module}"), name, None), type)


def write_code(classes: set[str], folder: RegularFiles, target: Path) -> None:
    """Writes this package's copies of the files that define the classes, and of those that they import.

    Files of these names in the folder would be run by everybody without having been read by anybody: if one differs, a
    warning says so, and it is not published.

    Args:
        classes: `module.Class` of each class, all of them ours.
        folder: the folder that is published.
        target: the folder to write to.
    """
    modules = {PACKAGE / f"{named.partition('.')[0]}.py" for named in classes}
    needed = {Path(path) for module in modules for path in get_relative_import_files(module)} | modules
    for path in sorted(needed):
        data = path.read_bytes()
        if folder.has(path.name) and folder.read(path.name, _MAX_BYTES) != data:
            logger.warning(
                "%s differs from this package's file, which is published in its place.", folder.root / path.name
            )
        (target / path.name).write_bytes(data)
