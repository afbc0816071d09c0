"""Headers that are parsed here are read as `tarfile` reads them."""

import io
import random
import tarfile

import pytest

from flip_hf.data.archive import usual_header

BLOCK = 512


def header(name: str = "a/0001.jpg", style: int = tarfile.USTAR_FORMAT, **fields) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = 80_987
    member.mtime = 1_700_000_000
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(style)[-BLOCK:]


def described(member: tarfile.TarInfo) -> tuple:
    return member.name, member.size, member.type, member.isreg()


def checksummed(block: bytes) -> bytes:
    """The block with the checksum that belongs to it."""
    spaced = block[:148] + b" " * 8 + block[156:]
    return block[:148] + f"{sum(spaced):06o}\0 ".encode() + block[156:]


# As BSD's tar writes them, by default without a time or an owner.
BSD = checksummed(
    b"a.txt".ljust(100, b"\0")
    + b"000644 \0" * 3
    + b"00000000012 00000000000 "
    + b" " * 8
    + b"0".ljust(101, b"\0")
    + b"ustar\x0000".ljust(72, b"\0")
    + b"000000 \0" * 2
    + bytes(167)
)


@pytest.mark.parametrize(
    "block",
    [
        *(header(style=style) for style in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
        header("ü" * 50, tarfile.GNU_FORMAT),
        header("x" * 100),
        header(uid=1000, gid=1000, uname="someone", gname="some"),
        BSD,
    ],
)
def test_usual_headers_are_those_of_tarfile(block):
    parsed = usual_header(block)
    assert parsed is not None and described(parsed) == described(tarfile.TarInfo.frombuf(block, "utf-8", "replace"))


@pytest.mark.parametrize(
    "block",
    [
        header("d", type=tarfile.DIRTYPE),
        header("l", type=tarfile.SYMTYPE, linkname="a"),
        header("f" * 60 + "/" + "x" * 60),  # a prefix
        header(size=2**40, style=tarfile.GNU_FORMAT),  # more digits than there is room for
        bytes(BLOCK),
        header()[:100],
    ],
)
def test_others_are_left_to_tarfile(block):
    assert usual_header(block) is None


def test_no_changed_byte_is_read_otherwise():
    """Also where the checksum is right again: what is parsed here, `tarfile` parses too, to the same."""
    rng = random.Random(0)
    parsed = 0
    for _ in range(20_000):
        block = bytearray(rng.choice((header(), header(style=tarfile.GNU_FORMAT), BSD)))
        for _ in range(rng.choice((1, 1, 2))):
            block[rng.randrange(BLOCK)] = rng.choice((rng.randrange(256), *b"\0 07"))
        block = bytes(block) if rng.random() < 0.2 else checksummed(bytes(block))
        ours = usual_header(block)
        if ours is not None:
            assert described(ours) == described(tarfile.TarInfo.frombuf(block, "utf-8", "replace")), block
            parsed += 1
    assert parsed > 5_000


def test_archives_of_python_are_usual():
    """All members that a WebDataset writer makes are parsed here."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("0.jpg", "0.txt"):
            archive.addfile(tarfile.TarInfo(name))
    data = buffer.getvalue()
    assert all(usual_header(data[begin : begin + BLOCK]) for begin in (0, BLOCK))
