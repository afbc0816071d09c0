"""WebDataset shards with damage of twelve kinds, and what a reader should say of it."""

import io
import os
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

Members = list[tuple[str, bytes]]  # extension, content


def _image(number: int, side: int, kind: str) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def good(number: int, side: int = 24) -> Members:
    """A sound sample; its caption begins with its number. One in seven has an EXIF block that is broken."""
    image = _image(number, side, "JPEG")
    if number % 7 == 0:
        exif = b"Exif\x00\x00II*\x00" + struct.pack("<I", 999_999) + b"\xff" * 20
        image = image[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + image[2:]
    return [("jpg", image), ("txt", f"{number:05d} noise".encode())]


def _huge_png(number: int) -> bytes:
    """A picture that claims 60,000 x 60,000 pixels."""
    data = bytearray(_image(number, 8, "PNG"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def _broken_png(number: int) -> bytes:
    data = bytearray(_image(number, 24, "PNG"))
    data[60:90] = bytes(30)
    return bytes(data)


def damaged(kind: int, number: int) -> tuple[Members, str]:
    """A sample damaged in the kind-th way, and the reason under which it should be reported."""
    (_, image), (_, text) = good(number)
    return [
        lambda: ([("jpg", image[: len(image) // 2]), ("txt", text)], "damaged image"),
        lambda: ([("jpg", b"<html>404 Not Found</html>"), ("txt", text)], "not an image"),
        lambda: ([("jpg", b""), ("txt", text)], "empty image"),
        lambda: ([("txt", text)], "missing image"),
        lambda: ([("png", _huge_png(number)), ("txt", text)], "oversized image"),
        lambda: ([("png", _broken_png(number)), ("txt", text)], "damaged image"),
        lambda: ([("jpg", SPARSE), ("txt", text)], "sparse tar member"),
        lambda: ([("jpg", image)], "missing caption"),
        lambda: ([("jpg", image), ("txt", b"")], "empty caption"),
        lambda: ([("jpg", image), ("txt", b" \n")], "empty caption"),
        lambda: ([("jpg", image), ("txt", text + b"\xff\xfe")], "caption is not UTF-8"),
        lambda: ([("jpg", BROKEN_HEADER + image), ("txt", text)], "missing image"),
    ][kind]()


KINDS = 12
# Stand-ins that `add_sample` turns into members that the tarfile module would not write.
SPARSE = b"<a sparse member of 1 GiB>"
BROKEN_HEADER = b"<a header with a flipped bit>"


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, fields: dict[int, bytes] | None = None) -> bytes:
    """A member's header of any size, below zero too, with other bytes in some places."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for place, data in {124: tarfile.itn(size, 12, tarfile.GNU_FORMAT), **(fields or {})}.items():
        block[place : place + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sparse_header(name: str, size: int, further: bool = False) -> bytes:
    """A GNU sparse member that claims `size` bytes and stores none; a block that continues it may follow."""
    fields = {482: bytes([further]), 483: tarfile.itn(size, 12, tarfile.GNU_FORMAT)}
    return header(name, 0, tarfile.GNUTYPE_SPARSE, fields)


def preceding(kind: bytes, data: bytes) -> bytes:
    """A header of further facts about the next member: a long name, or records of the pax format."""
    return header("././@LongLink", len(data), kind) + data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    data = b""
    for name, value in records.items():
        rest = f" {name}={value}\n".encode()
        data += str(len(rest) + len(str(len(rest) + 1))).encode() + rest
    return preceding(tarfile.XHDTYPE, data)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def add_sample(archive: io.BytesIO, key: str, members: Members) -> None:
    """Writes a sample's members, headers and padding included."""
    for extension, data in members:
        info = tarfile.TarInfo(f"{key}.{extension}")
        if data == SPARSE:
            archive.write(sparse_header(info.name, 2**30))
            continue
        broken = data.startswith(BROKEN_HEADER)
        data = data.removeprefix(BROKEN_HEADER)
        info.size = len(data)
        header = bytearray(info.tobuf())
        if broken:
            header[0] ^= 1
        archive.write(bytes(header) + data + bytes(-len(data) % 512))


def shard(samples: list[tuple[str, Members]], cut: bool = False) -> bytes:
    """A whole archive, or one that is cut off in the image of one more sample."""
    archive = io.BytesIO()
    for key, members in samples:
        add_sample(archive, key, members)
    if cut:
        add_sample(archive, "99999", good(99_999))
        return archive.getvalue()[:-1400]
    return archive.getvalue() + bytes(10_240)


def write_damaged_shards(folder: Path, shards: int, per_shard: int, bad_per_shard: int) -> tuple[list[int], Counter]:
    """Writes shards with as many bad samples in each, each cut off at its end.

    Returns:
        The good samples' numbers, and how often each reason should be in the report.
    """
    kinds: Iterator[int] = iter(k % KINDS for k in range(shards * bad_per_shard))
    numbers: list[int] = []
    reasons: Counter[str] = Counter()
    for part in range(shards):
        rng = np.random.default_rng(part)
        bad = set(rng.choice(per_shard, bad_per_shard, replace=False).tolist())
        samples = []
        for row in range(per_shard):
            number = part * per_shard + row
            if row not in bad:
                numbers.append(number)
                samples.append((f"{number:05d}", good(number)))
                continue
            kind = next(kinds)
            members, reason = damaged(kind, number)
            reasons[reason] += 1
            reasons["damaged tar header"] += kind == KINDS - 1
            samples.append((f"{number:05d}", members))
        (folder / f"{part:04d}.tar").write_bytes(shard(samples, cut=True))
        reasons["truncated shard"] += 1
    return numbers, reasons


# FLIP_HF_LONG_TESTS=1: the size that is promised.
SHARDS, PER_SHARD, BAD_PER_SHARD = (10, 2000, 100) if os.environ.get("FLIP_HF_LONG_TESTS") else (10, 200, 10)
