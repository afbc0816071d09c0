"""What can be read in a file of binary data: the texts of a picture and of TensorBoard's events."""

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
# Chunks that hold pixels, their form and their colours. All others, and what comes behind the last, may hold a text.
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"bKGD", b"sBIT", b"tIME")
_MAX_TEXT = 2**24  # of a compressed text, in bytes
_MAX_DEPTH = 12  # of messages in messages


def texts(data: bytes) -> str:
    """All that can be read as text in a file's bytes, a line each.

    Of a PNG file, these are its comments; of a file of TensorBoard's events, the fields of its messages, without the
    bytes of their lengths before them; of others, everything, every byte taken for a character.
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
    """Chunks of a picture that hold no pixels, compressed ones unpacked too."""
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
    """What is compressed in a text chunk: behind its keyword, and in iTXt behind language and translation, too."""
    if kind not in (b"zTXt", b"iTXt", b"iCCP"):
        return
    starts = [at for at, byte in enumerate(chunk[:512]) if byte == 0x78]  # where zlib's data may begin
    for start in starts[:16]:
        try:
            yield zlib.decompressobj().decompress(chunk[start:], _MAX_TEXT)
        except zlib.error:
            continue


def _records(data: bytes) -> list[bytes]:
    """The records of a file in TensorFlow's format, the rest of a last one that was cut off among them; none of others.

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
    """The fields of a message of protocol buffers that may be texts, and theirs; the whole if it is none."""
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
    """The fields of a message that have a length of their own; None if the bytes are no message."""
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
    """A number of variable length, and where it ends: beyond the message if it has no end in it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
    return value, len(message) + 1
