"""The forms in which people keep pictures and captions: each is read, or refused in words."""

import gzip
import io
import json
import tarfile
import zlib

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, Features, Image, List, Value

from flip_hf.data.decode import RefusedSample, choose_caption, decode_image
from flip_hf.data.files import MAX_FILE_BYTES
from flip_hf.data.gzipped import GunzippedFile
from flip_hf.data.lists import ListShards
from flip_hf.data.pairs import PairShards
from flip_hf.data.reading import Reader, read_rows
from flip_hf.data.sources import Source, open_source
from flip_hf.data.tar import TarShards
from tests.helpers.loading import make_train_loader, numbers, saved
from tests.helpers.pairs import write_tar


def fail(*reasons: str) -> None:
    pytest.fail(", ".join(reasons))


def contents(source: Source) -> list[str]:
    """Captions of the rows, each of which has a picture that opens; reasons in place of those that cannot be used."""
    found: list[str] = []
    for row in source.rows():
        try:
            caption = choose_caption(source.target(row), np.random.default_rng(0))
            assert decode_image(source.image(row)).size == (64, 64)
        except RefusedSample as refused:
            caption = refused.reason
        found.append(caption)
    return found


def texts(samples) -> list[str]:
    return [caption.decode() for _, _, caption in samples]


def write_pictures(folder, samples, extension="jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for key, image, _ in samples:
        (folder / f"{key}.{extension}").write_bytes(image)


@pytest.fixture
def few(samples):
    return samples[:12]


@pytest.fixture
def pairs(samples, tmp_path):
    """A folder of 600 pictures in subfolders, three shards, with a text beside each."""
    for number in range(600):
        folder = tmp_path / "pairs" / f"{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}.jpg").write_bytes(samples[number % 160][1])
        (folder / f"{number:05d}.txt").write_text(f"{number:05d} a thing")
    return tmp_path / "pairs"


@pytest.fixture
def listed(samples, tmp_path):
    """A list of 600 rows in the form of open_clip."""
    write_pictures(tmp_path / "listed" / "images", samples)
    rows = [f"images/{number % 160:05d}.jpg\t{number:05d} a thing\n" for number in range(600)]
    (tmp_path / "listed" / "pairs.csv").write_text("filepath\ttitle\n" + "".join(rows))
    return tmp_path / "listed" / "pairs.csv"


# -- pictures and texts of one name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["txt", "caption", "TXT"])
def test_a_text_goes_with_the_picture_of_its_name(extension, few, tmp_path):
    write_pictures(tmp_path / "a" / "b.c", few)
    for key, _, caption in few[:-2]:
        (tmp_path / "a" / "b.c" / f"{key}.{extension}").write_bytes(b"\xef\xbb\xbf" + caption)
    (tmp_path / "a" / "b.c" / f"{few[-1][0]}.{extension}").mkdir()
    source = open_source(str(tmp_path))
    assert contents(source) == [*texts(few[:-2]), "missing caption", "unreadable text file"]
    assert next(source.rows())["__key__"] == "a/b.c/00000"


def test_names_with_dots_and_texts_of_two_kinds_are_distinguished(few, tmp_path):
    (tmp_path / "v1.0.jpg").write_bytes(few[0][1])
    (tmp_path / "v1.1.PNG").write_bytes(few[1][1])
    (tmp_path / "v1.0.txt").write_text("first\r\n")
    (tmp_path / "v1.1.caption").write_text("second")
    (tmp_path / "README.txt").write_text("about")
    assert [text.strip() for text in contents(open_source(str(tmp_path)))] == ["first", "second"]


def test_img2datasets_files_are_read_and_its_table_left_alone(few, tmp_path):
    write_pictures(tmp_path / "00000", few)
    for key, _, caption in few:
        (tmp_path / "00000" / f"{key}.txt").write_bytes(caption)
        (tmp_path / "00000" / f"{key}.json").write_text(json.dumps({"caption": caption.decode(), "key": key}))
    columns = {"url": ["https://example.org"] * 12, "caption": texts(few), "key": [key for key, _, _ in few]}
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert contents(open_source(str(tmp_path))) == texts(few)
    assert contents(open_source(str(tmp_path), target_column="json.caption")) == texts(few)
    with pytest.raises(ValueError, match="no image column with a usual name"):
        open_source(str(tmp_path / "00000.parquet"))


def test_texts_are_bounded_and_stay_in_their_folder(few, tmp_path):
    write_pictures(tmp_path / "data", few[:3])
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "data" / "00000.txt").write_text("fine")
    (tmp_path / "data" / "00001.txt").write_bytes(b"x" * (5 * 2**20))
    (tmp_path / "data" / "00002.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "00003.jpg").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "00003.txt").write_text("x")
    outside = "path outside the data folder"
    assert contents(open_source(str(tmp_path / "data"))) == ["fine", "oversized file", outside, outside]


def test_only_the_files_of_the_named_columns_are_read(few, tmp_path, monkeypatch):
    write_pictures(tmp_path, few)
    for key, _, caption in few:
        (tmp_path / f"{key}.txt").write_bytes(caption)
        (tmp_path / f"{key}.npy").write_bytes(bytes(1000))
    assert set(next(open_source(str(tmp_path)).rows())) == {"__key__", "__url__", "image", "txt"}
    assert set(next(open_source(str(tmp_path), kind="image").rows())) == {"image"}


# -- lists -------------------------------------------------------------------------------------------------------------


CSV = [
    ("x.csv", "filepath\ttitle\n", "{file}\t{text}\n"),
    ("x.csv", "filepath,title\r\n", '{file},"{text}"\r\n'),
    ("x.csv", "\ufefffile_name,text,size\n", "{file},{text},3\n"),
    ("x.csv", "id;image_path;caption\n", '3;"{file}";{text}\n'),
    ("x.csv", "image_name| number| comment\n", "{file}| 0| {text}\n"),
    ("x.tsv", "path\tcaption\n", "{file}\t{text}\n"),
    ("x.jsonl", "", '{{"image": "{file}", "caption": "{text}", "deep": {{"a": [1]}}}}\n'),
    ("x.ndjson", "\ufeff", '{{"image_path": "{file}", "text": ["{text}"]}}\n\n'),
]


@pytest.mark.parametrize(("name", "head", "line"), CSV)
def test_lists_name_pictures_by_paths_relative_to_them(name, head, line, few, tmp_path, monkeypatch):
    write_pictures(tmp_path / "images", few)
    lines = [line.format(file=f"images/{key}.jpg", text=caption.decode()) for key, _, caption in few]
    (tmp_path / name).write_text(head + "".join(lines), newline="")
    options = {"image_column": "image_name", "target_column": "comment"} if "comment" in head else {}
    source = open_source(str(tmp_path / name), **options)
    assert [text.strip() for text in contents(source)] == texts(few)
    row = next(source.rows())
    assert row["__key__"] == "images/00000.jpg" and len(row) == 4  # and none of the other columns
    monkeypatch.chdir(tmp_path)
    for data in (name, f"*{name[1:]}", [name, name], str(tmp_path)):
        assert contents(open_source(data, **options))[:1] == contents(source)[:1]


def test_texts_of_a_csv_come_through_and_broken_lines_cost_themselves(few, tmp_path):
    write_pictures(tmp_path, few)
    rows = [
        b'00000.jpg,"two\r\nlines, and ""quotes"""\r\n',
        b'00001.jpg,"never closed\r\n',
        b"00002.jpg,after it\r\n",
        b"00003.jpg\r\n",
        b"00004.jpg,too,many\r\n",
        b"\r\n",
        b"00005.jpg,\xff\r\n",
        b"00006.jpg," + b"x" * (5 * 2**20) + b"\r\n",
        b'00007.jpg,"' + b"x\n" * 200 + b'"\r\n',
        b'00008.jpg,""\r\n',
        b",nothing\r\n",
        b"../secret.jpg,out\r\n",
        "00009.jpg,größer".encode(),
    ]
    (tmp_path / "x.csv").write_bytes(b"filepath,title\r\n" + b"".join(rows))
    found = contents(open_source(str(tmp_path / "x.csv")))
    first = ['two\r\nlines, and "quotes"', "damaged line", "after it", "damaged line", "damaged line"]
    assert found[:5] == first and found[5:7] == ["caption is not UTF-8", "damaged line"]
    assert set(found[7:-4]) == {"damaged line"} and len(found[7:-4]) == 201  # an unclosed quote's lines are rows again
    assert found[-4:] == ["empty caption", "missing image", "path outside the data folder", "größer"]


def test_broken_lines_of_json_cost_themselves(few, tmp_path):
    write_pictures(tmp_path, few)
    lines = ["{", "3", "[" * 100_000, '{"image": "00001.jpg"}', '{"image": 3, "text": "x"}', '{"text": "x"}']
    whole = '{"image": "00000.jpg", "text": "whole"}'
    (tmp_path / "x.jsonl").write_text("\n".join([whole, *lines, whole]))
    reasons = ["damaged line"] * 3 + ["missing caption", "image column holds no image", "missing image"]
    assert contents(open_source(str(tmp_path / "x.jsonl"))) == ["whole", *reasons, "whole"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        ("filepath,title\na.jpg,x\n".encode("utf-16"), "not text in UTF-8"),
        (b"name,price\na,3\n", "no caption column with a usual name. Its columns are: name, price"),
        (b"filepath,title\na.jpg,x\n", "None of the first 1 pictures .* paths are relative to the list"),
        (
            b"filepath,title\n/etc/passwd,x\n",
            "which is not in its folder. Pictures must be below the list's own folder",
        ),
        (b"path,title\nhttps://example.org/a.jpg,x\n", "Pictures are not downloaded"),
        (b"filepath,title\n", "has no samples"),
    ],
)
def test_an_unusable_list_is_refused_with_the_reason(text, message, tmp_path):
    (tmp_path / "x.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "x.csv"))


def test_a_metadata_parquet_names_pictures_beside_it(few, tmp_path):
    write_pictures(tmp_path / "images", few)
    table = {"file_name": [f"images/{key}.jpg" for key, _, _ in few], "text": texts(few)}
    table["file_name"][3] = "../x.jpg"
    pq.write_table(pa.table(table), tmp_path / "metadata.parquet")
    expected = texts(few)
    expected[3] = "path outside the data folder"
    assert contents(open_source(str(tmp_path))) == expected


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pairs", "listed"])
def test_pairs_and_lists_are_read_once_an_epoch_and_resumed_anywhere(form, request):
    data = request.getfixturevalue(form)
    source = open_source(str(data))
    assert isinstance(source.shards, (PairShards, ListShards)) and source.shards.num_shards == 3
    for count in (1, 2, 5):
        found: list[str] = []
        for index in range(count):
            rows = list(read_rows(source.shards, Reader(index, count), epoch=1, seed=3, report=fail))
            middle = len(rows) // 2
            again = read_rows(source.shards, Reader(index, count), epoch=1, seed=3, start=rows[middle][0], report=fail)
            assert [place for place, _ in again] == [place for place, _ in rows[middle:]]
            found += [choose_caption(source.target(row), np.random.default_rng(0))[:5] for _, row in rows]
        assert sorted(found) == [f"{number:05d}" for number in range(600)]
    loader = make_train_loader(data)
    batches = iter(loader)
    numbers([next(batches) for _ in range(5)])
    states = saved([loader])
    rest = numbers([next(batches) for _ in range(5)])
    assert numbers([batch for batch, _ in zip(make_train_loader(data, states=states), range(5), strict=False)]) == rest


# -- tar ---------------------------------------------------------------------------------------------------------------


def write_members(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def compress(path, target):
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def test_compressed_shards_are_read_as_others(tar_folder):
    expected = contents(open_source(str(tar_folder)))
    for number, path in enumerate(sorted(tar_folder.glob("*.tar"))):
        compress(path, path.with_suffix(".tgz" if number % 2 else ".tar.gz"))
    source = open_source(str(tar_folder))
    assert contents(source) == expected
    rows = list(read_rows(source.shards, Reader(0, 1), epoch=0, seed=1, report=fail))
    start = rows[70][0]
    again = read_rows(source.shards, Reader(0, 1), epoch=0, seed=1, start=start, report=fail)
    assert [row["__key__"] for _, row in again] == [row["__key__"] for _, row in rows[70:]]
    system = fsspec.filesystem("memory")
    system.put(str(tar_folder / "shard-0000.tar.gz"), "/packed/shard-0000.tar.gz")
    assert contents(open_source("memory://packed/shard-0000.tar.gz")) == expected[:32]
    system.rm("/packed", recursive=True)


def test_damaged_and_expanding_compressed_shards_cost_themselves(samples, tar_folder):
    for path in sorted(tar_folder.glob("*.tar")):
        compress(path, path.with_suffix(".tar.gz"))
    first, second, third, fourth, _ = sorted(tar_folder.glob("*.tar.gz"))
    first.write_bytes(first.read_bytes()[:20_000])
    whole = second.read_bytes()
    second.write_bytes(whole[:30_000] + bytes(100) + whole[30_100:])
    third.write_bytes(b"no gzip file" * 100)
    header = tarfile.TarInfo("00000.jpg")
    header.size = 2**40
    packer = zlib.compressobj(9, wbits=31)
    parts = [header.tobuf(), *[bytes(2**20)] * 150]
    fourth.write_bytes(b"".join(map(packer.compress, parts)) + packer.flush())
    problems: list[str] = []
    source = open_source(str(tar_folder))
    rows = read_rows(
        source.shards, Reader(0, 1), epoch=0, seed=None, report=lambda *reasons: problems.append(reasons[0])
    )
    keys = {row["__key__"] for _, row in rows}
    assert problems == ["truncated shard", "unreadable shard", "unreadable shard", "unreadable shard"]
    assert keys >= {key for key, _, _ in samples[128:]}


def test_a_gzip_file_expands_within_bounds(tmp_path):
    packed = gzip.compress(b"one") + gzip.compress(b"") + gzip.compress(b"two") + bytes(512)
    (tmp_path / "a.gz").write_bytes(packed)
    with GunzippedFile(open(tmp_path / "a.gz", "rb")) as file:
        assert file.read() == b"onetwo"
    (tmp_path / "b.gz").write_bytes(gzip.compress(bytes(2 * MAX_FILE_BYTES)))
    with GunzippedFile(open(tmp_path / "b.gz", "rb")) as file, pytest.raises(ValueError, match="more than 100 times"):
        while file.read(2**20):
            pass


def test_keys_with_dots_are_read_where_no_others_give_samples(few, tmp_path):
    write_tar(tmp_path / "a.tar", [(f"v1.0-{key}", image, caption) for key, image, caption in few])
    assert contents(open_source(str(tmp_path / "a.tar"))) == texts(few)


def test_samples_whose_parts_are_apart_are_refused_by_name(few, tmp_path):
    for count in (12, 3):  # with all pictures alone, too, among the rows that are looked at
        members = [
            (f"{sample[0]}.{extension}", sample[part])
            for extension, part in (("jpg", 1), ("txt", 2))
            for sample in few[:count]
        ]
        write_members(tmp_path / "x.tar", members)
        with pytest.raises(ValueError, match="'00000.jpg' and '00000.txt' belong to one sample.*--sort=name"):
            open_source(str(tmp_path / "x.tar"))


# -- unused columns ----------------------------------------------------------------------------------------------------


def test_unused_members_are_not_read(few, tmp_path):
    extras = [("npy", b"x" * 1000), ("json", b"{"), *((f"m{number}", b"") for number in range(1100))]
    members = [
        (f"{key}.{name}", data)
        for key, image, caption in few[:3]
        for name, data in [*extras, ("jpg", image), ("txt", caption)]
    ]
    write_members(tmp_path / "a.tar", members)
    shards = TarShards([str(tmp_path / "a.tar")], max_member_bytes=5000)
    kept = [row for _, row in shards.select("jpg", "txt").read(0, 0, None, fail)]
    assert kept == [
        {"__key__": key, "__url__": shards.urls[0], "jpg": image, "txt": caption} for key, image, caption in few[:3]
    ]
    write_members(
        tmp_path / "b.tar", [member for member in members if not member[0].rpartition(".")[2].startswith("m")]
    )
    assert set(next(open_source(str(tmp_path / "b.tar")).rows())) == {"__key__", "__url__", "jpg", "txt"}


def test_unused_columns_are_neither_read_nor_decoded(few, tmp_path):
    stored: dict = {
        "image": Image(),
        "text": Value("string"),
        "others": List(Image()),
        "vector": List(Value("float32")),
    }
    features = {**stored, "audio": Audio()}
    stored["audio"] = {"bytes": Value("binary"), "path": Value("string")}
    junk = {"bytes": b"junk", "path": None}
    extras = {"others": [junk], "audio": junk, "vector": [1.0]}
    rows = [{"image": {"bytes": s[1], "path": None}, "text": s[2].decode(), **extras} for s in few]
    dataset = Dataset.from_list(rows, Features(stored))
    dataset.info.features = Features(features)
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    metadata = {"info": {"features": Features(features).to_dict()}}
    table = dataset.data.table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, tmp_path / "parquet" / "0.parquet")
    for name in ("saved", "parquet"):
        source = open_source(str(tmp_path / name))
        assert contents(source) == texts(few)
        assert set(next(source.rows())) == {"image", "text"}


# -- what is not read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.zip", "found: 1 x .zip. Unpack it"),
        ("x.7z", "found: 1 x .7z. Unpack it"),
        ("x.mp4", "found: 1 x .mp4. Write frames of it"),
        ("train.tfrecord", "found: 1 x .tfrecord. Write its samples as tar shards"),
        ("data-00000-of-00001.arrow", "found: 1 x .arrow. Name the folder that save_to_disk wrote"),
        ("x.json", "found: 1 x .json. Write one JSON object per line"),
        ("x.foo", "found: 1 x .foo. Supported are .tar"),
    ],
)
def test_unreadable_files_are_refused_naming_their_content(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"xyz")
    for data in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=message):
            open_source(str(data))


def test_data_without_captions_or_pictures_name_the_fix(few, tmp_path):
    write_pictures(tmp_path / "pictures", few)
    with pytest.raises(ValueError, match="Its columns are: image. Put a text beside each picture, a.txt beside a.jpg"):
        open_source(str(tmp_path / "pictures"))
    (tmp_path / "pictures" / "00000.json").write_text("{}")
    with pytest.raises(ValueError, match="Its columns are: image, json. Name the right one with --caption_column"):
        open_source(str(tmp_path / "pictures"))
    (tmp_path / "urls.csv").write_text("url,caption\nhttps://example.org/a.jpg,x\n")
    pq.write_table(pa.table({"url": ["https://example.org/a.jpg"], "caption": ["x"]}), tmp_path / "urls.parquet")
    for name in ("urls.csv", "urls.parquet"):
        with pytest.raises(ValueError, match="Pictures are not downloaded"):
            open_source(str(tmp_path / name))
    (tmp_path / "x.jsonl").write_text("[1]\n2\n")
    with pytest.raises(ValueError, match="None of the first lines of .* is a JSON object"):
        open_source(str(tmp_path / "x.jsonl"))
    with pytest.raises(FileNotFoundError, match="There is no file .*none.csv"):
        open_source(str(tmp_path / "none.csv"))


def test_an_empty_folder_and_files_of_several_kinds_are_refused(few, tmp_path):
    with pytest.raises(ValueError, match="is empty. Supported are"):
        open_source(str(tmp_path))
    write_tar(tmp_path / "a.tar", few)
    (tmp_path / "b.csv").write_text("filepath,title\n")
    with pytest.raises(ValueError, match="are of several kinds"):
        open_source([str(tmp_path / "a.tar"), str(tmp_path / "b.csv")])
