"""Small files that ask for much: metadata that grows, scans and directories that repeat, sizes that are claimed."""

import io
import struct
import zlib

from PIL import Image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(extra: bytes = b"", size: tuple[int, int] = (40, 40)) -> bytes:
    """A black picture with further chunks before its pixels."""
    width, height = size
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + width) * height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg(extra: bytes) -> bytes:
    """A sound picture with further segments before its own."""
    data = encoded("JPEG")
    return data[:2] + extra + data[2:]


def jpeg_of_scans(scans: int, side: int) -> bytes:
    """A progressive JPEG whose scans each say of every block that it is empty."""
    left = (-(-side // 8)) ** 2
    bits = ""
    while left:
        count = min(left, 32767)
        bits += format(count.bit_length() - 1, "04b") + format(count, "b")[1:]
        left -= count
    bits += "1" * (-len(bits) % 8)
    data = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    tables = segment(0xDB, b"\0" + bytes([1] * 64)) + segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 17, 0))
    tables += segment(0xC4, bytes([0x10, 0, 0, 0, 15, *[0] * 12, *(16 * k for k in range(15))]))
    return b"\xff\xd8" + tables + (segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + data) * scans + b"\xff\xd9"


def directory(entries: int, length: int) -> bytes:
    """A TIFF block of so many bytes whose entries each hold most of it."""
    head = b"II*\0" + struct.pack("<IH", 8, entries)
    size = length - len(head) - 12 * entries
    return (head + b"".join(struct.pack("<HHII", 1000 + n, 1, size, 8) for n in range(entries))).ljust(length, b"\0")


def tiff(tags: dict[int, list[int]], data: bytes = b"") -> bytes:
    """A grey TIFF of these tags, all of four-byte numbers."""
    tags = {258: [8], 259: [1], 262: [1], 277: [1], **tags}
    entries = values = b""
    place = 14 + 12 * len(tags)
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        entries += struct.pack("<HHI", tag, 4, len(numbers))
        entries += packed if len(packed) == 4 else struct.pack("<I", place + len(values))
        values += b"" if len(packed) == 4 else packed
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values + data


def gif(extensions: bytes, frame: tuple[int, int] = (40, 40)) -> bytes:
    head = b"GIF89a" + struct.pack("<HH", 40, 40) + b"\x80\0\0" + bytes(6)
    return head + extensions + b"," + struct.pack("<HHHH", 0, 0, *frame) + b"\0\x02\x02\x44\x01\0;"


def webp(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sizes + bytes(80)


def icon(picture: bytes) -> bytes:
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(picture), 22) + picture


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
MEBIBYTE = zlib.compress(bytes(2**20))
# What each of them is refused for.
HOSTILE = {
    "JPEG of 500 scans": ("too many scans", lambda: jpeg_of_scans(500, 8000)),
    "JPEG of 20,000 scans": ("too many scans", lambda: jpeg_of_scans(20_000, 800)),
    "JPEG of 4,000,000 segments": ("oversized metadata", lambda: jpeg(segment(0xE1, b"Exif\0\0ab") * 400_000)),
    "JPEG of 18 MB of EXIF": ("oversized metadata", lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 300)),
    "JPEG of 30 MB of Photoshop": ("oversized metadata", lambda: jpeg(segment(0xED, bytes(60_000)) * 500)),
    "JPEG of 5 MB of tables": ("oversized metadata", lambda: jpeg(segment(0xDB, (b"\0" + b"\1" * 64) * 900) * 90)),
    "JPEG with overlapping EXIF": (
        "oversized metadata",
        lambda: jpeg(segment(0xE1, b"Exif\0\0" + directory(2500, 65_000))),
    ),
    "JPEG with overlapping MPF": (
        "oversized metadata",
        lambda: jpeg(segment(0xE2, b"MPF\0" + directory(2500, 65_000))),
    ),
    "JPEG with fill bytes": ("slow to decode", lambda: encoded("JPEG")[:-2] + b"\xff" * 2_000_000 + b"\xd9"),
    "JPEG with junk": ("slow to decode", lambda: jpeg(segment(0xFE, b"x") + b"a" * 1_000_000)),
    "PNG of 9,000,000 rows": ("oversized image", lambda: png(size=(1, 9_000_000))),
    "PNG with 300 profiles": ("oversized metadata", lambda: png(chunk(b"iCCP", b"I\0\0" + MEBIBYTE) * 300)),
    "PNG with 300 broken texts": ("oversized metadata", lambda: png(chunk(b"zTXt", b"I\0\0" + MEBIBYTE[:-3]) * 300)),
    "PNG with 200,000 texts": (
        "slow to decode",
        lambda: png(b"".join(chunk(b"tEXt", b"k\0v") for _ in range(200_000))),
    ),
    "PNG with overlapping EXIF": ("oversized metadata", lambda: png(chunk(b"eXIf", directory(60_000, 4_000_000)))),
    "PNG with EXIF in a text": (
        "oversized metadata",
        lambda: png(
            chunk(
                b"zTXt",
                b"Raw profile type exif\0\0"
                + zlib.compress(b"\nexif\n 1\n" + directory(20_000, 490_000).hex().encode()),
            )
        ),
    ),
    "PNG with repeated EXIF": ("oversized metadata", lambda: png(chunk(b"eXIf", b"Exif\0\0" * 300_000))),
    "GIF with a long comment": ("oversized metadata", lambda: gif(b"!\xfe" + (b"\xff" + b"a" * 255) * 5000 + b"\0")),
    "GIF with empty extensions": ("oversized metadata", lambda: gif(b"!\xfe\0" * 500_000)),
    "GIF with a large frame": ("oversized image", lambda: gif(b"", (12_000, 12_000))),
    "WebP with a large canvas": ("oversized image", lambda: webp(16_383, 16_383)),
    "WebP with overlapping EXIF": ("oversized metadata", lambda: encoded("WEBP", exif=directory(60_000, 4_000_000))),
    "TIFF with overlapping tags": ("oversized metadata", lambda: directory(60_000, 4_000_000)),
    "TIFF with layers": (
        "slow to decode",
        lambda: tiff({256: [8000], 257: [8000], 273: [0] * 2000, 278: [4000], 279: [2**25] * 2000}, bytes(2**20)),
    ),
    "TIFF with strips": (
        "oversized metadata",
        lambda: tiff({256: [40], 257: [300_000], 273: [8] * 300_000, 278: [1], 279: [40]}),
    ),
    "TIFF with a large tile": (
        "oversized image",
        lambda: tiff({256: [40], 257: [40], 259: [8], 322: [40_000], 323: [40_000], 324: [99], 325: [99]}, bytes(99)),
    ),
    "icon of a large PNG": (
        "oversized image",
        lambda: icon(png()[:16] + struct.pack(">II", 13_000, 13_000) + png()[24:]),
    ),
    "icon of a large bitmap": (
        "oversized image",
        lambda: icon(struct.pack("<IiiHHIIiiII", 40, 13_000, 26_000, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(99)),
    ),
    "PPM with comments": ("slow to decode", lambda: b"P2 400 400 255\n" + b"#\n" * 100_000),
    "PPM in 40 MB of text": ("slow to decode", lambda: b"P3 4000 4000 255\n" + b"1 " * 20_000_000),
    "PPM of an odd maximum": ("slow to decode", lambda: b"P6 1000 1000 254\n" + bytes(3_000_000)),
    "EPS": ("not an image", lambda: EPS),
}
