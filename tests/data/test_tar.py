import io
import itertools
import tarfile

import pytest

from flip_hf.data import tar
from flip_hf.data.decode import RefusedSample
from flip_hf.data.opening import open_named
from flip_hf.data.reading import Reader
from flip_hf.data.sources import column_value, open_source
from flip_hf.data.tar import TarShards, split_name
from tests.helpers import damaged
from tests.helpers.pairs import write_tar


def read(data: bytes, tmp_path, first=0, part=None, **options) -> tuple[list[dict], list[str]]:
    """The rows of one shard, and the damage reported."""
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
            info.size = len(data or b"")
            info.type = tarfile.REGTYPE if data else tarfile.DIRTYPE
            archive.addfile(info, io.BytesIO(data or b""))
        link = tarfile.TarInfo("a/2.jpg")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
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


def test_a_truncated_shard_is_reported_wherever_it_is_cut(tmp_path):
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


def test_files_that_are_no_archive_are_reported(tmp_path):
    for data in (b"", b"garbage" * 1000):
        try:
            assert read(data, tmp_path)[1] == ["damaged tar header", "truncated shard"]
        except ValueError as error:  # `read_rows` reports it
            assert "not a tar archive" in str(error)


def test_large_members_are_refused_unread(tmp_path):
    (tmp_path / "y").mkdir()
    sparse = [("jpg", damaged.SPARSE), ("txt", b"t")]
    rows, problems = read(damaged.shard(many(k2=sparse)), tmp_path)
    assert isinstance(rows[2]["jpg"], RefusedSample) and rows[2]["txt"] == b"t" and problems == []
    with pytest.raises(RefusedSample, match="sparse tar member"):
        column_value(rows[2], "jpg")
    rows, _ = read(damaged.shard(many()), tmp_path / "y", max_member_bytes=699)
    assert all(row["jpg"].reason == "oversized file" for row in rows)


def test_a_header_cannot_ask_for_memory(tmp_path, monkeypatch):
    """A long-name header that claims 8 GiB: its block is skipped as damage."""
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 2**33 - 1
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


BEFORE = damaged.shard([("a", [("jpg", b"1"), ("txt", b"t")])])[:-10240]
AFTER = damaged.shard(many())
SOUND = ["a", *(f"k{n}" for n in range(6))]
SPARSE = {
    "old": damaged.sparse_header("x.jpg", 60 * 2**20),
    "old, map continues": damaged.sparse_header("x.jpg", 60 * 2**20, True) + bytes(504) + b"\1" + bytes(7) + bytes(512),
    "pax 0.0": damaged.pax(**{"GNU.sparse.size": "62914560", "GNU.sparse.numblocks": "0"}) + damaged.header("x.jpg"),
    "pax 0.1": damaged.pax(**{"GNU.sparse.map": "0,1", "GNU.sparse.size": "62914560"}) + damaged.member("x.jpg", b"j"),
    "pax 1.0": damaged.pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "62914560"})
    + damaged.member("x.jpg", b"99999999\n".ljust(512, b"0")),
}


@pytest.mark.parametrize("made", SPARSE.values(), ids=SPARSE.keys())
def test_sparse_members_are_not_expanded(made, tmp_path):
    rows, problems = read(BEFORE + made + damaged.member("x.txt", b"t") + AFTER, tmp_path)
    assert keys(rows) == ["a", "x", *SOUND[1:]] and problems == []
    assert rows[1]["jpg"].reason == "sparse tar member" and rows[1]["txt"] == b"t"


LONG = damaged.preceding(tarfile.GNUTYPE_LONGNAME, b"n" * 150 + b".jpg\0")
LIARS = {
    "points at itself": damaged.header("x.bin", -512),
    "points back": damaged.header("x.bin", -2048),
    "points back, in words": damaged.pax(size="-512") + damaged.header("x.bin"),
    "no number": damaged.pax(size="9" * 6000) + damaged.header("x.bin"),
    "4 EiB": damaged.header("x.bin", 2**62),
    "2000 long names": LONG * 2000,
    "2000 pax headers": damaged.pax(path="x.jpg") * 2000,
    "no record": damaged.preceding(tarfile.XHDTYPE, b"1" * 900_000) + damaged.header("x.bin"),
    "record of length 0": damaged.preceding(tarfile.XHDTYPE, b"0 path=x.jpg\n") + damaged.header("x.bin"),
    "a name of 500 kB": damaged.pax(path="n" * 500_000 + ".jpg") + damaged.header("x.bin"),
    "damage after a long name": LONG + b"no header".ljust(512),
}


@pytest.mark.parametrize("made", LIARS.values(), ids=LIARS.keys())
def test_headers_that_lie_cost_themselves(made, tmp_path):
    rows, problems = read(BEFORE + made + AFTER, tmp_path)
    assert [key for key in keys(rows) if key != "x"] == SOUND and problems == ["damaged tar header"]


def test_a_header_before_a_member_is_followed(tmp_path):
    link = damaged.preceding(tarfile.GNUTYPE_LONGLINK, b"l" * 200)
    comment = damaged.preceding(tarfile.XGLTYPE, b"16 comment=word\n")
    made = [comment + LONG + damaged.member("nnn", b"1"), link + LONG[:-512] + b"m.jpg".ljust(512, b"\0")]
    made[1] += damaged.pax(path="inner.jpg", size="3") + damaged.header("mmm") + b"abc".ljust(512, b"\0")
    rows, problems = read(b"".join(made) + AFTER, tmp_path)
    assert problems == [] and keys(rows)[:2] == ["n" * 150, "m"] and rows[1]["jpg"] == b"abc"


def test_a_samples_members_are_bounded_together(tmp_path):
    large = [(f"e{n}", b"j" * 600) for n in range(4)]
    rows, problems = read(damaged.shard(many(3, k1=large)), tmp_path, max_member_bytes=800)
    assert [len(value) for value in list(rows[1].values())[2:4]] == [600, 600] and problems == []
    assert [rows[1][name].reason for name in ("e2", "e3")] == ["oversized sample"] * 2


def test_a_samples_members_are_bounded_in_number(tmp_path):
    rows, problems = read(damaged.shard(many(3, k1=[(f"e{n}", b"") for n in range(tar.MAX_MEMBERS + 9)])), tmp_path)
    assert keys(rows) == ["k0", "k1", "k2"] and problems == ["oversized sample"]
    assert len(rows[1]) == tar.MAX_MEMBERS + 2


def test_no_member_stands_in_for_the_reader(tmp_path):
    rows, _ = read(damaged.shard(many(2, k1=[("__url__", b"u"), ("__key__", b"k"), ("txt", b"t")])), tmp_path)
    assert keys(rows) == ["k0", "k1"] and rows[1]["__url__"] == str(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_archive_is_not_inflated(kind, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = 4 * 2**20
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    try:
        rows, problems = read(buffer.getvalue(), tmp_path)
        assert rows == [] and "truncated shard" in problems
    except ValueError as error:
        assert "not a tar archive" in str(error)


def test_reading_begins_at_a_row_and_takes_turns(tmp_path):
    data = damaged.shard(many(9))
    assert keys(read(data, tmp_path, first=4)[0]) == ["k4", "k5", "k6", "k7", "k8"]
    assert keys(read(data, tmp_path, first=3, part=Reader(1, 3))[0]) == ["k4", "k7"]


class Counted(TarShards):
    """Shards that count the members that they walk over."""

    members = 0

    def _split(self, member):
        self.members += 1
        return super()._split(member)


def test_a_row_that_was_read_to_see_that_there_is_one_is_resumed_from(tmp_path):
    """Else every block of a shard is found from the shard's beginning, in a time that grows with its square."""
    write_tar(tmp_path / "0.tar", [(f"{number:02}", b"image", b"words") for number in range(40)])
    shards = Counted([str(tmp_path / "0.tar")])
    found = []
    for begin in range(0, 40, 4):
        rows = [row["__key__"] for _, row in itertools.islice(shards.read(0, begin, None, print), 5)]
        found += rows[:4]
    assert found == [f"{number:02}" for number in range(40)]
    assert shards.members < 1.5 * 2 * 40 + 10


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
