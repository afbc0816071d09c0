"""Tells JPEGs that lack only their end from those that lack a part of the picture.

libjpeg requires the marker that ends a picture (EOI) even if the picture is complete; given the marker, it silently
fills missing parts with grey. So the picture is ended in two ways, with the marker alone and with noise before it: the
pixels that differ are not in the file.
"""

import re

import numpy as np
from PIL import Image

from flip_hf.data.bounds import MAX_SCANNED_PIXELS, BudgetedBytes
from flip_hf.data.refusals import RefusedSample

# Fraction of a picture's pixels that may be missing: a few blocks at the end of its last row.
MAX_MISSING = 0.01

_SCAN = b"\xff\xda"
_END = b"\xff\xd9"
# The segment with the number of blocks between two restarts.
_RESTARTS = b"\xff\xdd\0\4"
_RESTART_BYTES = 1024
# All markers but those within a scan's data: stuffed and fill bytes, and restarts.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def lacks_end(data: bytes) -> bool:
    """Returns whether a JPEG has no end marker after its last scan."""
    return not data.endswith(_END) and data.find(_END, max(0, data.rfind(_SCAN))) < 0


def ended(data: bytes, num_pixels: int) -> bytes:
    """Appends the missing end marker to a JPEG.

    If finding what is missing would take too long, the bytes are returned unchanged, for the decoder to refuse.

    Args:
        data: a JPEG that [`lacks_end`], within all bounds.
        num_pixels: number of pixels according to its header.

    Raises:
        RefusedSample: more than [`MAX_MISSING`] of its pixels are missing.
        Exception: it is damaged in another way; Pillow's decoders raise many types.
    """
    if data.count(_SCAN) * num_pixels > MAX_SCANNED_PIXELS / 4:  # it is decoded twice here, and once more later
        return data
    header = data.rfind(_SCAN) + len(_SCAN)
    # An interrupted download may be padded to its full length, and a marker may have been cut in two.
    known = data.rstrip(b"\0").removesuffix(b"\xff")
    scan = known[header + int.from_bytes(known[header : header + 2], "big") :]
    if not scan or _MARKER.search(scan):  # the file ends where the next scan is announced
        raise RefusedSample("damaged image")
    noise = _noise(num_pixels // 8 + 8 * _RESTART_BYTES, restarts=_RESTARTS in known[:header])
    missing = (_pixels(known + _END) != _pixels(known + noise + _END)).reshape(num_pixels, -1).any(axis=1)
    if missing.mean() > MAX_MISSING:
        raise RefusedSample("damaged image")
    return data + _END


def _noise(size: int, restarts: bool) -> bytes:
    """Returns data that decode to anything but grey, enough for far more than [`MAX_MISSING`] of the pixels."""
    noise = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)  # 255 begins a marker
    if restarts:  # after each restart marker, a new part of the picture begins
        noise[::_RESTART_BYTES] = 0xFF
        places = noise[1::_RESTART_BYTES]
        places[:] = 0xD0 + np.arange(len(places)) % 8
    return noise.tobytes()


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BudgetedBytes(data), formats=("JPEG",)))
