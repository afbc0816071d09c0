"""`flip-hf data shard` writes what any source holds, shuffled, in shards that training reads back."""

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as Pillow

from flip_hf.commands import main
from flip_hf.curation.contents import read_contents
from flip_hf.data.sources import Source, open_source
from flip_hf.training.arguments import DataArguments
from flip_hf.training.inputs import open_training_data
from flip_hf.training.recipes import parse_arguments
from tests.helpers import damaged
from tests.helpers.pairs import write_tar
from tests.helpers.planted import write_planted

Rows = list[tuple[bytes, dict]]


def shard(data: object, out: Path, *more: object) -> dict:
    main.main(["data", "shard", *map(str, (data, out, "--workers", "0", *more))])
    return json.loads((out / "shards.json").read_text())


def failed(capsys, data: object, out: Path, *more: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        shard(data, out, *more)
    printed = capsys.readouterr().err
    assert end.value.code in (1, 2) and printed.startswith("error: ") and printed.count("\n") == 1
    return printed


def files(folder: Path) -> dict[str, str]:
    """Checksums of all files below a folder, hidden ones too."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def opened(data: object, **options) -> Source:
    (source,) = open_training_data(DataArguments(train_data=[str(data)], **options))
    return source


def rows_of(source: Source) -> list[tuple[bytes, tuple]]:
    """The images and what their columns of captions hold, in any order."""
    contents = [read_contents(row, source, 16) for row in source.rows()]
    return sorted((each.image, tuple(map(str, each.captions.values()))) for each in contents)


# -- sources -----------------------------------------------------------------------------------------------------------


def as_tar(samples, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_tar(folder / "a.tar", samples[:20])
    write_tar(folder / "b.tar", samples[20:])
    return folder


def as_parquet(samples, folder: Path) -> Path:
    rows = {"image": [{"bytes": image, "path": None} for _, image, _ in samples]}
    rows["text"] = [caption.decode() for _, _, caption in samples]
    Dataset.from_dict(rows, Features(image=Image(), text=Value("string"))).to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


def as_pairs(samples, folder: Path) -> Path:
    for key, image, caption in samples:
        (folder / f"{key}.jpg").write_bytes(image)
        (folder / f"{key}.txt").write_bytes(caption)
    return folder


def as_list(samples, folder: Path) -> Path:
    lines = [json.dumps({"file_name": f"{key}.jpg", "caption": caption.decode()}) for key, _, caption in samples]
    for key, image, _ in samples:
        (folder / f"{key}.jpg").write_bytes(image)
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def as_saved(samples, folder: Path) -> Path:
    rows = {"image": [{"bytes": image, "path": None} for _, image, _ in samples]}
    rows["caption"] = [[caption.decode(), "another"] for _, _, caption in samples]
    features = Features(image=Image(), caption=List(Value("string")))
    Dataset.from_dict(rows, features).save_to_disk(str(folder / "saved"))
    return folder / "saved"


SOURCES = [as_tar, as_parquet, as_pairs, as_list, as_saved]


@pytest.mark.parametrize("form", ["tar", "parquet"])
@pytest.mark.parametrize("write", SOURCES)
def test_shards_of_any_source_read_back_equal(write: Callable, form, samples, tmp_path):
    (tmp_path / "data").mkdir()
    data = write(samples[:30], tmp_path / "data")
    manifest = shard(data, tmp_path / "out", "--format", form, "--samples_per_shard", "12")
    assert [each["samples"] for each in manifest["shards"]] == [12, 12, 6]
    column = manifest["caption_column"]
    assert rows_of(opened(tmp_path / "out", caption_column=column and [column])) == rows_of(opened(data))


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_several_columns_keep_their_weights(form, samples, tmp_path):
    rows = {"image": [{"bytes": image, "path": None} for _, image, _ in samples[:9]]}
    rows["long"] = [[caption.decode(), "x"] for _, _, caption in samples[:9]]
    rows["label"] = [number % 2 for number in range(9)]
    features = Features(image=Image(), long=List(Value("string")), label=ClassLabel(names=["red", "blue"]))
    Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "a.parquet"))
    manifest = shard(tmp_path / "a.parquet", tmp_path / "out", "--format", form, "--caption_column", "long:3 label:1")
    names = [str(tmp_path / "out" / "classes.txt")] if form == "tar" else [None]
    source = opened(tmp_path / "out", caption_column=[manifest["caption_column"]], class_names=names[0])
    assert [column.weight for column in source.captions] == [3, 1]
    assert rows_of(source) == rows_of(opened(tmp_path / "a.parquet", caption_column=["long:3 label:1"]))


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_labels_keep_their_names_and_synonyms(form, samples, tmp_path):
    for number, (key, image, _) in enumerate(samples[:8]):
        folder = tmp_path / "data" / ("cats" if number % 2 else "hot_dogs")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.jpg").write_bytes(image)
    (tmp_path / "names").write_text("cats; kittens\nhot_dogs\n")
    more = ("--caption_column", "label", "--class_names", tmp_path / "names")
    manifest = shard(tmp_path / "data", tmp_path / "out", "--format", form, *more)
    assert manifest["class_names"] == "classes.txt"
    assert (tmp_path / "out" / "classes.txt").read_text() == "cats; kittens\nhot dogs\n"
    column = [manifest["caption_column"]]
    back = opened(tmp_path / "out", caption_column=column, class_names=str(tmp_path / "out" / "classes.txt"))
    named = opened(tmp_path / "data", caption_column=["label"], class_names=str(tmp_path / "names"))
    assert rows_of(back) == rows_of(named) and back.captions[0].labels.classes == named.captions[0].labels.classes


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_the_printed_options_train_on_the_shards_from_any_folder(form, samples, tmp_path, capsys):
    images = [{"bytes": image, "path": None} for _, image, _ in samples[:6]]
    rows = {"image": images, "label": [0, 1] * 3, "text": ["a", "b"] * 3}
    features = Features(image=Image(), label=ClassLabel(names=["cat", "dog's"]), text=Value("string"))
    Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "a.parquet"))
    given = {"caption_column": ["label:0.1234567 text:12345678"], "caption_templates": ["it's a {}", "{}"]}
    more = ("--caption_column", *given["caption_column"], "--caption_templates", *given["caption_templates"])
    shard(tmp_path / "a.parquet", tmp_path / "it's [1] & more", "--format", form, *more)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].split(": ", 1)[1])
    (back,) = open_training_data(parse_arguments(words, tmp_path, "none").data)
    before = opened(tmp_path / "a.parquet", **given)
    assert rows_of(back) == rows_of(before)
    assert [column.weight for column in back.captions] == [column.weight for column in before.captions]
    assert [column.labels and vars(column.labels)["templates"] for column in back.captions] == [
        given["caption_templates"],
        None,
    ]


def test_what_tar_shards_cannot_name_is_refused(samples, tmp_path, capsys):
    rows = {"image": [{"bytes": samples[0][1], "path": None}], "label": [0], "a.b": ["one"], "a_b": ["two"]}
    features = Features({"image": Image(), "label": ClassLabel(names=["x; y"]), "a.b": Value("string")})
    features["a_b"] = Value("string")
    Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "a.parquet"))
    for column, said in (("a.b:1 a_b:1", "would have one name in the shards: a_b, a_b"), ("label", "semicolon")):
        assert said in failed(capsys, tmp_path / "a.parquet", tmp_path / "out", "--caption_column", column)
        shard(tmp_path / "a.parquet", tmp_path / f"as {said[0]}", "--caption_column", column, "--format", "parquet")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("shards.json", "{}"),
        (".work/plan.json", "{}"),
        (".work/plan.json", "[" * 9999),
        (".work/spool/00000000-000000.arrow", "not a table"),
        (".work/spool/first.arrow", ""),
    ],
)
def test_what_others_have_left_is_refused_in_one_line(name, text, samples, tmp_path, capsys):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert f"{path} is damaged, or was not written" in failed(
        capsys, as_tar(samples[:4], tmp_path / "data"), tmp_path / "out"
    )


def test_a_spooled_table_of_others_is_refused(samples, tmp_path, capsys):
    path = tmp_path / "out" / ".work" / "spool" / "00000000-000000.arrow"
    path.parent.mkdir(parents=True)
    for about in ({}, {"progress": "[0, true, []]"}):
        table = pa.table({"image": [b""]}).replace_schema_metadata(about)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        assert "is damaged" in failed(capsys, as_tar(samples[:4], tmp_path / "data"), tmp_path / "out")


@pytest.fixture
def begun(samples, tmp_path, capsys) -> tuple[Path, Path, Path]:
    """Data of two shards, a folder of which the second could not be read, and the spool's file of the first."""
    data = as_tar(samples[:40], tmp_path / "data")
    (data / "b.tar").rename(tmp_path / "b")
    (data / "b.tar").write_bytes(b"too short")
    failed(capsys, data, tmp_path / "out")
    (tmp_path / "b").replace(data / "b.tar")
    (spooled,) = (tmp_path / "out" / ".work" / "spool").iterdir()
    return data, tmp_path / "out", spooled


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a file of the spool."""
    with pa.OSFile(str(path), "rb") as file:
        table = change(pa.ipc.open_file(file).read_all())
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def says(progress: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata({"progress": progress})


def holds(column: str, value: object) -> Callable[[pa.Table], pa.Table]:
    """Sets a value of the first row, and its checksum."""

    def change(table: pa.Table) -> pa.Table:
        first, *others = table.to_pylist()
        first[column] = value
        first["checksum"] = zlib.crc32(first["captions"].encode(), zlib.crc32(first["image"] or b""))
        return pa.Table.from_pylist([first, *others], table.schema)

    return change


@pytest.mark.parametrize(
    "change",
    [
        says('["0", true, []]'),
        says("[-1, true, []]"),
        says('[20, "yes", []]'),
        says("[20, true, [[1, 2]]]"),
        says("[" * 9999),
        holds("shard", 9),
        holds("row", None),
        holds("image", None),
        holds("extension", "/../../x"),
        holds("forms", "x"),
        holds("forms", "l"),
        holds("captions", "none"),
        holds("captions", "[1]"),
        holds("captions", '{"txt": "\\ud800"}'),
        holds("captions", '{"txt": {}}'),
    ],
)
def test_a_spool_of_others_is_refused_by_its_values(change, begun, capsys):
    data, out, spooled = begun
    rewrite(spooled, change)
    assert f"{spooled} is damaged" in failed(capsys, data, out)


def test_a_spool_that_was_cut_or_has_lost_a_file_is_refused(begun, capsys):
    data, out, spooled = begun
    whole = spooled.read_bytes()
    spooled.write_bytes(whole[: len(whole) // 2])
    assert f"{spooled} is damaged" in failed(capsys, data, out)
    spooled.write_bytes(whole[:2000] + bytes(2000) + whole[4000:])
    assert f"{spooled} is damaged" in failed(capsys, data, out)
    spooled.unlink()
    second = spooled.with_name("00000000-000001.arrow")
    second.write_bytes(whole)
    assert f"{second} is damaged" in failed(capsys, data, out)
    second.rename(spooled.with_name("00000007-000000.arrow"))
    assert "00000007-000000.arrow is damaged" in failed(capsys, data, out)


@pytest.mark.parametrize(
    "change",
    [
        {"made_of": []},
        {"parts": 0},
        {"parts": 1 << 40},
        {"parts": True},
        {"extent": 5},
        {"shard_bytes": {}},
    ],
)
def test_a_plan_of_other_values_is_refused(change, begun, capsys):
    data, out, _ = begun
    plan = out / ".work" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), **change}))
    assert f"{plan} is damaged" in failed(capsys, data, out)


@pytest.mark.parametrize("change", [{"samples": "many"}, {"shards": 5}, {"unusable": {"a": "b"}}, {"class_names": 5}])
def test_a_manifest_of_other_values_is_refused(change, samples, tmp_path, capsys):
    data = as_tar(samples[:4], tmp_path / "data")
    shard(data, tmp_path / "out")
    path = tmp_path / "out" / "shards.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert f"{path} is damaged" in failed(capsys, data, tmp_path / "out")


def test_facts_of_other_shards_are_refused_and_lost_shards_written_again(begun, capsys, monkeypatch):
    data, out, _ = begun
    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr("flip_hf.curation.sharding._write_unusable", raise_killed)
        shard(data, out, "--samples_per_shard", "2000")
    facts = out / ".work" / "shards" / "00000.json"
    whole = facts.read_text()
    for other in ({"name": "../x"}, {"samples": "40"}, {"bytes": -1}):
        facts.write_text(json.dumps({**json.loads(whole), **other}))
        assert f"{facts} is damaged" in failed(capsys, data, out)
    facts.write_text(whole)
    (out / "train-00000-of-00001.tar").write_bytes(b"cut")
    shard(data, out)
    assert len(rows_of(opened(out))) == 40


def raise_killed(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("name", ["plan.json", "spool", "shards", "run.lock", "spool/00000000-000000.arrow"])
def test_links_in_a_folder_of_others_are_not_followed(name, begun, tmp_path, capsys):
    data, out, _ = begun
    path = out / ".work" / name
    mine = tmp_path / "mine"
    path.rename(mine) if path.exists() else mine.write_text("precious")
    before = files(mine) if mine.is_dir() else mine.read_bytes()
    path.symlink_to(mine)
    said = failed(capsys, data, out)
    assert str(path) in said and ("is damaged" in said or "is a link" in said)
    assert (files(mine) if mine.is_dir() else mine.read_bytes()) == before


def test_a_link_in_the_place_of_an_unfinished_file_is_not_followed(samples, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out" / ".work" / "spool").mkdir(parents=True)
    (tmp_path / "out" / ".work" / ".plan.json.part.json").symlink_to(tmp_path / "mine")
    shard(as_tar(samples[:4], tmp_path / "data"), tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "precious"


def test_nothing_behind_a_link_is_removed(samples, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "out" / ".work").symlink_to(tmp_path / "mine")
    assert ".work is a link" in failed(capsys, as_tar(samples[:4], tmp_path / "data"), tmp_path / "out")


def test_images_alone(samples, tmp_path):
    (tmp_path / "data").mkdir()
    for key, image, _ in samples[:5]:
        (tmp_path / "data" / f"{key}.jpg").write_bytes(image)
    manifest = shard(tmp_path / "data", tmp_path / "out", "--images_alone")
    source = open_source(str(tmp_path / "out"), kind="image")
    assert manifest["samples"] == 5 and sorted(row["jpg"] for row in source.rows()) == sorted(s[1] for s in samples[:5])


def test_datasets_reads_the_parquet_shards_itself(samples, tmp_path):
    data = as_parquet(samples[:10], tmp_path)
    shard(data, tmp_path / "out", "--format", "parquet", "--samples_per_shard", "4")
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 10 and rows.column_names == ["image", "text"] and rows[0]["image"].mode == "RGB"


# -- what is in the shards ---------------------------------------------------------------------------------------------


def test_the_manifest_says_what_is_there(samples, tmp_path):
    manifest = shard(as_tar(samples[:30], tmp_path / "data"), tmp_path / "out", "--samples_per_shard", "20")
    for each in manifest["shards"]:
        path = tmp_path / "out" / each["name"]
        assert each["bytes"] == path.stat().st_size
        assert each["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        with tarfile.open(path) as archive:
            assert len(archive.getnames()) == 2 * each["samples"]
            assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "shards.json",
        "train-00000-of-00002.tar",
        "train-00001-of-00002.tar",
        "unusable.json",
    ]


def test_the_order_is_of_all_samples_and_of_the_seed(samples, tmp_path):
    data = as_tar(samples[:40], tmp_path / "data")
    orders = []
    for seed in (0, 0, 1):
        shard(data, tmp_path / f"out{len(orders)}", "--seed", seed, "--samples_per_shard", "10")
        orders.append([row["txt"] for row in opened(tmp_path / f"out{len(orders)}").rows()])
    places = [int(text[:5]) for text in orders[0]]
    assert orders[0] == orders[1] != orders[2] and sorted(places) == list(range(40))
    assert abs(np.corrcoef(places, range(40))[0, 1]) < 0.5 and {number // 20 for number in places[:10]} == {0, 1}


def test_large_images_are_reduced_and_others_stay_as_they_are(tmp_path):
    sizes = [(64, 128), (300, 40), (50, 40), (90, 90)]
    written = []
    for number, size in enumerate(sizes):
        buffer = io.BytesIO()
        Pillow.new("RGB", size, (200, 60, 10 * number)).save(buffer, "PNG")
        written.append((f"{number:03d}", [("png", buffer.getvalue()), ("txt", f"{number}".encode())]))
    (tmp_path / "a.tar").write_bytes(damaged.shard(written))
    shard(tmp_path / "a.tar", tmp_path / "out", "--resize", "48", "--quality", "80")
    found = {int(row["txt"]): row for row in opened(tmp_path / "out").rows()}
    for number, size in enumerate([(48, 96), None, None, (48, 48)]):
        if size is None:
            assert found[number]["png"] == written[number][1][0][1]
        else:
            with Pillow.open(io.BytesIO(found[number]["jpg"])) as image:
                assert (image.format, image.size) == ("JPEG", size)


def test_an_image_that_is_too_long_for_a_jpeg_stays_as_it_is(tmp_path):
    buffer = io.BytesIO()
    Pillow.new("RGB", (80_000, 9)).save(buffer, "PNG")
    (tmp_path / "a.tar").write_bytes(damaged.shard([("0", [("png", buffer.getvalue()), ("txt", b"long")])]))
    assert shard(tmp_path / "a.tar", tmp_path / "out", "--resize", "8")["samples"] == 1
    assert next(opened(tmp_path / "out").rows())["png"] == buffer.getvalue()


def test_unusable_samples_are_left_out_counted_and_listed(tmp_path):
    (tmp_path / "data").mkdir()
    planted = write_planted(tmp_path / "data", 4, 60, 6, 0, 0)
    manifest = shard(tmp_path / "data", tmp_path / "out")
    assert manifest["samples"] == planted.usable and manifest["unusable"] == planted.refused
    assert manifest["damage"] == +planted.damage
    listed = json.loads((tmp_path / "out" / "unusable.json").read_text())
    assert len(listed) == planted.refused.total() and set(listed[0]) == {"shard", "row", "key", "refused"}


def test_duplicates_that_a_check_has_found_are_left_out(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    planted = write_planted(data, 3, 40, 2, 4, 3)
    main.main(["data", "check", str(data), str(tmp_path / "check"), "--seconds", "0", "--workers", "0"])
    expected = 0
    for kind, found in (("pair", planted.pairs), ("image", planted.images), ("near", planted.near)):
        expected += len(found)
        manifest = shard(data, tmp_path / kind, "--without", tmp_path / "check", "--duplicates", kind)
        assert manifest["left_out"] == expected and manifest["samples"] == planted.usable - expected
    with (data / "0000.tar").open("ab") as file:
        file.write(bytes(512))  # as many samples, and perhaps others
    said = failed(capsys, data, tmp_path / "out", "--without", tmp_path / "check", "--duplicates", "near")
    assert "is a check of other data (bytes: " in said
    (data / "0000.tar").unlink()
    said = failed(capsys, data, tmp_path / "out", "--without", tmp_path / "check", "--duplicates", "near")
    assert "is a check of other data (shards: 3 then, 2 now; files: 3 then, 2 now; bytes: " in said


def test_images_of_evaluation_data_that_a_check_has_found_are_left_out(samples, tmp_path, capsys):
    data = as_tar(samples[:30], tmp_path / "data") / "a.tar"
    write_tar(tmp_path / "eval.tar", [*samples[:2], *samples[40:44]])
    checked = ("data", "check", str(data), str(tmp_path / "check"), "--seconds", "0", "--workers", "0")
    main.main([*checked, "--eval_data", str(tmp_path / "eval.tar")])
    manifest = shard(data, tmp_path / "out", "--without", tmp_path / "check", "--overlap", "image")
    assert (manifest["left_out"], manifest["samples"]) == (2, 18)
    assert "2 left out (overlap)" in capsys.readouterr().out
    left = {caption for _, (caption,) in rows_of(opened(tmp_path / "out"))}
    assert left == {caption.decode() for _, _, caption in samples[2:20]}
    main.main([*checked, "--eval_data", str(data)])
    said = failed(capsys, data, tmp_path / "none", "--without", tmp_path / "check", "--overlap", "image")
    assert "All 20 usable samples of" in said
    main.main([*checked])
    said = failed(capsys, data, tmp_path / "other", "--without", tmp_path / "check", "--overlap", "near")
    assert "is a check without evaluation data: run `flip-hf data check` with --eval_data." in said


# -- interruptions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files(monkeypatch):
    """Many files in the spool, so that there is much to go on with."""
    monkeypatch.setattr("flip_hf.curation.dealing.FILE_ROWS", 7)


class Killed(BaseException):
    """Stands for the end of the process, at a place of our choice."""


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_command_goes_on_after_any_file_that_it_has_written(form, tmp_path, monkeypatch):
    """Not at a random time: after every single write of a small data set. Real kills are in `test_shard_kills.py`."""
    (tmp_path / "data").mkdir()
    write_planted(tmp_path / "data", 2, 40, 4, 2, 0)
    # Damage that is seen again by whoever goes on behind it.
    early = [("0", damaged.damaged(damaged.KINDS - 1, 0)[0]), *((f"{row}", damaged.good(row)) for row in range(1, 25))]
    (tmp_path / "data" / "early.tar").write_bytes(damaged.shard(early))
    more = ("--format", form, "--samples_per_shard", "30", "--resize", "20")
    shard(tmp_path / "data", tmp_path / "whole", *more)
    replace = os.replace
    kills = 0
    while not (tmp_path / "out" / "shards.json").exists():
        left = iter(range(1 + kills % 2))

        def replace_or_die(source, target, left=left):
            if next(left, None) is None:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            patched.setattr(os, "replace", replace_or_die)
            shard(tmp_path / "data", tmp_path / "out", *more)
        kills += 1
    assert kills > 15
    shard(tmp_path / "data", tmp_path / "out", *more)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_files")
def test_any_number_of_processes_writes_the_same(tmp_path):
    (tmp_path / "data").mkdir()
    write_planted(tmp_path / "data", 3, 40, 4, 2, 0)
    outs = [tmp_path / str(workers) for workers in (0, 1, 2, 5)]
    for out in outs:
        shard(tmp_path / "data", out, "--samples_per_shard", "25", "--workers", out.name)
    assert all(files(out) == files(outs[0]) for out in outs)


def test_one_file_is_read_by_several_processes(samples, tmp_path):
    data = as_parquet(samples[:40], tmp_path)
    for workers in (0, 3):
        shard(data, tmp_path / str(workers), "--workers", workers)
    assert files(tmp_path / "3") == files(tmp_path / "0")


def test_a_shard_that_cannot_be_read_is_no_loss_in_silence(samples, tmp_path, capsys):
    data = as_tar(samples[:40], tmp_path / "data")
    (data / "b.tar").rename(tmp_path / "b")
    (data / "b.tar").write_bytes(b"too short")
    said = failed(capsys, data, tmp_path / "out")
    assert "1 shard could not be read to the end, such as" in said and "--skip_unreadable" in said
    shutil.copytree(tmp_path / "out", tmp_path / "skipped")
    manifest = shard(data, tmp_path / "skipped", "--skip_unreadable")
    assert manifest["samples"] == 20 and manifest["damage"] == {"unreadable shard": 1}
    (tmp_path / "b").replace(data / "b.tar")
    assert shard(data, tmp_path / "out")["samples"] == 40


def test_data_that_have_changed_since_are_not_mixed_with_what_was_read(begun, samples, capsys):
    data, out, _ = begun
    with (data / "a.tar").open("ab") as file:
        file.write(bytes(512))  # as many shards, and perhaps other samples
    size = (data / "a.tar").stat().st_size
    said = failed(capsys, data, out)
    assert f"was begun with data that have changed since ({data}/a.tar: {size - 512} then, {size} now)" in said
    write_tar(data / "a.tar", samples[:20])
    assert shard(data, out)["samples"] == 40  # the shard that could not be read may have changed
    write_tar(data / "b.tar", samples[20:35])
    assert "have changed since (bytes: " in failed(capsys, data, out)


def test_folders_of_pictures_that_have_changed_since_are_not_mixed_with_what_was_read(samples, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    data = as_pairs(samples[:20], tmp_path / "data")
    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr("flip_hf.curation.sharding._write", raise_killed)
        shard(data, tmp_path / "out")
    as_pairs(samples[20:21], data)
    with pytest.raises(SystemExit, match=r"have changed since \(files: 20 then, 21 now; bytes: "):
        shard(data, tmp_path / "out")


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_other_options_in_the_same_folder_are_refused(samples, tmp_path, capsys):
    data = as_tar(samples[:8], tmp_path / "data")
    shard(data, tmp_path / "out")
    said = failed(capsys, data, tmp_path / "out", "--seed", "3")
    assert "has shards of another command: seed was 0, now 3" in said
    before = files(tmp_path / "out")
    shard(data, tmp_path / "out")  # says again what is there
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quality", "80"], "give --resize, too"),
        (["--duplicates", "near"], "goes together"),
        (["--overlap", "near"], "goes together"),
        (["--without", "nowhere"], "goes together"),
        (["--without", "nowhere", "--duplicates", "near"], "nowhere holds no readable check"),
        (["--samples_per_shard", "0"], "--samples_per_shard must be between 1 and"),
        (["--resize", "4"], "--resize must be between 8 and"),
        (["--background", "none"], "--background: "),
        (["--caption_column", "text"], "has no caption column 'text'"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(words, said, samples, tmp_path, capsys):
    assert said in failed(capsys, as_tar(samples[:4], tmp_path / "data"), tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_refused(samples, tmp_path, capsys):
    data = as_tar(samples[:4], tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    assert "is not empty" in failed(capsys, data, tmp_path / "out")


def test_shards_are_not_written_among_their_data(samples, tmp_path, capsys):
    data = as_tar(samples[:4], tmp_path / "data")
    for out in (data, data / "out"):
        assert "lies in the folder of the data" in failed(capsys, data, out)


def test_data_without_a_usable_sample_are_refused(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("0", b"none", b"text")])
    assert "can be used: 1 x not an image" in failed(capsys, tmp_path / "a.tar", tmp_path / "out")


def test_too_small_a_disk_is_refused_before_anything_is_read(samples, tmp_path, capsys, monkeypatch):
    data = as_tar(samples[:8], tmp_path / "data")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "has 0.0 GB free" in failed(capsys, data, tmp_path / "out")


def test_parquet_shards_have_small_row_groups(samples, tmp_path, monkeypatch):
    monkeypatch.setattr("flip_hf.curation.shard_files._GROUP_ROWS", 8)
    shard(as_tar(samples[:20], tmp_path / "data"), tmp_path / "out", "--format", "parquet")
    with pq.ParquetFile(tmp_path / "out" / "train-00000-of-00001.parquet") as file:
        groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    assert groups == [8, 8, 4]
