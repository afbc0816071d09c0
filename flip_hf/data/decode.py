"""Bytes to a checked image, and a row to a sample, or the reason why not.

Decoding is ours and not `datasets`' so that a damaged sample is an answer and not the end of an iterator.
"""

import contextlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from flip_hf.data.bounds import BudgetedBytes, check_encoded, check_exif, check_tiles
from flip_hf.data.files import MAX_FILE_BYTES, OversizedFileError, StoredFile, read_file
from flip_hf.data.jpeg_end import ended, lacks_end
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.rendering import WHITE, Colour, as_shown, load
from flip_hf.data.texts import read_caption, usable_captions

# Larger images are refused from their header alone, before memory is spent on them.
MAX_IMAGE_PIXELS = 64_000_000
# A row costs a decoder a tenth of a microsecond, however short it is.
MAX_IMAGE_SIDE = 2**23
# What pictures are opened as. Pillow knows forty formats more: some start another program (EPS, which is a program
# itself, and Ghostscript), some are there for their own game or microscope, and what is rarely read is rarely mended.
# Each of these (and MPO, which is opened as JPEG) is decoded in this process by a library in wide use. JPEG 2000 is not
# among them: its decoder reserves memory by the tiles, precincts and code blocks that a header of a hundred bytes
# claims.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "ICO", "TGA")
# What Pillow calls a JPEG; of the second kind, which phones write, other pictures follow the first in the same file.
_JPEGS = ("JPEG", "MPO")
# Of a picture longer than this many times its width, or wider, the centre is cut out before it is resized.
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


def image_bytes(value: Any) -> bytes:
    """The encoded image in what `datasets` yields for an undecoded image column, in plain bytes, or in a file.

    Raises:
        RefusedSample: there is none, it is too large, or its file cannot be read.
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
    except Exception as error:  # file systems raise many kinds
        raise RefusedSample("unreadable image file") from error


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


@cache
def _known_formats() -> tuple[str, ...]:
    """Those of [`FORMATS`] that this Pillow was built with: AVIF came with 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(value: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Opens an image; a JPEG is not decoded yet.

    Args:
        value: `{"bytes", "path"}` as `datasets` yields it undecoded, of which the path is never opened; the encoded
            bytes; or a [`StoredFile`].
        max_pixels: larger images are refused before they are decoded.

    Raises:
        RefusedSample: it is missing, no image, or asks for too much memory or time (see `bounds.py`); or it is no JPEG
            and damaged.
    """
    data = image_bytes(value)
    with _refusing():
        check_encoded(data, max_pixels)
        image = Image.open(BudgetedBytes(data), formats=_known_formats())
        if image.width * image.height > max_pixels or max(image.size) > MAX_IMAGE_SIDE:
            raise RefusedSample("oversized image")
        check_tiles(image.tile, max_pixels)
        if image.format not in _JPEGS:  # others have their EXIF tag behind the pixels
            load(image)
            check_exif(image.info)  # a JPEG's is in its first bytes, and was checked with them
        elif lacks_end(data):
            image = Image.open(BudgetedBytes(ended(data, image.width * image.height)), formats=_known_formats())
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it is turned upright."""
    return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else image.size


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return None


def decode_image(value: Any, background: Colour = WHITE, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes an image to RGB as a viewer shows it (see `rendering.py`), turned upright by its EXIF tag.

    Args:
        value: of [`open_image`].
        background: of transparent parts.
        max_pixels: of [`open_image`].

    Raises:
        RefusedSample: it is missing, no image, truncated or too large.
    """
    return _decoded(open_image(value, max_pixels), background)


def decode_crop(image: Image.Image, box: Box, side: int, background: Colour = WHITE) -> Image.Image:
    """Decodes a part of an opened image to RGB, as small as is still `side` x `side` pixels or more.

    A JPEG is decoded at a half, a quarter or an eighth of its size where that is enough: its decoder then leaves the
    high frequencies of each 8 x 8 block out, which costs less than to compute them and average them away. The box is
    moved to whole pixels of that size, by less than one of them.

    Args:
        image: from [`open_image`].
        box: left, top, right and bottom, in pixels of the upright image.
        side: what the part is to be resized to.
        background: of transparent parts.

    Raises:
        RefusedSample: the image is truncated or otherwise damaged.
    """
    scale = 1
    if image.format in _JPEGS:
        scale = next(n for n in (8, 4, 2, 1) if n == 1 or _fits(scaled_box(box, n), side))
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    return _decoded(image, background).crop(scaled_box(box, scale))


def scaled_box(box: Box, scale: int) -> Box:
    """A box of an image that is decoded at 1 / scale of its size; Python rounds a half to the even number."""
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
    if turn is not None:  # most need none: a copy takes half as long as decoding
        shown = shown.transpose(turn)
        # Pillow's own function writes the EXIF block anew without the tag, and to do so reads all that is in it.
        for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
            shown.info.pop(name, None)
    return shown


def central_box(width: int, height: int) -> Box:
    """The centre of a picture of extreme shape, [`MAX_ASPECT`] to one at most; the whole of any other."""
    short = min(width, height)
    # An even number of pixels: then the centre stays where it is.
    cut = -(-max(0, max(width, height) - MAX_ASPECT * short) // 2)
    return (cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut)


def bounded_shape(image: Any) -> Any:
    """Cuts the centre out of a picture of extreme shape, before its short side is enlarged to what a model sees.

    A picture of 2,000 x 1 pixels would take a gigabyte at a short side of 224, of which the central square is kept. Its
    centre of [`MAX_ASPECT`] to one gives that square, but for what a resampling filter sees beyond the cut. Pictures of
    other shapes are returned as they are.

    Args:
        image: a PIL image, or an array (H, W, C) or (H, W).
    """
    if isinstance(image, Image.Image):
        box = central_box(*image.size)
        return image if box == (0, 0, *image.size) else image.crop(box)
    left, top, right, bottom = central_box(image.shape[1], image.shape[0])
    return image[top:bottom, left:right]


def open_picture(picture: str | Image.Image, background: Colour = WHITE) -> Image.Image:
    """Opens a picture that the user names, by path or URL, or has opened with Pillow, as [`decode_image`] does.

    Args:
        picture: where it is, or the picture, of which Pillow has neither turned nor converted anything.
        background: of transparent parts.

    Raises:
        ValueError: it cannot be used; the message names it.
    """
    try:
        if isinstance(picture, Image.Image):
            return _decoded(picture, background)
        return decode_image(StoredFile(picture), background)
    except RefusedSample as error:
        name = getattr(picture, "filename", "") or "The picture" if isinstance(picture, Image.Image) else picture
        cause = error.__cause__
        if error.reason == "unreadable image file":
            raise ValueError(f"{name} cannot be read: {getattr(cause, 'strerror', None) or cause}.") from None
        is_none = error.reason == "not an image"
        raise ValueError(f"{name} is not an image." if is_none else f"{name} cannot be used: {error.reason}.") from None


def choose_caption(value: Any, rng: np.random.Generator) -> str:
    """Chooses the caption of a row: of several, one of the usable at random; see [`read_caption`].

    Raises:
        RefusedSample: it cannot be used; of several, not one can.
    """
    if not isinstance(value, (list, tuple)) or not value:
        return read_caption(value)
    drawn = value[int(rng.integers(len(value)))]
    try:
        return read_caption(drawn)
    except RefusedSample:
        # Read only now: where all can be used, reading the others would be for nothing.
        usable = usable_captions(value)
        if not usable:
            raise
        return usable[int(rng.integers(len(usable)))]
