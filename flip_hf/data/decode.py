"""Decodes bytes into a checked image and a row into a sample, or gives the reason why not.

Decoding is not left to `datasets`, where a damaged sample would end the iterator instead of being a result.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from flip_hf.data.bounds import BudgetedBytes, check_encoded, check_exif, check_tiles
from flip_hf.data.files import MAX_FILE_BYTES, OversizedFileError, StoredFile, read_file
from flip_hf.data.jpeg_end import ended, lacks_end
from flip_hf.data.plain_jpeg import PlainJpeg, read_plain
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.rendering import WHITE, Colour, as_shown, load
from flip_hf.data.texts import read_caption, usable_captions

# Larger images are refused by their header, before memory is spent on them.
MAX_IMAGE_PIXELS = 64_000_000
# Each row costs a decoder a tenth of a microsecond, however short it is.
MAX_IMAGE_SIDE = 2**23
# The formats that are opened. Pillow knows forty more: some start another program (EPS, itself a program, starts
# Ghostscript), some serve one game or microscope, and decoders that are rarely used are rarely fixed. Each of these
# (and MPO, which is opened as JPEG) is decoded in this process by a widely used library. JPEG 2000 is missing because
# its decoder allocates memory for the tiles, precincts and code blocks that a header of a hundred bytes claims.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "ICO", "TGA")
# Pillow's names for a JPEG; in the second kind, which phones write, more pictures follow the first in the same file.
_JPEGS = ("JPEG", "MPO")
# A picture with a more extreme aspect ratio than this is cropped to its centre before it is resized.
MAX_ASPECT = 8

Box = tuple[int, int, int, int]
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_bytes(value: object) -> bytes:
    """Returns the encoded image from an undecoded image column of `datasets`, from bytes, or from a file.

    Raises:
        RefusedSample: there is no image, it is too large, or its file cannot be read.
    """
    if isinstance(value, StoredFile):
        return _read(value.path)
    if isinstance(value, dict):
        if value.get("bytes"):
            value = value["bytes"]
        elif value.get("path"):
            raise RefusedSample("image is a path, not bytes")
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise RefusedSample("empty image")
        if len(value) > MAX_FILE_BYTES:
            raise RefusedSample("oversized file")
        return bytes(value)
    raise RefusedSample("missing image" if not value or isinstance(value, dict) else "image column holds no image")


def _read(path: str) -> bytes:
    try:
        return read_file(path)
    except OversizedFileError as error:
        raise RefusedSample("oversized file") from error
    except Exception as error:  # file systems raise many types
        raise RefusedSample("unreadable image file") from error


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turns any exception that Pillow raises for damaged data into a refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about damaged metadata; only the pixels matter
            yield
    except RefusedSample:
        raise
    except Image.DecompressionBombError as error:
        raise RefusedSample("oversized image") from error
    except Exception as error:  # Pillow's decoders raise many types for damaged data
        known = isinstance(error, Image.UnidentifiedImageError)
        raise RefusedSample("not an image" if known else "damaged image") from error


@cache
def _known_formats() -> tuple[str, ...]:
    """Returns the [`FORMATS`] that this Pillow was built with: AVIF came with 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(value: object, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Opens an image; a JPEG is not decoded yet.

    Args:
        value: an undecoded `{"bytes", "path"}` of `datasets`, whose path is never opened; the encoded bytes; or a
            [`StoredFile`].
        max_pixels: larger images are refused before they are decoded.

    Raises:
        RefusedSample: it is missing, not an image, or would take too much memory or time (see `bounds.py`); or it is
            damaged and not a JPEG, whose damage shows later.
    """
    data = image_bytes(value)
    with _refusing():
        check_encoded(data, max_pixels)
        image = Image.open(BudgetedBytes(data), formats=_known_formats())
        if image.width * image.height > max_pixels or max(image.size) > MAX_IMAGE_SIDE:
            raise RefusedSample("oversized image")
        check_tiles(image.tile, max_pixels)
        if image.format not in _JPEGS:  # other formats have their EXIF tag after the pixels
            load(image)
            check_exif(image.info)  # a JPEG's is in its first bytes, and was checked with them
        elif lacks_end(data):
            image = Image.open(BudgetedBytes(ended(data, image.width * image.height)), formats=_known_formats())
    return image


def open_to_crop(value: object, max_pixels: int = MAX_IMAGE_PIXELS) -> PlainJpeg | Image.Image:
    """Opens an image of which [`decode_crop`] will decode a part; see [`open_image`]."""
    data = image_bytes(value)
    return read_plain(data, max_pixels) or open_image(data, max_pixels)


def upright_size(image: PlainJpeg | Image.Image) -> tuple[int, int]:
    """Returns the width and height of an opened image once it is turned upright."""
    if isinstance(image, PlainJpeg):
        return image.size
    return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else image.size


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return None


def decode_image(value: object, background: Colour = WHITE, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes an image to RGB as a viewer shows it (see `rendering.py`), turned upright by its EXIF tag.

    Args:
        value: see [`open_image`].
        background: colour of transparent parts.
        max_pixels: see [`open_image`].

    Raises:
        RefusedSample: it is missing, not an image, truncated or too large.
    """
    return _decoded(open_image(value, max_pixels), background)


def decode_crop(image: PlainJpeg | Image.Image, box: Box, side: int, background: Colour = WHITE) -> np.ndarray:
    """Decodes a part of an opened image, at the smallest size that is still at least `side` x `side` pixels.

    A JPEG is decoded at a half, a quarter or an eighth of its size where that is enough: the decoder then skips the
    high frequencies of each 8 x 8 block, which costs less than computing them and averaging them away. The box is
    moved to whole pixels of that size, by less than one of them. (Other eighths cost more than the whole size, for
    which alone libjpeg-turbo has vector instructions.)

    Args:
        image: from [`open_to_crop`] or [`open_image`].
        box: left, top, right and bottom, in pixels of the upright image.
        side: side to which the part will be resized, in pixels.
        background: colour of transparent parts.

    Returns:
        (height, width, 3), uint8.

    Raises:
        RefusedSample: the image is truncated or otherwise damaged.
    """
    scale = 1
    if isinstance(image, PlainJpeg) or image.format in _JPEGS:
        scale = next(n for n in (8, 4, 2, 1) if n == 1 or _fits(scaled_box(box, n), side))
    part = scaled_box(box, scale)
    if isinstance(image, PlainJpeg):
        try:
            left, top, right, bottom = part
            return image.pixels(bottom, scale)[top:bottom, left:right]
        except ValueError:  # Pillow knows the reason
            image = open_image(image.data)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    decoded = _decoded(image, background)
    return np.array(decoded if part == (0, 0, *decoded.size) else decoded.crop(part))


def scaled_box(box: Box, scale: int) -> Box:
    """Scales a box to an image decoded at 1 / scale of its size; Python rounds a half to the even number."""
    left, top, right, bottom = (round(edge / scale) for edge in box)
    return left, top, right, bottom


def _fits(box: Box, side: int) -> bool:
    return min(box[2] - box[0], box[3] - box[1]) >= side


def _decoded(image: Image.Image, background: Colour) -> Image.Image:
    opened = getattr(image, "fp", None)
    if isinstance(opened, BudgetedBytes):
        opened.restart()
    with _refusing():
        load(image)
        shown = as_shown(image, background)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:  # most images need none, and a copy takes half as long as decoding
        shown = shown.transpose(turn)
        # Pillow's own function rewrites the EXIF block without the tag, and reads all of it to do so.
        for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
            shown.info.pop(name, None)
    return shown


def central_box(width: int, height: int) -> Box:
    """Returns the central box of a picture, at most [`MAX_ASPECT`] to one; all of a picture of moderate shape."""
    short = min(width, height)
    # Cut an even number of pixels, so that the centre stays where it is.
    cut = -(-max(0, max(width, height) - MAX_ASPECT * short) // 2)
    return (cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut)


def bounded_shape(image: Any) -> Any:
    """Crops a picture of extreme shape to its centre, before its short side is enlarged to what a model sees.

    Resized to a short side of 224, a picture of 2,000 x 1 pixels would take a gigabyte, of which only the central
    square is kept. Its centre of [`MAX_ASPECT`] to one yields the same square, except for what a resampling filter sees
    beyond the cut. Pictures of other shapes are returned unchanged.

    Args:
        image: a PIL image, or an array (H, W, C) or (H, W).
    """
    if isinstance(image, Image.Image):
        box = central_box(*image.size)
        return image if box == (0, 0, *image.size) else image.crop(box)
    left, top, right, bottom = central_box(image.shape[1], image.shape[0])
    return image[top:bottom, left:right]


def open_picture(picture: str | Image.Image, background: Colour = WHITE) -> Image.Image:
    """Opens a picture given by path, URL or as a Pillow image, and decodes it as [`decode_image`] does.

    Args:
        picture: path, URL, or an image opened by Pillow and not yet turned or converted.
        background: colour of transparent parts.

    Raises:
        ValueError: the picture cannot be used; the message names it.
    """
    try:
        if isinstance(picture, Image.Image):
            return _decoded(picture, background)
        return decode_image(StoredFile(picture), background)
    except RefusedSample as error:
        name = getattr(picture, "filename", "") or "The picture" if isinstance(picture, Image.Image) else picture
        raise ValueError(f"{name} {_in_words(error, str(name))}.") from None


def _in_words(refusal: RefusedSample, name: str) -> str:
    """Says what is wrong with a picture of this name, as the rest of a sentence."""
    if refusal.reason == "not an image":
        return "is not an image"
    if refusal.reason != "unreadable image file":
        return f"cannot be used: {refusal.reason}"
    cause = refusal.__cause__
    if isinstance(cause, IsADirectoryError):
        return f"is a folder; name the pictures in it, such as {os.path.join(name, '*.jpg')}"
    why = getattr(cause, "strerror", None) or str(cause)
    # For a URL, file systems say no more than the URL.
    return f"cannot be read: {'there is no such file, or no connection to its server' if why == name else why}"


def choose_caption(value: object, rng: np.random.Generator) -> str:
    """Chooses the caption of a row: if there are several, a random usable one; see [`read_caption`].

    Raises:
        RefusedSample: no caption can be used.
    """
    if not isinstance(value, (list, tuple)) or not value:
        return read_caption(value)
    drawn = value[int(rng.integers(len(value)))]
    try:
        return read_caption(drawn)
    except RefusedSample:
        # The others are read only now, as most often the first choice is usable.
        usable = usable_captions(value)
        if not usable:
            raise
        return usable[int(rng.integers(len(usable)))]
