import io
import tarfile

import pytest

from flip_hf.data import tar
from flip_hf.data.decode import RefusedSample
from flip_hf.data.reading import Reader
from flip_hf.data.sources import column_value, open_named, open_source
from flip_hf.data.tar import TarShards, split_name
from tests.data import damaged


def read(data: bytes, tmp_path, first=0, part=None, **options) -> tuple[list[dict], list[str]]:
    """The rows of one shard, and the damage told of."""
    (tmp_path / "x.tar").write_bytes(data)
    problems: list[str] = []
    rows = TarShards([str(tmp_path / "x.tar")], **options).read(0, first, part, problems.append)
    return [row for _, row in rows], problems


def keys(rows) -> list[str]:
    return [row["__key__"] for row in rows]


def many(count=6, **changed) -> list[tuple[str, damaged.Members]]:
    return [(f"k{n}", changed.get(f"k{n}", [("jpg", b"j" * 700), ("txt", b"t")])) for n in range(count)]


def test_keys_and_extensions_follow_webdataset():
    assert split_name("a/b.c/00.Seg.PNG") == ("a/b.c/00", "seg.png")
    assert split_name("00017.jpg") == ("00017", "jpg")
    assert split_name("a/.hidden") is None and split_name("._00017.jpg") is None and split_name("LICENSE") is None


def test_members_are_grouped_and_stay_bytes(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        long = "d" * 120 + "/" + "ü" * 90  # a pax header
        for name, data in (
            ("a/", None),
            ("a/1.jpg", b"x"),
            ("a/1.txt", b"\xff"),
            ("README", b"?"),
            (f"{long}.txt", b"y"),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data or b""), tarfile.REGTYPE if data else tarfile.DIRTYPE
            archive.addfile(info, io.BytesIO(data or b""))
        link = tarfile.TarInfo("a/2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    rows, problems = read(buffer.getvalue(), tmp_path)
    url = str(tmp_path / "x.tar")
    assert rows == [
        {"__key__": "a/1", "__url__": url, "jpg": b"x", "txt": b"\xff"},
        {"__key__": long, "__url__": url, "txt": b"y"},
    ]
    assert problems == []


@pytest.mark.parametrize("name", ["missing", "empty", "bytes that are no text", "broken json"])
def test_a_bad_member_ends_nothing(name, tmp_path):
    members = {"missing": [("jpg", b"j")], "empty": [("jpg", b""), ("txt", b"t")]}
    members["bytes that are no text"] = [("jpg", b"j"), ("txt", b"\xff\xfe")]
    members["broken json"] = [("jpg", b"j"), ("json", b"{")]
    for at in ("k0", "k3"):  # also among the first ones
        rows, problems = read(damaged.shard(many(**{at: members[name]})), tmp_path)
        assert keys(rows) == [f"k{n}" for n in range(6)] and problems == []


def test_a_key_that_comes_again_begins_another_sample(tmp_path):
    pair = [("jpg", b"j"), ("txt", b"t")]
    rows, _ = read(damaged.shard(many(2, k1=pair + pair)), tmp_path)
    assert keys(rows) == ["k0", "k1", "k1"] and all(row.keys() == rows[0].keys() for row in rows)


def test_a_cut_shard_is_told_of_wherever_it_is_cut(tmp_path):
    data = damaged.shard(many())
    # A sample is 512 + 1024 bytes of image and 512 + 512 of text, of which one byte counts.
    for size, whole in ((2560, 1), (3000, 1), (3372, 1), (4608, 1), (4609, 2), (5120, 2), (5220, 2)):
        rows, problems = read(data[:size], tmp_path)
        assert problems == ["truncated shard"], size
        complete = [row for row in rows if {"jpg", "txt"} <= row.keys()]
        assert len(complete) == whole, size
    assert read(data, tmp_path)[1] == []


def test_a_damaged_header_costs_its_member(tmp_path):
    broken = [("jpg", damaged.BROKEN_HEADER + b"j" * 700), ("txt", b"t")]
    rows, problems = read(damaged.shard(many(k3=broken)), tmp_path)
    assert keys(rows) == [f"k{n}" for n in range(6)] and problems == ["damaged tar header"]
    assert "jpg" not in rows[3] and all("jpg" in row for n, row in enumerate(rows) if n != 3)


def test_what_is_no_archive_is_told_of(tmp_path):
    for data in (b"", b"garbage" * 1000):
        try:
            assert read(data, tmp_path)[1] == ["damaged tar header", "truncated shard"]
        except ValueError as error:  # `read_rows` reports it
            assert "no tar archive" in str(error)


def test_large_members_are_refused_unread(tmp_path):
    (tmp_path / "y").mkdir()
    bomb = [("jpg", damaged.OVERSIZED), ("txt", b"t")]
    rows, problems = read(damaged.shard(many(k2=bomb)), tmp_path)
    assert isinstance(rows[2]["jpg"], RefusedSample) and rows[2]["txt"] == b"t" and problems == []
    with pytest.raises(RefusedSample, match="oversized file"):
        column_value(rows[2], "jpg")
    rows, _ = read(damaged.shard(many()), tmp_path / "y", max_member_bytes=699)
    assert all(isinstance(row["jpg"], RefusedSample) for row in rows)


def test_a_header_cannot_ask_for_memory(tmp_path, monkeypatch):
    """A long-name header that claims 8 GiB: its block is skipped as damage."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33 - 1
    asked = []
    monkeypatch.setattr(tar, "open_at", lambda url, offset, in_one_go: Recorder(url, asked))
    rows, problems = read(info.tobuf(tarfile.GNU_FORMAT) + damaged.shard(many()), tmp_path)
    assert keys(rows) == [f"k{n}" for n in range(6)] and problems == ["damaged tar header"]
    assert max(asked) < 2**20


class Recorder(io.FileIO):
    def __init__(self, url, asked):
        super().__init__(url)
        self.asked = asked

    def read(self, size=-1):
        self.asked.append(size)
        return super().read(size)


def test_reading_begins_at_a_row_and_takes_turns(tmp_path):
    data = damaged.shard(many(9))
    assert keys(read(data, tmp_path, first=4)[0]) == ["k4", "k5", "k6", "k7", "k8"]
    assert keys(read(data, tmp_path, first=3, part=Reader(1, 3))[0]) == ["k4", "k7"]


def test_captions_come_out_of_json_and_images_under_any_usual_extension(tmp_path):
    samples = [("a", [("jpg", b"1"), ("json", b'{"caption": "x", "n": {"deep": "y"}}')])]
    samples += [("b", [("png", b"2"), ("json", b"{")]), ("c", [("webp", b"3"), ("json", b'["no object"]')])]
    (tmp_path / "x.tar").write_bytes(damaged.shard(samples))
    source = open_source(str(tmp_path / "x.tar"), target_column="json.caption")
    rows = list(source.rows())
    assert [source.image(row) for row in rows] == [b"1", b"2", b"3"]
    assert source.target(rows[0]) == "x" and column_value(rows[0], "json.n.deep") == "y"
    with pytest.raises(RefusedSample, match="damaged JSON"):
        source.target(rows[1])
    assert source.target(rows[2]) is None


def test_the_first_samples_may_be_damaged(tmp_path):
    first = {"k0": [("txt", b"t")], "k1": [("jpg", b"j")]}
    (tmp_path / "x.tar").write_bytes(damaged.shard(many(**first)))
    assert open_source(str(tmp_path / "x.tar")).target_column == "txt"


def test_a_folder_in_the_hubs_layout_is_read_with_our_own_reader(tar_folder, samples):
    shards = open_named(str(tar_folder), None, "train")
    assert isinstance(shards, TarShards) and shards.num_shards == 5
    with pytest.raises(ValueError, match="no split 'test', only: train"):
        open_named(str(tar_folder), None, "test")
