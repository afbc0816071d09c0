"""What evaluation wants to know of a row: its class, its classes, its captions."""

import io
import json
from typing import Any

import numpy as np

from flip_hf.data.decode import RefusedSample


class ClassIndex:
    """The class of a row, written as an index or as a name.

    Args:
        class_names: the classes, in the order of the indices.
    """

    def __init__(self, class_names: tuple[str, ...]):
        self.count = len(class_names)
        # Of a name that two classes have, no class can be told: such data are labelled by indices.
        self.by_name = {name: index for index, name in enumerate(class_names) if class_names.count(name) == 1}

    def __call__(self, value: Any) -> int:
        """The index.

        Raises:
            RefusedSample: it is none of the classes.
        """
        if isinstance(value, bytes):  # a member of a tar file
            value = value.decode("utf-8", errors="replace").strip()
        if isinstance(value, str):
            value = self.by_name.get(value, int(value) if value.isdecimal() else None)
        if isinstance(value, (int, np.integer)) and 0 <= value < self.count:
            return int(value)
        raise RefusedSample("unknown label")


class ClassVector:
    """Which classes an image shows, of data where it may show several: 1 shows, 0 does not, -1 is not to be judged.

    Args:
        count: number C of classes.
    """

    def __init__(self, count: int):
        self.count = count

    def __call__(self, value: Any) -> np.ndarray:
        """The classes (C,), int; from a list, or from a `.npy` member of a tar file.

        Raises:
            RefusedSample: it is something else.
        """
        try:
            if isinstance(value, bytes):
                value = np.load(io.BytesIO(value), allow_pickle=False)
            classes = np.asarray(value, dtype=np.int64)
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise RefusedSample("unknown label") from error
        if classes.shape != (self.count,) or not np.isin(classes, (-1, 0, 1)).all():
            raise RefusedSample("unknown label")
        return classes


def nothing(value: Any) -> None:
    """No target: of images alone."""


def captions(value: Any) -> list[str]:
    """All captions of an image: of a list, a JSON list, or a text with one a line.

    Raises:
        RefusedSample: there is none.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RefusedSample("damaged JSON") from error
    if isinstance(value, str):
        value = value.splitlines()
    if not isinstance(value, (list, tuple)) or not all(isinstance(caption, str) for caption in value):
        raise RefusedSample("missing caption")
    found = [caption.strip() for caption in value if caption.strip()]
    if not found:
        raise RefusedSample("empty caption")
    return found
