"""Decodes plain JPEGs with libjpeg-turbo itself, to Pillow's pixels, and not the rows below what is wanted.

Pillow decodes JPEGs by the same library, but reads their bytes in pieces, keeps four bytes a pixel, and copies them
twice on the way to a tensor. Here simplejpeg decodes into an array. It is optional, and only a plain JPEG is decoded by
it: baseline, three components, one scan, no EXIF block that may turn the picture, nothing but image data from the scan
to the end of the file. In such a file damage changes pixels, but never makes Pillow refuse it, and no pixel depends on
the rows below it. It keeps all bounds of bounds.py. So samples are the same, to the bit, with and without simplejpeg.
"""

import io
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_BASELINE = 0xC0
_SCAN = 0xDA
# Content of the header of a frame of three components: bits, height, width, 3, three bytes for each.
_FRAME_BYTES = 15
# The header of a scan of three components: marker, length, 3, two bytes for each, the coefficients that it holds.
_SCAN_HEADER = b"\xff\xda\0\x0c\3"
_SCAN_BYTES = 14
# Others make libjpeg-turbo warn, as does a JFIF version other than 1; and once it has warned, simplejpeg takes an error
# for a further warning, and returns what it has.
_ALL_COEFFICIENTS = b"\0\x3f\0"
# Tables of quantization and Huffman codes, restart interval, comment: segments that say nothing about the picture as it
# is shown. Of others, these, with as many bytes as Pillow reads of them: JFIF, a colour profile.
_TABLES = (0xDB, 0xC4, 0xDD, 0xFE)
_KNOWN = {0xE0: (b"JFIF\0\1", 14), 0xE2: (b"ICC_PROFILE\0", 14)}
# Markers but those that belong to a scan's data: stuffed bytes and restarts.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_END = b"\xff\xd9"
# Bytes before the scan. So few hold less metadata than any bound allows.
_MAX_HEADER = 2**14
# Narrower pictures have the same width at two scales.
_MIN_WIDTH = 8


@dataclass(frozen=True)
class PlainJpeg:
    """A plain JPEG whose header was read.

    Attributes:
        data: the encoded picture.
        size: width and height.
        frame: place of the content of the frame's header in `data`.
    """

    data: bytes
    size: tuple[int, int]
    frame: int

    def pixels(self, bottom: int, scale: int = 1) -> np.ndarray:
        """Decodes the rows above `bottom`, at 1 / scale of their size, and perhaps some more.

        Args:
            bottom: rows wanted, of the scaled picture.
            scale: 1, 2, 4 or 8.

        Returns:
            (rows, width / scale rounded up, 3), uint8.

        Raises:
            ValueError: libjpeg-turbo cannot decode it.
        """
        assert simplejpeg is not None
        width, height = self.size
        shown = min(height, self._rows(bottom * scale))
        data = bytearray(self.data)
        data[self.frame + 1 : self.frame + 3] = shown.to_bytes(2, "big")
        least = {"min_height": -(-shown // scale), "min_width": -(-width // scale), "min_factor": 1}
        # Not strict, since data follow the last row, of which it would complain. Pillow shows damaged data, too.
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **(least if scale > 1 else {}))

    def _rows(self, bottom: int) -> int:
        """Returns the rows, in whole blocks, that determine those above `bottom`; colour needs the next one, too."""
        block = 8 * max(sampling & 15 for sampling in self.data[self.frame + 7 : self.frame + _FRAME_BYTES : 3])
        return -(-(bottom + 2) // block) * block


def read_plain(data: bytes, max_pixels: int) -> PlainJpeg | None:
    """Reads the header of a JPEG; returns None if it is not plain or too large, or simplejpeg cannot be used.

    Args:
        data: an encoded picture.
        max_pixels: the most pixels it may have.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data.endswith(_END) or not is_usable():
        return None
    header = _read_header(data)
    if header is None:
        return None
    frame, scan = header
    height = int.from_bytes(data[frame + 1 : frame + 3], "big")
    width = int.from_bytes(data[frame + 3 : frame + 5], "big")
    if height == 0 or width < _MIN_WIDTH or width * height > max_pixels:
        return None
    end = _MARKER.search(data, scan)
    return PlainJpeg(data, (width, height), frame) if end is not None and end.end() == len(data) else None


def _read_header(data: bytes) -> tuple[int, int] | None:
    """Returns the places of the frame header's content and of the scan's data, or None if the header is not plain."""
    frame = 0
    place = 2
    while place + 4 < min(len(data), _MAX_HEADER) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _SCAN:
            scan = place + _SCAN_BYTES
            is_plain = data.startswith(_SCAN_HEADER, place) and data[scan - 3 : scan] == _ALL_COEFFICIENTS
            return (frame, scan) if frame and is_plain else None
        begin = place + 4
        place = place + 2 + int.from_bytes(data[place + 2 : begin], "big")
        content = data[begin:place]
        if marker == _BASELINE and not frame and len(content) == _FRAME_BYTES and content.startswith(b"\x08"):
            frame = begin
        elif marker not in _TABLES and not (marker in _KNOWN and _begins(content, *_KNOWN[marker])):
            return None
    return None


def _begins(content: bytes, name: bytes, size: int) -> bool:
    return content.startswith(name) and len(content) >= size


@cache
def is_usable() -> bool:
    """Returns whether simplejpeg is installed and decodes a picture of noise to Pillow's pixels at every scale.

    It does wherever both contain libjpeg-turbo; a Pillow that was built with another libjpeg rounds differently.
    """
    if simplejpeg is None:
        return False
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=90)
    size = noise.shape[1::-1]
    data = buffer.getvalue()
    frame = data.index(bytes([0xFF, _BASELINE])) + 4
    for scale in (1, 2, 4, 8):
        image = Image.open(buffer)
        image.draft(None, (size[0] // scale, size[1] // scale))
        rows = image.height // 2
        try:
            pixels = PlainJpeg(data, size, frame).pixels(rows, scale)
        except ValueError:
            return False
        if not np.array_equal(pixels[:rows], np.asarray(image)[:rows]):
            return False
    return True
