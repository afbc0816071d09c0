"""JPEGs whose last bytes are missing: what every viewer shows, and what is a part of a picture.

libjpeg asks for the marker that ends a picture (EOI), even where all of the picture is there; given the marker, it
fills what is missing with grey, and says so to nobody. So the picture is ended in two ways, with the marker and with
other data before it: what these change, the file does not hold.
"""

import re

import numpy as np
from PIL import Image

from flip_hf.data.bounds import MAX_SCANNED_PIXELS, BudgetedBytes
from flip_hf.data.refusals import RefusedSample

# Of the pixels of a picture so many may be missing: a few blocks at the end of its last row.
MAX_MISSING = 0.01

_SCAN = b"\xff\xda"
_END = b"\xff\xd9"
# The segment that says how many blocks are between two restarts.
_RESTARTS = b"\xff\xdd\0\4"
_RESTART_BYTES = 1024
# All but those of a scan's data: stuffed and fill bytes, and restarts.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def lacks_end(data: bytes) -> bool:
    """Tells whether a JPEG has no end marker behind its last scan."""
    return not data.endswith(_END) and data.find(_END, max(0, data.rfind(_SCAN))) < 0


def ended(data: bytes, num_pixels: int) -> bytes:
    """The JPEG with the end marker that it lacks.

    Where telling what is missing would take long, the bytes are returned as they are, for the decoder to refuse.

    Args:
        data: a JPEG that [`lacks_end`], within all bounds.
        num_pixels: as many as its header says.

    Raises:
        RefusedSample: more than [`MAX_MISSING`] of its pixels is missing.
        Exception: it is damaged in another way; Pillow's decoders raise many kinds.
    """
    if data.count(_SCAN) * num_pixels > MAX_SCANNED_PIXELS / 4:  # it is decoded twice here, and then once more
        return data
    header = data.rfind(_SCAN) + len(_SCAN)
    # A download that broke off may be filled up to its length, and a marker may have been cut in two.
    known = data.rstrip(b"\0").removesuffix(b"\xff")
    scan = known[header + int.from_bytes(known[header : header + 2], "big") :]
    if not scan or _MARKER.search(scan):  # it ends where the next scan is announced
        raise RefusedSample("damaged image")
    noise = _noise(num_pixels // 8 + 8 * _RESTART_BYTES, restarts=_RESTARTS in known[:header])
    missing = (_pixels(known + _END) != _pixels(known + noise + _END)).reshape(num_pixels, -1).any(axis=1)
    if missing.mean() > MAX_MISSING:
        raise RefusedSample("damaged image")
    return data + _END


def _noise(size: int, restarts: bool) -> bytes:
    """Data that decode to anything but grey, enough for far more than [`MAX_MISSING`] of a picture's pixels."""
    noise = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)  # 255 begins a marker
    if restarts:  # behind each, a part of the picture begins anew
        noise[::_RESTART_BYTES] = 0xFF
        places = noise[1::_RESTART_BYTES]
        places[:] = 0xD0 + np.arange(len(places)) % 8
    return noise.tobytes()


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BudgetedBytes(data), formats=("JPEG",)))
