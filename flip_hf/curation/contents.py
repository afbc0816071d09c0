"""Reads what a row has to train on, or why training would skip it, with the functions that training uses."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from flip_hf.data.captions import CaptionColumn
from flip_hf.data.columns import column_value
from flip_hf.data.decode import decode_crop, image_bytes, open_image, upright_size
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.samples import sample_key
from flip_hf.data.sources import Source
from flip_hf.data.texts import read_caption, usable_captions

# The captions of one column of a row: a text, several, or the index of a class.
CaptionValue = str | list[str] | int
# Forms of the captions of a column: a text, a list of them, the index of a class, none.
TEXT, LIST, LABEL, NONE = "tli-"


@dataclass(frozen=True)
class Contents:
    """The usable contents of a row.

    Attributes:
        image: the encoded image.
        format: Pillow's name of its format.
        size: width and height in pixels, upright.
        pixels: the decoded image in RGB, upright, with sides of at least those asked for if the image has them.
        caption: a caption as training might draw it; None for images alone.
        captions: what the columns hold, by name; a column without usable captions in this row is left out.
    """

    image: bytes
    format: str
    size: tuple[int, int]
    pixels: Image.Image
    caption: str | None
    captions: Mapping[str, CaptionValue]

    def texts(self) -> list[str]:
        """Returns all captions that are texts or, where there are only labels, the one drawn."""
        found: list[str] = []
        for value in self.captions.values():
            if not isinstance(value, int):
                found += [value] if isinstance(value, str) else value
        return found or ([] if self.caption is None else [self.caption])


def caption_columns(source: Source) -> tuple[CaptionColumn, ...]:
    """Returns the columns that captions are drawn from; none for images alone."""
    if source.captions or source.target_column is None:
        return source.captions
    return (CaptionColumn(source.target_column),)


def forms_of(captions: Mapping[str, CaptionValue], names: Sequence[str]) -> str:
    """Returns the forms of the captions of some columns, a letter each."""
    return "".join(_form(captions.get(name)) for name in names)


def _form(value: CaptionValue | None) -> str:
    if value is None:
        return NONE
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else LABEL


def key_of(row: dict, source: Source) -> str:
    """Returns a row's name, see [`sample_key`], with escapes for bytes of file names that are not UTF-8."""
    return sample_key(row, source).encode("utf-8", "backslashreplace").decode()


def read_contents(row: dict, source: Source, side: int, background: Colour = WHITE) -> Contents:
    """Reads a row.

    Args:
        row: the row.
        source: its data set.
        side: a JPEG with larger sides is decoded at a fraction of its size, at least this one, in pixels.
        background: colour of transparent parts.

    Raises:
        RefusedSample: training would skip it; the reason is the one that training counts.
    """
    caption = None
    if source.target_column is not None:
        caption = source.caption(row, np.random.default_rng(0))
    image = image_bytes(source.image(row))
    opened = open_image(image)
    size = upright_size(opened)
    encoding = opened.format or ""
    pixels = Image.fromarray(decode_crop(opened, (0, 0, *size), side, background))
    return Contents(image, encoding, size, pixels, caption, _read_captions(row, caption_columns(source)))


def _read_captions(row: dict, columns: Sequence[CaptionColumn]) -> dict[str, CaptionValue]:
    found: dict[str, CaptionValue] = {}
    for column in columns:
        with contextlib.suppress(RefusedSample):
            found[column.name] = _read_captions_of(row, column)
    return found


def _read_captions_of(row: dict, column: CaptionColumn) -> CaptionValue:
    value = column_value(row, column.name)
    if column.labels is not None:
        return column.labels.index(value)
    if isinstance(value, (list, tuple)) and (usable := usable_captions(value)):
        return usable
    return read_caption(value)
