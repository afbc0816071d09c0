"""Bytes to a checked image, and a row to a sample, or the reason why not.

Decoding is ours and not `datasets`' so that a damaged sample is an answer and not the end of an iterator.
"""

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from flip_hf.data.files import MAX_FILE_BYTES, open_at

# Larger images are refused from their header alone, before memory is spent on them.
MAX_IMAGE_PIXELS = 64_000_000


class RefusedSample(Exception):
    """A sample that cannot be used. `reason` is a short, countable phrase."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


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


def decode_image(value: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes an image to RGB, turned upright by its EXIF tag where that can be read.

    Args:
        value: `{"bytes", "path"}` as `datasets` yields it undecoded, or the encoded bytes.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        RefusedSample: it is missing, no image, truncated or too large.
    """
    data = _image_bytes(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of damaged metadata; the pixels decide
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise RefusedSample("oversized image")
            image.load()
    except RefusedSample:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedSample("oversized image") from error
    except Exception as error:  # PIL's decoders raise many kinds for damaged data
        known = isinstance(error, Image.UnidentifiedImageError)
        raise RefusedSample("not an image" if known else "damaged image") from error
    return _upright(image).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return image


def choose_caption(value: Any, rng: np.random.Generator) -> str:
    """The caption of a row; one at random where there are several.

    Raises:
        RefusedSample: it is missing, empty or no text.
    """
    if isinstance(value, (list, tuple)) and value:
        value = value[int(rng.integers(len(value)))]
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
    return value
