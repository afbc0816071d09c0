"""Hashes images: their bytes, to find equal ones, and their looks, to find copies that were encoded or resized."""

import hashlib
import math
from functools import cache

import numpy as np
from PIL import Image

CONTENT_BYTES = 16
# Mean red, green and blue of the quarters of an image.
COLOURS = 12
# Side of the grey image that a perceptual hash is computed from, and of the block of its lowest frequencies.
SIDE = 32
_LOW = 8
# Standard deviation, in grey levels of 255, below which an image has no structure to compare.
MIN_CONTRAST = 4.0


def content_hash(data: bytes) -> bytes:
    """Hashes bytes to [`CONTENT_BYTES`]; equal hashes of different bytes do not occur."""
    return hashlib.blake2b(data, digest_size=CONTENT_BYTES).digest()


@cache
def _cosines() -> np.ndarray:
    """Returns the lowest frequencies (8, 32) of the discrete cosine transform (DCT-II)."""
    frequencies = np.arange(_LOW)[:, None]
    places = np.arange(SIDE)[None] + 0.5
    return np.cos(math.pi / SIDE * frequencies * places)


def perceptual_hash(image: Image.Image) -> int | None:
    """Hashes the looks of an image to 64 bits, of which copies that were encoded or resized again share almost all.

    This is pHash (Zauner 2010): the signs of the 8 x 8 lowest frequencies of a small grey copy, against their median.
    JPEG compression and resizing change high frequencies first.

    Args:
        image: an image in RGB.

    Returns:
        The hash; None for an image without structure, whose hash would be noise.
    """
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    levels = np.asarray(grey, np.float64)
    if levels.std() < MIN_CONTRAST:
        return None
    low = _cosines() @ levels @ _cosines().T
    bits = np.packbits(low > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


def quarter_colours(image: Image.Image) -> bytes:
    """Returns the mean red, green and blue of the four quarters of an image in RGB, [`COLOURS`] levels of 255.

    A perceptual hash knows shades alone: without colours, red trousers are a copy of black ones.
    """
    quarters = image.resize((2, 2), Image.Resampling.BOX)
    return quarters.tobytes()
