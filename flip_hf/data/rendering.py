"""Renders pictures of any mode as a viewer shows them: numbers by their range, transparent parts on a background.

Pillow's own `convert("RGB")` clips numbers of more than eight bits to white and fractions to black, and drops the alpha
channel, which shows whatever colour the transparent pixels happen to have.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_NUMBER_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
# In the 32-bit pixels of these formats, the fourth byte is often unused and zero.
_MAYBE_UNUSED_ALPHA = ("TGA", "BMP")
# Pillow scales the samples of a PNG to eight bits, but not its transparent colour.
_TRANSPARENCY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
# Pixels converted at a time, because their numbers take four times the memory of the picture.
_STRIP_PIXELS = 2**20
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_SAMPLE_FORMAT = 339
_WHITE_IS_ZERO = 0
_UNSIGNED = 1


def read_colour(text: str) -> Colour:
    """Parses an opaque colour: a CSS name (`white`), `#ffffff` or `rgb(255, 255, 255)`.

    Raises:
        ValueError: the text is not an opaque colour.
    """
    try:
        colour = ImageColor.getrgb(text)
    except ValueError:
        colour = ()
    if len(colour) != 3:
        raise ValueError(
            f"{text!r} is not an opaque colour. Give a name such as white, or red, green and blue as #ffffff."
        )
    return colour


def background_of(image_processor: object) -> Colour:
    """Returns the colour behind transparent pictures for a model: its image processor's `background`, or white.

    Raises:
        ValueError: the image processor's `background` is not a colour.
    """
    value = getattr(image_processor, "background", None)
    if value is None:
        return WHITE
    is_colour = isinstance(value, (list, tuple)) and len(value) == 3
    if not is_colour or not all(type(level) is int and 0 <= level <= 255 for level in value):
        raise ValueError(
            f"The image processor's background is {value!r:.80}. Write red, green and blue into its configuration, "
            "such as [255, 255, 255]."
        )
    return value[0], value[1], value[2]


def load(image: Image.Image) -> None:
    """Decodes an opened picture, and scales the transparent colour of a PNG like its decoded pixels.

    Raises:
        Exception: it is damaged; Pillow's decoders raise many types.
    """
    tiles = getattr(image, "tile", None)
    scale = _TRANSPARENCY_SCALES.get(str(tiles[0][3])) if image.format == "PNG" and tiles else None
    image.load()
    colour = image.info.get("transparency")
    if scale is None or colour is None:
        return
    if isinstance(colour, tuple):
        image.info["transparency"] = tuple(int(level * scale) for level in colour)
    else:
        image.info["transparency"] = int(colour * scale)


def as_shown(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """Converts a decoded picture to RGB as viewers show it.

    Numbers become grey levels by their range: with 16 bits (or fewer, if a TIFF says so) the largest such number is
    white. Numbers of 32 bits and fractions have no usual range: white is the smallest of 1 (fractions only), 255 and
    65,535 that is not below any of them, else the largest number; in fractions, up to twice that is taken for an
    overshoot of resampling. Negative numbers and NaN are black.

    Args:
        image: an image of any mode that Pillow opens; an opaque RGB image is returned unchanged.
        background: colour of transparent parts.

    Raises:
        ValueError: its mode cannot be converted to RGB.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _NUMBER_MODES:
        image = _grey(image)
    elif image.mode == "LAB":
        image = _from_lab(image)
    if not _is_transparent(image):
        return image.convert("RGB")
    # Pillow blends neither palettes nor colours that are premultiplied by alpha.
    layer = image if image.mode == "RGBA" else image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    shown = Image.new("RGB", image.size, background)
    shown.paste(layer, mask=layer)
    return shown


def _is_transparent(image: Image.Image) -> bool:
    if image.mode == "RGBA" and image.format in _MAYBE_UNUSED_ALPHA:
        return image.getchannel("A").getextrema() != (0, 0)
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    return image.mode in _ALPHA_MODES or "transparency" in image.info or palette.endswith("A")


def _from_lab(image: Image.Image) -> Image.Image:
    lab = ImageCms.createProfile("LAB")
    rgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None  # None is returned only by in-place changes
    return converted


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def _grey(image: Image.Image) -> Image.Image:
    """Converts a picture of numbers to grey levels, with an alpha channel if one of the numbers is transparent."""
    tags = getattr(image, "tag_v2", {})
    is_unsigned = image.mode == "I" and tags.get(_SAMPLE_FORMAT, (0,))[0] == _UNSIGNED
    kind = "u4" if is_unsigned else None  # Pillow takes it for a signed number
    largest = _largest(image, kind)
    is_inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO

    def to_grey(numbers: np.ndarray) -> np.ndarray:
        numbers = numbers if kind is None else numbers.view(kind)
        finite = np.nan_to_num(numbers.astype(np.float32), nan=0, posinf=largest, neginf=0)
        grey = (finite * np.float32(255 / largest)).round().clip(0, 255).astype(np.uint8)
        return 255 - grey if is_inverted else grey

    transparent = image.info.get("transparency")
    grey = _by_strips(image, to_grey)
    if isinstance(transparent, int):
        grey.putalpha(_by_strips(image, lambda numbers: np.where(numbers == transparent, 0, 255).astype(np.uint8)))
    return grey


def _largest(image: Image.Image, kind: str | None) -> float:
    """Returns the number that is white."""
    if image.mode.startswith("I;16"):
        return 2 ** getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0] - 1
    if image.format in ("PNG", "PPM"):  # Pillow scales all of theirs to 16 bits
        return 65535
    largest = 0.0
    for numbers in _strips(image):
        numbers = numbers if kind is None else numbers.view(kind)
        largest = max(largest, float(numbers.max(initial=0, where=np.isfinite(numbers))))
    if image.mode == "F":
        return next((white for white in (1, 255, 65535) if largest < 2 * white), largest)
    return next((white for white in (255, 65535) if largest <= white), largest)


def _strips(image: Image.Image) -> Any:
    """Yields arrays (rows, width) of a single-channel picture, from top to bottom."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def _by_strips(image: Image.Image, function: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """Makes a picture of mode L by applying a function to the numbers (rows, width)."""
    made = Image.new("L", image.size)
    top = 0
    for numbers in _strips(image):
        made.paste(Image.fromarray(function(numbers)), (0, top))
        top += len(numbers)
    return made
