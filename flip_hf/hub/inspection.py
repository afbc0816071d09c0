"""Extracts readable text from binary files: the texts in a picture and in TensorBoard's events."""

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
# Chunks with pixels, their format and colours. All others, and anything after the last one, may hold text.
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"bKGD", b"sBIT", b"tIME")
_MAX_TEXT = 2**24  # bytes of a compressed text
_MAX_DEPTH = 12  # of nested messages


def texts(data: bytes) -> str:
    """Returns everything that can be read as text in a file's bytes, one item per line.

    For a PNG file these are its comments; for a file of TensorBoard's events, the fields of its messages, without the
    bytes of their lengths; for other files, every byte taken as a character.
    """
    return "\n".join(dict.fromkeys(_as_text(part) for part in _parts(data)))


def _as_text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _parts(data: bytes, depth: int = 0) -> Iterator[bytes]:
    if data.startswith(_PNG):
        yield from _png_parts(data)
        return
    records = _records(data)
    if not records:
        yield data
        return
    for record in records:
        yield from _fields(record, depth)


def _png_parts(data: bytes) -> Iterator[bytes]:
    """Yields the chunks of a picture without pixels, and unpacks compressed ones."""
    at = len(_PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            break
        if kind not in _PIXELS:
            chunk = data[at + 8 : end - 4]
            yield chunk
            yield from _unpacked(kind, chunk)
        at = end
        if kind == b"IEND":
            break
    yield data[at:]


def _unpacked(kind: bytes, chunk: bytes) -> Iterator[bytes]:
    """Yields the compressed part of a text chunk: after its keyword and, in iTXt, after language and translation."""
    if kind not in (b"zTXt", b"iTXt", b"iCCP"):
        return
    starts = [at for at, byte in enumerate(chunk[:512]) if byte == 0x78]  # where zlib's data may begin
    for start in starts[:16]:
        try:
            yield zlib.decompressobj().decompress(chunk[start:], _MAX_TEXT)
        except zlib.error:
            continue


def _records(data: bytes) -> list[bytes]:
    """Returns the records of a file in TensorFlow's format, including a truncated last one; none for other files.

    A record is its length (8 bytes), a checksum (4), the data, and another checksum (4).
    """
    found: list[bytes] = []
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            break
        found.append(data[at + 12 : at + 12 + length])
        at += 16 + length
    return [*found, data[at:]] if found else []


def _fields(message: bytes, depth: int = 0) -> Iterator[bytes]:
    """Yields the fields of a protocol buffers message that may be texts, recursively; other bytes as a whole."""
    found = _split(message) if depth < _MAX_DEPTH else None
    if found is None:
        yield message
        return
    for field in found:
        yield field
        if field.startswith(_PNG):
            yield from _png_parts(field)
        elif len(field) > 2:
            yield from _fields(field, depth + 1)


def _split(message: bytes) -> list[bytes] | None:
    """Returns the length-delimited fields of a message, or None if the bytes are not a message."""
    found: list[bytes] = []
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _number(message, at)
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        elif kind == 2:
            length, at = _number(message, at)
            found.append(message[at : at + length])
            at += length
        else:
            return None
        if at > len(message) or tag < 8:
            return None
    return found


def _number(message: bytes, at: int) -> tuple[int, int]:
    """Returns a number of variable length and its end, which is beyond the message if the number is truncated."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
    return value, len(message) + 1
