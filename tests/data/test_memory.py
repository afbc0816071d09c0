"""Memory follows bytes, not rows: blocks of the shuffle, samples of an archive, members that claim zeros."""

import io
import itertools
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from flip_hf.data import archive as archives
from flip_hf.data import tar
from flip_hf.data.positions import SourcePosition
from flip_hf.data.reading import Reader
from flip_hf.data.refusals import Refusals, RefusedSample
from flip_hf.data.samples import SourceReader
from flip_hf.data.sources import Source, open_source
from flip_hf.data.tar import TarShards
from tests.helpers import damaged

# -- blocks -----------------------------------------------------------------------------------------------------------


def numbered_tar(path: Path, count: int, size: int) -> Path:
    """Pairs of a number and so many bytes."""
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            for extension, data in (("jpg", bytes(size)), ("txt", str(number).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def reader_of(source: Source, position: list | None = None, **options) -> SourceReader:
    """A reader whose transform takes any bytes for a picture."""
    place = SourcePosition([]) if position is None else SourcePosition.from_json(position)
    reader = SourceReader(
        source,
        lambda value, rng, size: torch.tensor(rng.integers(2**31)),
        Reader(0, 1),
        place,
        seed=3,
        refusals=Refusals(),
        **options,
    )
    reader.image_size = 8
    return reader


def drawn(reader: SourceReader, count: int) -> list[tuple[int, str]]:
    return [(int(image), caption) for image, caption, _ in itertools.islice(reader.samples(), count)]


@pytest.fixture
def source(tmp_path) -> Source:
    return open_source(str(numbered_tar(tmp_path / "a.tar", 40, 1000)))


def test_a_block_ends_with_its_bytes(source):
    """Ten rows of a kilobyte: each ten numbers are those of ten neighbours, where a block of rows mixes all."""
    options = {"shuffle_block": 40, "block_bytes": 10_000}
    numbers = [int(caption) for _, caption in drawn(reader_of(source, **options), 40)]
    assert [sorted(numbers[i : i + 10]) for i in range(0, 40, 10)] == [list(range(i, i + 10)) for i in range(0, 40, 10)]
    mixed = [int(caption) for _, caption in drawn(reader_of(source, shuffle_block=40), 40)]
    assert sorted(mixed[:10]) != list(range(10))
    # Blocks that are smaller than the bound are what they were without it.
    assert drawn(reader_of(source, shuffle_block=7, block_bytes=10_000), 80) == drawn(
        reader_of(source, shuffle_block=7, block_bytes=2**40), 80
    )


@pytest.mark.parametrize("row_bytes", [1000, 25_000], ids=["many rows a block", "rows above the bound"])
def test_a_run_resumes_within_a_block_that_ended_with_its_bytes(row_bytes, tmp_path):
    source = open_source(str(numbered_tar(tmp_path / "a.tar", 23, row_bytes)))
    options = {"shuffle_block": 16, "block_bytes": 6500}
    whole = drawn(reader_of(source, **options), 60)
    for stopped in range(60):
        reader = reader_of(source, **options)
        if stopped:
            drawn(reader, stopped)
        assert drawn(reader_of(source, reader.position.to_json(), **options), 60 - stopped) == whole[stopped:]


def test_one_block_is_held_at_a_time(tmp_path):
    """64 MB in an archive, blocks of 4 MB: the peak is that of a block and little more."""
    source = open_source(str(numbered_tar(tmp_path / "a.tar", 64, 10**6)))
    samples = reader_of(source, shuffle_block=4096, block_bytes=4 * 10**6).samples()
    next(samples)
    tracemalloc.start()
    for _ in range(60):
        next(samples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 10**6


# -- archives ---------------------------------------------------------------------------------------------------------


def member(name: str, data: bytes, **attributes: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.pax_headers = attributes
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def changed(header: bytes, at: int, value: bytes) -> bytes:
    """A header with some bytes replaced, and its sum made right."""
    block = bytearray(header)
    block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def sparse(name: str, size: int) -> bytes:
    """An old GNU sparse member of nothing but zeros, none of which is stored."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    return changed(info.tobuf(tarfile.GNU_FORMAT), 483, tarfile.itn(size, 12, tarfile.GNU_FORMAT))


def negative(name: str, size: int) -> bytes:
    return changed(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT), 124, tarfile.itn(size, 12, tarfile.GNU_FORMAT))


def pair(number: int) -> bytes:
    return b"".join(member(f"{number:05d}.{extension}", data) for extension, data in damaged.good(number))


def read(content: bytes, path: Path, **options) -> tuple[list[dict], list[str]]:
    """All rows of an archive, and what was damaged."""
    path.write_bytes(content)
    problems: list[str] = []
    rows = [row for _, row in TarShards([str(path)], **options).read(0, 0, None, problems.append)]
    return rows, problems


def keys(rows: list[dict]) -> list[str]:
    return [row["__key__"] for row in rows]


END = bytes(10240)
PAX_SPARSE = {
    **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    **{"GNU.sparse.name": "00009.jpg", "GNU.sparse.realsize": "62914560"},
}


@pytest.mark.parametrize(
    "header",
    [
        sparse("00009.jpg", 60 * 2**20),
        member("00009.jpg", b"0\n" + bytes(510), **PAX_SPARSE),
    ],
    ids=["old GNU", "pax"],
)
def test_zeros_that_are_in_no_file_are_not_made(header, tmp_path):
    """300 such members were 5 GB in an archive of 471 kB."""
    tracemalloc.start()
    rows, problems = read(pair(1) + header + member("00009.txt", b"t") + pair(2) + END, tmp_path / "a.tar")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert keys(rows) == ["00001", "00009", "00002"] and not problems and peak < 10 * 2**20
    assert isinstance(rows[1]["jpg"], RefusedSample) and rows[1]["jpg"].reason == "sparse tar member"
    assert isinstance(rows[2]["jpg"], bytes)


def test_a_sample_of_any_members_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_MEMBERS", 64)
    large = b"".join(member(f"00009.x{n}", bytes(1000)) for n in range(100))
    rows, problems = read(pair(1) + large + pair(2) + END, tmp_path / "a.tar", max_member_bytes=8000)
    assert keys(rows) == ["00001", "00009", "00002"] and problems == ["oversized sample"]
    held = [value for value in rows[1].values() if isinstance(value, bytes)]
    assert len(held) == 16 and len(rows[1]) == tar.MAX_MEMBERS + 2
    assert {value.reason for value in rows[1].values() if isinstance(value, RefusedSample)} == {"oversized sample"}
    assert all(isinstance(value, (bytes, str)) for value in rows[2].values())


@pytest.mark.parametrize(
    "spoilt",
    [
        negative("x.jpg", -512),
        negative("x.jpg", -(2**40)),
        member("x.jpg", b"", size="-1024"),
        b"".join(member("x.jpg", b"x", comment="a")[:1024] for _ in range(2000)),
    ],
    ids=["points at itself", "points far back", "negative by attribute", "a chain of headers"],
)
def test_a_hostile_header_costs_itself(spoilt, tmp_path):
    """Some made a reader run in circles, take minutes, or lose the rest of the shard."""
    rows, problems = read(pair(1) + spoilt + pair(2) + pair(3) + END, tmp_path / "a.tar")
    assert {"00001", "00002", "00003"} <= set(keys(rows)) and "damaged tar header" in problems


def test_a_long_attribute_takes_no_time(tmp_path):
    """`tarfile` searches it in time that is quadratic: minutes (CVE-2024-6232)."""
    spoilt = member("00009.jpg", b"x" * 100, comment="9" * 400_000) + member("00009.txt", b"t")
    rows, problems = read(pair(1) + spoilt + pair(2) + END, tmp_path / "a.tar")
    assert keys(rows) == ["00001", "00009", "00002"] and not problems


def test_attributes_for_all_that_follows_do_not_add_up(tmp_path):
    head = tarfile.TarInfo.create_pax_global_header
    content = b"".join(head({f"key{n}": "v" * 4000}) + pair(n) for n in range(200))
    rows, problems = read(content + END, tmp_path / "a.tar")
    assert len(rows) == 200 and not problems


def test_zeros_without_an_end_are_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_ZERO_BLOCKS", 50)
    rows, problems = read(pair(1) + bytes(512 * 40) + pair(2) + bytes(512 * 60) + pair(3) + END, tmp_path / "a.tar")
    assert keys(rows) == ["00001", "00002"] and problems == ["truncated shard"]


def test_numbers_of_samples_do_not_depend_on_refusals(tmp_path):
    """Whoever resumes at a row counts the refused ones."""
    content = pair(0) + sparse("00001.jpg", 2**26) + member("00001.txt", b"t") + pair(2) + END
    (tmp_path / "a.tar").write_bytes(content)
    shards = TarShards([str(tmp_path / "a.tar")])
    rows = {index: row["__key__"] for index, row in shards.read(0, 1, None, lambda reason: None)}
    assert rows == {1: "00001", 2: "00002"} and np.all(list(rows))
