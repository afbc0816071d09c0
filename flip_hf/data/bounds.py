"""Bounds on what a picture may cost, checked on its bytes before they are decoded.

A few bytes can ask for gigabytes or hours: through sizes that a header claims, repeated scans and metadata, or
directories whose entries overlap. These bounds count bytes, pixels, scans and reads, so that one picture is refused
in every run and on every machine. A deadline backs them up for anything they do not foresee.
"""

import io
import re
import struct
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from flip_hf.data.refusals import RefusedSample

# Seconds that decoding one picture may take. It depends on the machine, so it is far more than a sound picture needs.
DECODE_SECONDS = 20.0
# Pillow parses chunks, blocks and runs in Python, at two to five microseconds a read. A PNG takes three reads for a
# chunk, and most chunks have 8 kB or more: no sound picture comes near this.
MAX_READS = 120_000
# A decoder reads a file twice and a header more often, but overlapping entries thousands of times.
MAX_REREADS = 8
# Scans of a JPEG; encoders write about ten. A scan that refines 64 megapixels takes some 35 ms whatever its content.
MAX_SCANS = 500
MAX_SCANNED_PIXELS = 1_000_000_000
# Segments of a JPEG before its first scan, and their bytes. An ICC profile and XMP take a few hundred at most.
MAX_SEGMENTS = {"segments": 4096, "all": 24 * 2**20, "joined": 2**20, "photoshop": 4 * 2**20}
MAX_EXTENSION_BYTES = 2**20  # in a GIF before its first frame
# Each compressed text or profile of a PNG may expand to a mebibyte.
MAX_COMPRESSED_TEXTS = 256
# Numbers in one entry of a TIFF directory: rows or tiles of a picture, a colour map.
MAX_NUMBERS = 2**18
MAX_ENTRIES = 2**16
# Pillow parses these formats as text, number by number.
MAX_PLAIN_BYTES = 8 * 2**20

_TIFF = re.compile(rb"II\*\0|MM\0\*|MM\*\0|II\0\*|MM\0\+|II\+\0")
_TIFF_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_BYTES_OR_TEXT = (1, 2, 7)
_COMPRESSION = 259
_TILE_WIDTH = 322
_TILE_HEIGHT = 323
_ROWS_PER_STRIP = 278
_OFFSETS = (273, 324)
_BYTE_COUNTS = (279, 325)
_PER_STRIP = (*_OFFSETS, *_BYTE_COUNTS)
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_FILL = b"\xff" * 65536
# All markers but those without content: stuffed and fill bytes, restarts, the start of the image.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")


class BudgetedBytes(io.BytesIO):
    """An encoded picture whose reading is limited in reads, in bytes read again, and in time.

    Args:
        data: the encoded picture.
        seconds: time limit, from the first byte on.

    [`BudgetedBytes.read`] raises [`RefusedSample`] when a limit is exceeded, which stops the decoder.
    """

    def __init__(self, data: bytes, seconds: float = DECODE_SECONDS):
        super().__init__(data)
        self._seconds = seconds
        self._reads = MAX_READS
        self._bytes = MAX_REREADS * len(data) + 2**20
        self.restart()

    def restart(self) -> None:
        """Restarts the clock: a picture may be decoded long after it was opened."""
        self._deadline = time.monotonic() + self._seconds

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads like any file; see the class for what it raises."""
        data = super().read(size)
        self._reads -= 1
        self._bytes -= len(data)
        if self._reads < 0 or self._bytes < 0 or time.monotonic() > self._deadline:
            raise RefusedSample("slow to decode")
        return data


def check_encoded(data: bytes, max_pixels: int) -> None:
    """Refuses a picture whose bytes show that it would cost too much memory or time.

    Args:
        data: the encoded picture.
        max_pixels: the most pixels it may have, and the most in each part that is decoded as a whole.

    Raises:
        RefusedSample: it costs too much. Damage is left for the decoder to find.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            _check_jpeg(data)
        elif data.startswith(b"\x89PNG"):
            _check_png(data)
        elif data.startswith(b"GIF8"):
            _check_gif(data)
        elif data.startswith(b"RIFF"):
            _check_webp(data, max_pixels)
        elif _TIFF.match(data):
            _check_tiff(data, max_pixels)
        elif data.startswith(b"\0\0\1\0"):
            _check_icon(data, max_pixels)
        elif data[4:8] == b"ftyp":
            _check_directories(data)
        elif data[:2] in (b"P1", b"P2", b"P3") and (len(data) > MAX_PLAIN_BYTES or data.count(b"#") > 64):
            raise RefusedSample("slow to decode")
    except (struct.error, IndexError):
        return  # truncated


def check_tiles(tiles: list[Any], max_pixels: int) -> None:
    """Refuses an opened picture whose decoder would fill the same pixels over and over.

    Args:
        tiles: `tile` of an image opened by Pillow, each (codec, (left, top, right, bottom), offset, arguments).
        max_pixels: the most pixels a picture may have; four planes may be decoded one by one.

    Raises:
        RefusedSample: the tiles cover too many pixels.
    """
    boxes = [tile[1] for tile in tiles if tile[1] is not None]
    if sum((right - left) * (bottom - top) for left, top, right, bottom in boxes) > 4 * max_pixels + 2**24:
        raise RefusedSample("slow to decode")


def check_exif(info: dict[Any, Any]) -> None:
    """Refuses an opened picture whose EXIF block would grow when it is read.

    Args:
        info: Pillow's `Image.info`.

    Raises:
        RefusedSample: the entries of the block overlap.
    """
    block = info.get("exif")
    if block is None and isinstance(info.get("Raw profile type exif"), str):
        try:
            block = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
        except ValueError:
            return
    if isinstance(block, bytes):
        _check_exif_block(block)


# ---------------------------------------------------------------------------------------------------------------------
# JPEG
# ---------------------------------------------------------------------------------------------------------------------


def _check_jpeg(data: bytes) -> None:
    size = (0, 0)
    spent = {"segments": 0, "all": 0, "joined": 0, "photoshop": 0}
    exif = b""
    for marker, begin, end in _segments(data):
        spent["segments"] += 1
        spent["all"] += end - begin
        is_exif = marker == 0xE1 and data.startswith(b"Exif\0\0", begin)
        if marker == 0xDB or is_exif:  # Pillow copies the rest for each table, and joins each block to those before
            spent["joined"] += end - begin
        elif marker == 0xED:
            spent["photoshop"] += end - begin
        elif marker == 0xE2 and data.startswith(b"MPF\0", begin):
            _check_directory(data[begin + 4 : end])  # an MPO file's directory of further pictures
        elif marker in _FRAMES:
            size = struct.unpack_from(">HH", data, begin + 1)
        if any(spent[name] > limit for name, limit in MAX_SEGMENTS.items()):
            raise RefusedSample("oversized metadata")
        if is_exif:
            exif += data[begin + (6 if exif else 0) : end]
    _check_exif_block(exif)
    if _FILL[:64] in data and _FILL in data:  # the decoder would search for their end again and again
        raise RefusedSample("slow to decode")
    if _too_many_scans(_count_pairs(data, b"\xff\xda"), size) and _too_many_scans(_count_scans(data), size):
        raise RefusedSample("too many scans")


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, begin, end) of the content of each segment before the first scan."""
    place = 2
    while (found := _MARKER.search(data, place)) is not None:
        marker = found[1][0]
        place = found.end()
        if marker in (0xDA, 0xD9):
            return
        end = place + struct.unpack_from(">H", data, place)[0]
        yield marker, place + 2, min(max(end, place + 2), len(data))
        place = max(end, place + 2)


def _count_pairs(data: bytes, pair: bytes) -> int:
    """Counts two bytes that differ, one after the other, in a fifth of the time of `data.count`."""
    wanted = np.frombuffer(pair, np.uint16)
    halves = (np.frombuffer(data, np.uint16, (len(data) - begin) // 2, begin) for begin in (0, 1))
    return sum(int(np.count_nonzero(numbers == wanted)) for numbers in halves)


def _too_many_scans(scans: int, size: tuple[int, int]) -> bool:
    return scans > MAX_SCANS or scans * size[0] * size[1] > MAX_SCANNED_PIXELS


def _count_scans(data: bytes) -> int:
    """Counts the scans up to the picture's end, without those of a thumbnail or what looks like one in metadata."""
    place = 2
    scans = segments = 0
    while (found := _MARKER.search(data, place)) is not None:
        marker = found[1][0]
        place = found.end()
        if marker == 0xD9 or place + 2 > len(data):
            break
        scans += marker == 0xDA
        segments += 1
        if scans > MAX_SCANS or segments > MAX_SEGMENTS["segments"]:
            return MAX_SCANS + 1
        place += max(2, struct.unpack_from(">H", data, place)[0])
    return scans


# ---------------------------------------------------------------------------------------------------------------------
# PNG, GIF, WebP, icons
# ---------------------------------------------------------------------------------------------------------------------


def _check_png(data: bytes) -> None:
    if data.count(b"iCCP") + data.count(b"zTXt") + data.count(b"iTXt") > MAX_COMPRESSED_TEXTS:
        raise RefusedSample("oversized metadata")


def _check_gif(data: bytes) -> None:
    """Bounds the extensions before the first frame: Pillow joins the blocks of a comment one by one."""
    begin = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    place = begin
    while data[place] == 0x21:
        place += 2
        while data[place] and place - begin <= MAX_EXTENSION_BYTES:
            place += 1 + data[place]
        place += 1
        if place - begin > MAX_EXTENSION_BYTES:
            raise RefusedSample("oversized metadata")


def _check_webp(data: bytes, max_pixels: int) -> None:
    """Bounds the canvas, which the decoder allocates when the file is opened."""
    kind = data[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width = 1 + (bits & 0x3FFF)
        height = 1 + (bits >> 14 & 0x3FFF)
    else:
        width = int.from_bytes(data[26:28], "little") & 0x3FFF
        height = int.from_bytes(data[28:30], "little") & 0x3FFF
    if width * height > max_pixels:
        raise RefusedSample("oversized image")


def _check_icon(data: bytes, max_pixels: int) -> None:
    """Bounds the pictures in an icon, whose sizes need not be those in its header."""
    _check_png(data)
    for number in range(struct.unpack_from("<H", data, 4)[0]):
        offset = struct.unpack_from("<I", data, 6 + 16 * number + 12)[0]
        is_png = data[offset : offset + 4] == b"\x89PNG"
        width, height = struct.unpack_from(*((">II", data, offset + 16) if is_png else ("<ii", data, offset + 4)))
        if abs(width * height) > (max_pixels if is_png else 2 * max_pixels):  # the height of a bitmap includes its mask
            raise RefusedSample("oversized image")


# ---------------------------------------------------------------------------------------------------------------------
# TIFF, and its directories in EXIF
# ---------------------------------------------------------------------------------------------------------------------


def _check_tiff(data: bytes, max_pixels: int) -> None:
    order, entries = _check_directory(data)
    codes = {"little": "<", "big": ">"}

    def numbers(tag: int) -> list[int]:
        kind, count, place = entries.get(tag, (0, 0, 0))
        code = {1: "B", 3: "H", 4: "L", 16: "Q"}.get(kind)
        return [] if code is None else list(struct.unpack_from(f"{codes[order]}{count}{code}", data, place))

    def number(tag: int) -> int:
        return next(iter(numbers(tag)), 0)

    tile = number(_TILE_WIDTH) * number(_TILE_HEIGHT)
    if tile > max_pixels:
        raise RefusedSample("oversized image")
    for tag in _BYTE_COUNTS:  # every strip may name the same place in the file as its data
        if sum(min(count, len(data)) for count in numbers(tag)) > MAX_REREADS * len(data) + 2**20:
            raise RefusedSample("slow to decode")
    if number(_COMPRESSION) in (6, 7):  # each strip or tile is a JPEG
        width = number(256)
        strip = tile or width * min(number(_ROWS_PER_STRIP) or 2**32, number(257))
        if data.count(b"\xff\xda") * strip > MAX_SCANNED_PIXELS:
            raise RefusedSample("too many scans")


def _check_directories(data: bytes) -> None:
    """Checks all TIFF directories in the boxes of an AVIF file, whose EXIF block is read when it is opened."""
    for count, found in enumerate(_TIFF.finditer(data)):
        if count == MAX_COMPRESSED_TEXTS:
            raise RefusedSample("oversized metadata")
        _check_directory(data, found.start())


def _check_exif_block(block: bytes) -> None:
    if block.startswith(b"Exif\0\0Exif\0\0"):  # Pillow would remove each by copying the rest
        raise RefusedSample("oversized metadata")
    _check_directory(block, 6 if block.startswith(b"Exif\0\0") else 0)


def _check_directory(data: bytes, start: int = 0) -> tuple[Any, dict[int, tuple[int, int, int]]]:
    """Returns byte order and entries {tag: (type, count, place of the values)} of a TIFF block's first directory.

    Args:
        data: the bytes that contain the block.
        start: offset of the block; places are relative to it.

    Raises:
        RefusedSample: the values would be much larger than the block, which means that they overlap.
    """
    order: Any = "little" if data[start : start + 2] == b"II" else "big"
    length = len(data) - start

    def number(place: int, size: int) -> int:
        return int.from_bytes(data[start + place : start + place + size], order)

    is_big = data[start + 2 : start + 3] == b"+"
    word = 8 if is_big else 4
    entries: dict[int, tuple[int, int, int]] = {}
    if not _TIFF.match(data, start):
        return order, entries
    place = number(8 if is_big else 4, word)
    count = number(place, 8 if is_big else 2)
    place += 8 if is_big else 2
    if count > MAX_ENTRIES and place + MAX_ENTRIES * (4 + 2 * word) <= length:
        raise RefusedSample("oversized metadata")
    total = 0
    for _ in range(min(count, MAX_ENTRIES)):
        if place + 4 + 2 * word > length:
            break
        tag = number(place, 2)
        kind = number(place + 2, 2)
        values = number(place + 4, word)
        size = values * _TIFF_TYPE_SIZES.get(kind, 0)
        begin = place + 4 + word if size <= word else number(place + 4 + word, word)
        if begin + size > length:  # where Pillow stops too
            break
        total += size + 64
        many = values > MAX_NUMBERS and (kind not in _BYTES_OR_TEXT or tag in _PER_STRIP)
        if many or total > MAX_REREADS * length + 2**16:
            raise RefusedSample("oversized metadata")
        entries[tag] = (kind, values, begin)
        place += 4 + 2 * word
    return order, entries
