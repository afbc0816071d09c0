"""Bytes to a checked image, and a row to a sample, or the reason why not.

Decoding is ours and not `datasets`' so that a damaged sample is an answer and not the end of an iterator.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from flip_hf.data.files import MAX_FILE_BYTES, open_at
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.texts import MAX_TEXT_BYTES, bound_text, is_unicode

# Larger images are refused from their header alone, before memory is spent on them.
MAX_IMAGE_PIXELS = 64_000_000

Box = tuple[int, int, int, int]


def _image_bytes(value: Any) -> bytes:
    """The encoded image in what `datasets` yields for an undecoded image column, or in plain bytes."""
    if isinstance(value, dict):
        if value.get("bytes"):
            return value["bytes"]
        if value.get("path"):
            return _read(value["path"])
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise RefusedSample("empty image")
        return bytes(value)
    raise RefusedSample("missing image" if not value or isinstance(value, dict) else "image column holds no image")


def _read(path: str) -> bytes:
    try:
        with open_at(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except Exception as error:  # file systems raise many kinds
        raise RefusedSample("unreadable image file") from error
    if len(data) > MAX_FILE_BYTES:
        raise RefusedSample("oversized file")
    return data


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turns whatever PIL raises for damaged data into a refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of damaged metadata; the pixels decide
            yield
    except RefusedSample:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedSample("oversized image") from error
    except Exception as error:  # PIL's decoders raise many kinds for damaged data
        known = isinstance(error, Image.UnidentifiedImageError)
        raise RefusedSample("not an image" if known else "damaged image") from error


def open_image(value: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Opens an image; a JPEG is not decoded yet.

    Args:
        value: `{"bytes", "path"}` as `datasets` yields it undecoded, or the encoded bytes.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        RefusedSample: it is missing, no image or too large, or no JPEG and damaged.
    """
    data = _image_bytes(value)
    with _refusing():
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > max_pixels:
            raise RefusedSample("oversized image")
        if image.format != "JPEG":  # others have their EXIF tag behind the pixels
            image.load()
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it is turned upright."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # as in `_upright`
        turned = False
    return (image.height, image.width) if turned else image.size


def decode_image(value: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes an image to RGB, turned upright by its EXIF tag where that can be read.

    Arguments are those of [`open_image`].

    Raises:
        RefusedSample: it is missing, no image, truncated or too large.
    """
    return _decoded(open_image(value, max_pixels))


def decode_crop(image: Image.Image, box: Box, side: int) -> Image.Image:
    """Decodes a part of an opened image to RGB, as small as is still `side` x `side` pixels or more.

    A JPEG is decoded at a half, a quarter or an eighth of its size where that is enough: its decoder then leaves the
    high frequencies of each 8 x 8 block out, which costs less than to compute them and average them away. The box is
    moved to whole pixels of that size, by less than one of them.

    Args:
        image: from [`open_image`].
        box: left, top, right and bottom, in pixels of the upright image.
        side: what the part is to be resized to.

    Raises:
        RefusedSample: the image is truncated or otherwise damaged.
    """
    scale = 1
    if image.format == "JPEG":
        scale = next(n for n in (8, 4, 2, 1) if n == 1 or _fits(scaled_box(box, n), side))
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    return _decoded(image).crop(scaled_box(box, scale))


def scaled_box(box: Box, scale: int) -> Box:
    """A box of an image that is decoded at 1 / scale of its size; Python rounds a half to the even number."""
    left, top, right, bottom = (round(edge / scale) for edge in box)
    return left, top, right, bottom


def _fits(box: Box, side: int) -> bool:
    return min(box[2] - box[0], box[3] - box[1]) >= side


def _decoded(image: Image.Image) -> Image.Image:
    with _refusing():
        image.load()
    image = _upright(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # a broken EXIF block is no reason to lose the picture
        ImageOps.exif_transpose(image, in_place=True)  # most need no turn; a copy takes half as long as decoding
    return image


def choose_caption(value: Any, rng: np.random.Generator) -> str:
    """Chooses the caption of a row, one at random where there are several, and cuts it (see [`bound_text`]).

    Raises:
        RefusedSample: it is missing, empty, no text, or of megabytes.
    """
    if isinstance(value, (list, tuple)) and value:
        value = value[int(rng.integers(len(value)))]
    if isinstance(value, (bytes, bytearray, str)) and len(value) > MAX_TEXT_BYTES:
        raise RefusedSample("oversized caption")
    if isinstance(value, (bytes, bytearray)):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RefusedSample("caption is not UTF-8") from error
    if value is None:
        raise RefusedSample("missing caption")
    if not isinstance(value, str):
        raise RefusedSample("caption is not text")
    if not value.strip():
        raise RefusedSample("empty caption")
    value = bound_text(value)
    if not is_unicode(value):
        raise RefusedSample("caption is not UTF-8")
    return value
