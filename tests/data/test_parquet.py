"""Parquet files: the rows that `datasets` reads, of the needed columns alone, in no more memory than sound data."""

import json
import multiprocessing
import os
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, ClassLabel, Dataset, Features, Image, Json, List, Value, load_dataset

from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.opening import open_named
from flip_hf.data.parquet import ParquetShards
from flip_hf.data.reading import DatasetShards, Reader, read_rows
from flip_hf.data.sources import open_source

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pictures(*contents: bytes) -> pa.Array:
    return pa.array([{"bytes": each, "path": None} for each in contents], PICTURE)


def write(path, image: pa.Array, caption: list | pa.Array | None = None, **options):
    """Writes a table of these columns; captions are the rows' numbers if there are none."""
    caption = [str(n) for n in range(len(image))] if caption is None else caption
    pq.write_table(pa.table({"image": image, "caption": caption}), path, **options)
    return path


def read(shards, first=0, part=None) -> tuple[list[tuple[int, int, dict]], list[str]]:
    """(shard, number, row) of all shards, and the damage reported."""
    problems: list[str] = []
    rows = [
        (n, *numbered) for n in range(shards.num_shards) for numbered in shards.read(n, first, part, problems.append)
    ]
    return rows, problems


def as_datasets_reads(files) -> DatasetShards:
    dataset = load_dataset(
        "parquet", data_files={"train": [str(file) for file in files]}, split="train", streaming=True
    )
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return DatasetShards(dataset, remote=False)


@pytest.fixture
def every_type(samples, tmp_path):
    """Three files of one table: as `datasets` writes it, in small row groups, and in other encodings."""
    features = {"image": Image(), "caption": Value("string"), "label": ClassLabel(names=["a", "b"])}
    features |= {
        "captions": List(Value("string")),
        "json": Json(),
        "meta": {"text": Value("string"), "n": Value("int8")},
    }
    features |= {"vector": List(Value("float32"), length=2), "when": Value("timestamp[s]")}
    rows = [
        {
            "image": {"bytes": samples[n][1], "path": f"{n}.jpg"} if n != 7 else None,
            "caption": f"{n} ü" if n % 9 else None,
            "label": n % 2,
            "captions": [f"{n}", "", None] if n % 4 else None,
            "json": {"text": [n, "x"]},
            "meta": {"text": f"{n}", "n": n},
            "vector": [n / 3, 1.0],
            "when": None,
        }
        for n in range(40)
    ]
    dataset = Dataset.from_list(rows, features=Features(features))
    dataset.to_parquet(str(tmp_path / "0.parquet"))
    dataset.to_parquet(str(tmp_path / "1.parquet"), batch_size=7)
    encodings = {"caption": "DELTA_BYTE_ARRAY", "image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}
    pq.write_table(
        dataset.with_format("arrow")[:],
        tmp_path / "2.parquet",
        compression="gzip",
        data_page_version="2.0",
        use_dictionary=False,
        column_encoding=encodings,
        row_group_size=13,
    )
    return sorted(tmp_path.glob("*.parquet"))


# -- good data --------------------------------------------------------------------------------------------------------


def test_rows_are_those_that_datasets_reads(every_type):
    rows, problems = read(ParquetShards([str(file) for file in every_type]))
    assert rows == read(as_datasets_reads(every_type))[0] and len(rows) == 120 and problems == []


def test_reading_begins_at_a_row_and_takes_turns(every_type):
    shards = ParquetShards([str(file) for file in every_type])
    rows, _ = read(shards)
    for first in (0, 1, 6, 7, 13, 39, 40):
        assert read(shards, first)[0] == [row for row in rows if row[1] >= first]
        turns = [row for row in rows if row[1] >= first and row[1] % 3 == 1]
        assert read(shards, first, Reader(1, 3))[0] == turns


def test_views_dictionaries_and_large_types_are_read(samples, tmp_path):
    images = [each[1] for each in samples[:20]]
    table = {"image": pa.array(images, pa.binary_view()), "caption": pa.array(["x", "y"] * 10).dictionary_encode()}
    table |= {"large": pa.array(["z"] * 20, pa.large_string()), "view": pa.array(["v"] * 20, pa.string_view())}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    rows, _ = read(ParquetShards([str(tmp_path / "x.parquet")]))
    assert [row for _, _, row in rows] == [
        {"image": image, "caption": "xy"[n % 2], "large": "z", "view": "v"} for n, image in enumerate(images)
    ]


def test_nested_columns_alternatives_and_class_names(every_type):
    for column, expected in (("meta.text", "3"), ("none;caption", "3 ü"), ("json.text", [3, "x"])):
        source = open_source(str(every_type[0]), target_column=column)
        assert source.target(list(source.rows())[3]) == expected
    source = open_source(str(every_type[0]), target_column="label", kind="label")
    assert source.class_names == ("a", "b") and set(next(source.rows())) == {"image", "label"}


def test_labels_of_other_classes_are_not_mixed_in(tmp_path):
    """A folder of two data sets: index 0 is a cat in one, a dog in the other; a file that names no classes is taken."""
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"], None)):
        features = Features({"image": Image(), "label": ClassLabel(names=names) if names else Value("int64")})
        rows = {"image": [{"bytes": b"x", "path": None}] * 2, "label": [0, 1]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{number}.parquet")
    source = open_source(str(tmp_path / "*.parquet"), target_column="label", kind="label")
    assert source.class_names == ("cat", "dog")
    problems = []

    def report(reason, detail):
        problems.append((reason, detail))

    found = [shard for (shard, _), _ in read_rows(source.shards, Reader(0, 1), epoch=0, seed=None, report=report)]
    assert found == [0, 0, 2, 2]
    [(reason, detail)] = problems
    assert reason == "unreadable shard" and "1.parquet" in detail
    assert "its classes in 'label' are not those of" in detail and "give the data sets separately" in detail
    images = open_source(str(tmp_path / "*.parquet"), kind="image")
    assert len(list(images.rows())) == 6


def test_unused_columns_are_not_read(samples, tmp_path):
    """One that needs another library, one that this version does not know, and one whose pages are damaged."""
    table = pa.table({"image": pictures(*(each[1] for each in samples[:9])), "caption": ["x"] * 9})
    table = table.append_column("audio", pictures(*[b"RIFF"] * 9)).append_column("unknown", pa.array([1] * 9))
    table = table.append_column("broken", pa.array([b"look for me" * 999] * 9))
    features = Features({"image": Image(), "caption": Value("string"), "audio": Audio()}).to_dict()
    features["unknown"] = {"_type": "OfNextYear"}
    metadata = json.dumps({"info": {"features": features}})
    file = tmp_path / "x.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), file, compression="none")
    data = file.read_bytes()
    at = pq.read_metadata(file).row_group(0).column(6).dictionary_page_offset
    assert data.index(b"look for me") > at
    file.write_bytes(data[:at] + b"\xff" * 40 + data[at + 40 :])
    source = open_source(str(file))
    assert [decode_image(source.image(row)).size for row in source.rows()] == [(64, 64)] * 9
    problems = read(ParquetShards([str(file)]).select("broken"))[1]
    assert problems == ["damaged row group"]


def test_a_folder_in_the_hubs_layout_is_read_with_our_own_reader(parquet_folder, samples):
    shards = open_named(str(parquet_folder), None, "train")
    assert isinstance(shards, ParquetShards) and len(read(shards)[0]) == len(samples)
    with pytest.raises(ValueError, match="no split 'test', only: train"):
        open_named(str(parquet_folder), None, "test")


# -- damage -----------------------------------------------------------------------------------------------------------


def test_a_damaged_row_group_costs_itself(samples, tmp_path):
    images = pictures(*(each[1] for each in samples[:30]))
    file = write(tmp_path / "x.parquet", images, row_group_size=10, compression="none", use_dictionary=False)
    data = bytearray(file.read_bytes())
    at = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    data[at : at + 30] = b"\xff" * 30
    file.write_bytes(data)
    for first in (0, 12):
        rows, problems = read(ParquetShards([str(file)]), first)
        assert [(number, row["caption"]) for _, number, row in rows] == [
            (n, str(n)) for n in (*range(first, 10), *range(20, 30))
        ]
        assert problems == ["damaged row group"]


def test_files_that_cannot_be_read_are_reported(samples, tmp_path):
    good = write(tmp_path / "5.parquet", pictures(samples[0][1])).read_bytes()
    (tmp_path / "0.parquet").write_bytes(b"")
    (tmp_path / "1.parquet").write_bytes(b"no parquet" * 99)
    (tmp_path / "2.parquet").write_bytes(good[:-9])
    (tmp_path / "3.parquet").write_bytes(good[:-40] + b"\xff" * 32 + good[-8:])
    os.mkfifo(tmp_path / "4.parquet")
    write(tmp_path / "6.parquet", pictures(), pa.array([], pa.string()))
    pq.write_table(pa.table({"other": [1]}), tmp_path / "7.parquet")
    source = open_source(str(tmp_path))
    reported: list[tuple[str, str]] = []
    rows = read_rows(source.shards, Reader(0, 1), epoch=0, seed=None, report=lambda *each: reported.append(each))
    assert [place for place, _ in rows] == [(5, 0)]
    assert [reason for reason, _ in reported] == ["unreadable shard"] * 6
    for (_, detail), why in zip(
        reported,
        ("empty", "not a parquet file", "truncated", "Error", "Not a regular file", "none of the columns"),
        strict=True,
    ):
        assert why in detail
    with pytest.raises(ValueError, match="0.parquet' cannot be read as parquet: an empty file"):
        open_source(str(tmp_path / "0.parquet"))
    with pytest.raises(FileNotFoundError, match="no file '.*8.parquet'"):
        open_source(str(tmp_path / "{5..9}.parquet"))


def test_a_column_that_a_file_lacks_is_missing_in_its_rows_alone(samples, tmp_path):
    write(tmp_path / "0.parquet", pictures(samples[0][1]))
    pq.write_table(pa.table({"image": pictures(samples[1][1])}), tmp_path / "1.parquet")
    write(tmp_path / "2.parquet", pictures(samples[2][1]), pa.array([3]))
    source = open_source(str(tmp_path))
    assert [source.target(row) for row in source.rows()] == ["0", None, "3"]


def test_a_text_that_is_no_unicode_costs_its_row(samples, tmp_path):
    texts = pa.array([b"good", b"\xff\xfe", b"good"]).cast(pa.binary()).view(pa.string())
    source = open_source(str(write(tmp_path / "x.parquet", pictures(*[samples[0][1]] * 3), texts)))
    first, second, third = source.rows()
    assert source.target(first) == source.target(third) == "good"
    with pytest.raises(RefusedSample, match="text is not UTF-8"):
        source.target(second)


def test_a_dropped_connection_is_resumed(server, parquet_folder, caplog):
    source = open_source(server.url("parquet/part-{0..3}.parquet"), image_column="picture", target_column="words")
    server.drops = ["part-0.parquet", "part-2.parquet", "part-2.parquet"]
    reported: list[tuple[str, str]] = []
    rows = read_rows(source.shards, Reader(0, 1), epoch=0, seed=None, report=lambda *each: reported.append(each))
    assert sorted(int(source.target(row)[:5]) for _, row in rows) == list(range(160))
    assert server.drops == [] and reported == [] and caplog.text.count("was interrupted") == 3


# -- what asks for much -----------------------------------------------------------------------------------------------


def in_a_child(function: Callable[[], Any]) -> tuple[Any, int]:
    """Runs a function in a separate process; returns its result and the rise of its peak memory in bytes."""

    def run(connection) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = peak()
        connection.send((function(), peak() - before))

    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=run, args=(theirs,))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        child.join()


def peak() -> int:
    with open("/proc/self/status") as file:
        return 1024 * int(file.read().split("VmHWM:")[1].split()[0])


def read_most(file, most=200) -> tuple[list[str], list[str], int]:
    """Reads a file; returns captions or refusals, damage, and the number of threads behind it."""
    problems: list[str] = []
    found: list[str] = []
    for _, row in ParquetShards([str(file)]).select("image", "caption").read(0, 0, None, problems.append):
        found.append(next((each.reason for each in row.values() if isinstance(each, RefusedSample)), "read"))
        if len(found) == most:
            break
    return found, problems, len(os.listdir("/proc/self/task"))


def zeros_in_one_cell(path):
    write(path, pictures(*[b"small"] * 20, bytes(400 * 2**20)), compression="zstd")


def zeros_in_one_cell_without_a_dictionary(path):
    write(path, pictures(*[b"small"] * 20, bytes(400 * 2**20)), compression="zstd", use_dictionary=False)


def many_large_cells(path):
    write(path, pictures(*[bytes(30 * 2**20)] * 20), compression="zstd", use_dictionary=False)


def one_large_cell_in_every_row(path):
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array([os.urandom(2**24)]))
    write(path, image, ["x"] * 10_000, store_schema=False)


def one_large_text_in_lists(path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["a" * 2**20]))
    lists = pa.ListArray.from_arrays(pa.array([0, 100_000, 100_000], pa.int32()), texts)
    write(path, pictures(b"a", b"b"), lists, store_schema=False)


def a_list_of_nothing(path):
    lists = pa.ListArray.from_arrays(pa.array([0, 5 * 10**7, 5 * 10**7], pa.int32()), pa.nulls(5 * 10**7, pa.string()))
    write(path, pictures(b"a", b"b"), lists)


def cells_that_share_their_beginning(path):
    cells = pictures(*(b"x" * 2**20 + bytes([n % 256]) for n in range(1000)))
    plain = {"caption": "PLAIN", "image.path": "PLAIN"}
    write(path, cells, use_dictionary=False, column_encoding={"image.bytes": "DELTA_BYTE_ARRAY", **plain})


def a_cell_of_70_mib(path):
    write(path, pictures(b"a", os.urandom(70 * 2**20), b"b"), use_dictionary=False)


def a_footer_of_4_gib(path):
    with open(path, "wb") as file:
        file.truncate(2**32)
        file.write(b"PAR1")
        file.seek(2**32 - 8)
        file.write(struct.pack("<I", 2**32 - 100) + b"PAR1")


REFUSED = ([], ["oversized row group"])
HOSTILE = {
    zeros_in_one_cell: REFUSED,
    zeros_in_one_cell_without_a_dictionary: REFUSED,
    many_large_cells: REFUSED,
    one_large_cell_in_every_row: (["read"] * 20, []),
    one_large_text_in_lists: (["oversized file", "read"], []),
    a_list_of_nothing: REFUSED,
    cells_that_share_their_beginning: (["read"] * 20, []),
    a_cell_of_70_mib: (["read", "oversized file", "read"], []),
}


@pytest.mark.parametrize(("make", "expected"), HOSTILE.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_no_file_takes_more_memory_than_sound_ones(make, expected, tmp_path):
    file = tmp_path / "x.parquet"
    in_a_child(lambda: make(file))  # to make some takes as much memory as to read them
    (found, problems, threads), memory = in_a_child(lambda: read_most(file, most=20))
    assert (found, problems) == expected
    assert memory < 500 * 2**20
    assert threads == 1


def test_a_footer_of_gigabytes_is_not_read(tmp_path):
    a_footer_of_4_gib(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="the footer of the parquet file has 4,294,967,196 bytes"):
        ParquetShards([str(tmp_path / "x.parquet")])


def test_a_footer_that_lies_moves_no_limit(tmp_path):
    """It says that cells have a byte each, and that there are more rows than there are."""
    file = tmp_path / "x.parquet"
    in_a_child(lambda: zeros_in_one_cell_without_a_dictionary(file))
    data = file.read_bytes()
    size = pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size

    def varint(number: int, length: int) -> bytes:
        return bytes((number >> 7 * n & 127) | (128 if n < length - 1 else 0) for n in range(length))

    length = next(n for n in range(1, 9) if 2 * size < 2 ** (7 * n))
    assert data.count(varint(2 * size, length)) >= 1
    file.write_bytes(data.replace(varint(2 * size, length), varint(2 * 100, length)))
    assert pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size == 100
    (found, problems, _), memory = in_a_child(lambda: read_most(file))
    assert (found, problems) == ([], ["oversized row group"]) and memory < 500 * 2**20
    sound = write(tmp_path / "y.parquet", pictures(*[b"a"] * 30)).read_bytes()
    (tmp_path / "y.parquet").write_bytes(sound.replace(b"\x16\x3c", b"\x16\x7c"))
    rows, problems = read(ParquetShards([str(tmp_path / "y.parquet")]))
    assert len(rows) <= 30 and problems in (["truncated row group"], ["damaged row group"])


def test_a_row_group_of_photos_is_read_in_pieces(tmp_path):
    """200 cells of 300 kB in one row group: 60 MB, of which the page is in memory once, and a few rows."""
    file = tmp_path / "x.parquet"
    in_a_child(lambda: write(file, pictures(*(os.urandom(300_000) for _ in range(200))), data_page_size=2**20) and None)
    (found, problems, _), memory = in_a_child(lambda: read_most(file))
    assert found == ["read"] * 200 and problems == [] and memory < 250 * 2**20


def test_a_schema_cannot_repeat_a_long_name(tmp_path):
    """Arrow writes out the path of every column: here 4,000 times 20,000 characters."""
    inner = pa.struct([(f"{n}", pa.int8()) for n in range(4000)])
    pq.ParquetWriter(tmp_path / "x.parquet", pa.schema({"a" * 20_000: inner}), store_schema=False).close()
    with pytest.raises(ValueError, match="schema of the parquet file is too large"):
        ParquetShards([str(tmp_path / "x.parquet")])
