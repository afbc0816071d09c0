"""Reads the targets of evaluation from rows: a class, several classes, or captions."""

import io
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from flip_hf.data.class_names import index_of, names_an_index
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.texts import MAX_CAPTIONS, MAX_TEXT_BYTES, read_caption, read_json, usable_captions

# Formats of a text with captions: one caption, one per line, or a JSON list.
CaptionForm = Literal["text", "lines", "json"]
CAPTION_FORMS: tuple[CaptionForm, ...] = get_args(CaptionForm)
# No class has a longer name, in bytes.
_MAX_NAME_BYTES = 2**16


class ClassIndex:
    """The class of a row, given as an index or a name.

    A number is an index. A string is a name; if no class has it, it may be an index in ASCII digits, as in the `.cls`
    members of tar shards.

    Args:
        class_names: the classes, in the order of the indices.
        texts: how to read a string if names are numbers, too: `index` or `name`. None refuses an ambiguous string.
    """

    def __init__(self, class_names: tuple[str, ...], texts: str | None = None):
        self.count = len(class_names)
        self.texts = texts
        self.is_ambiguous = texts is None and names_an_index(class_names) is not None
        # A name that two classes share identifies neither: such data are labelled by indices.
        counts = Counter(class_names)
        self.by_name = {name: index for index, name in enumerate(class_names) if counts[name] == 1}

    def __call__(self, value: object) -> int:
        """Returns the index of the class.

        Raises:
            RefusedSample: the value is not a class, marks a missing label (-1), or could be two classes.
        """
        if isinstance(value, (bytes, str)) and len(value) > _MAX_NAME_BYTES:
            raise RefusedSample("unknown label")
        if isinstance(value, bytes):  # a member of a tar file
            value = value.decode("utf-8", errors="replace")
        if isinstance(value, str):
            value = self._read(value.strip())
        if isinstance(value, (float, np.floating)) and value.is_integer():  # a column with gaps
            value = int(value)
        if isinstance(value, (int, np.integer)) and 0 <= value < self.count:
            return int(value)
        raise RefusedSample(
            "no label (-1)" if isinstance(value, (int, np.integer)) and value == -1 else "unknown label"
        )

    def _read(self, text: str) -> int | None:
        index = -1 if text == "-1" and text not in self.by_name else index_of(text)
        if self.texts == "index":
            return index
        if self.is_ambiguous and index is not None and index >= 0:
            raise RefusedSample("label is an index or a name")
        return self.by_name.get(text, None if self.texts == "name" else index)


class ClassVector:
    """The classes that an image shows, in multi-label data: 1 shown, 0 not shown, -1 not to be evaluated.

    Args:
        count: number C of classes.
    """

    def __init__(self, count: int):
        self.count = count

    def __call__(self, value: object) -> np.ndarray:
        """Returns the classes (C,), int, from a list or from a `.npy` member of a tar file.

        Raises:
            RefusedSample: the value is neither.
        """
        try:
            classes = self._read(value) if isinstance(value, bytes) else self._listed(value)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise RefusedSample("unknown label") from error
        # Only whole numbers: 0.5 would become 0, and a non-finite number anything.
        if classes.shape != (self.count,) or classes.dtype.kind not in "biuf" or not np.isin(classes, (-1, 0, 1)).all():
            raise RefusedSample("unknown label")
        return classes.astype(np.int64)

    def _listed(self, value: object) -> np.ndarray:
        if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != self.count:
            raise ValueError("no list of as many numbers")
        return np.asarray(value)

    def _read(self, file: bytes) -> np.ndarray:
        """Reads a `.npy` file; `np.load` would allocate what a header claims, and open archives."""
        header = io.BytesIO(file)
        version = np.lib.format.read_magic(header)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:  # 3.0 is for names of fields
            raise ValueError(f"no array of numbers, but version {version}")
        shape, _, dtype = read(header)
        if shape != (self.count,) or dtype.kind not in "biuf":
            raise ValueError(f"no {self.count} numbers, but {shape} of {dtype}")
        return np.frombuffer(file, dtype, count=self.count, offset=header.tell())


def nothing(value: object) -> None:
    """Returns None, the target of images alone."""


class Captions:
    """All captions of an image: the usable ones of a list, or those in a text; see [`read_caption`].

    Args:
        form: format of a text, one of [`CAPTION_FORMS`].
    """

    def __init__(self, form: str = "text"):
        self.form = form

    def __call__(self, value: object) -> list[str]:
        """Returns the captions without surrounding white space.

        Raises:
            RefusedSample: no caption can be used, or there are more than [`MAX_CAPTIONS`].
        """
        if not isinstance(value, (list, tuple)):
            value = self._parts(value)
        if len(value) > MAX_CAPTIONS:
            raise RefusedSample("too many captions")
        found = [caption.strip() for caption in usable_captions(value)]
        if not found:
            read_caption(value[0] if value else "")  # raises the reason
        return found

    def _parts(self, value: object) -> Sequence[object]:
        if self.form == "text" or not isinstance(value, (bytes, bytearray, str)):
            return [value]
        if len(value) > MAX_TEXT_BYTES:
            raise RefusedSample("oversized caption")
        if self.form == "json":
            listed = read_json(bytes(value) if isinstance(value, bytearray) else value)
            if not isinstance(listed, list):
                raise RefusedSample("captions are not a JSON list")
            return listed
        # Not `splitlines`, which also splits at U+2028, NEL and form feeds, which occur inside captions.
        return value.split("\n") if isinstance(value, str) else bytes(value).split(b"\n")
