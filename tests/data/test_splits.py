"""Splits of a folder are those that `datasets` finds, and an unknown one is an error."""

import io
import tarfile

import fsspec
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

from flip_hf.data.sources import open_source
from flip_hf.data.splits import find_splits, list_folder
from tests.helpers.pairs import write_tar

LAYOUTS = [
    ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
    ("data/big_split-00000-of-00001.parquet", "data/train-00000-of-00001-0a1b.parquet", "extra.parquet"),
    ("train.parquet", "test.parquet"),
    ("train/0.tar", "train/1.tar", "test/0.tar"),
    ("my-train.tar", "a/val_1.tar", "dev.tar", "evaluation.2.tar"),
    ("a/train/x/0.tar", "a/testing_2/0.tar", "valid/0.tar"),
    ("train_images/1.jpg", "test images/2.jpg"),
    ("0.tar", "1.tar"),
    ("trainer.tar", "contest.tar", "validated/0.tar"),
    ("train/test.tar", "test/train.tar"),
    ("Train/0.tar", "TEST.tar"),
    (".hidden/train.tar", "__MACOSX/test.tar", "0.tar"),
    ("README.md", "a/README.md", "data.tar"),
    ("dev/a.csv", "b.csv"),
]


def touch(folder, files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize("files", LAYOUTS, ids=lambda files: files[0])
def test_splits_are_those_that_datasets_finds(files, tmp_path):
    touch(tmp_path, files)
    found = find_splits(list_folder(str(tmp_path)))
    expected = DataFilesDict.from_patterns(get_data_patterns(str(tmp_path)), str(tmp_path))
    assert {name: sorted(str(tmp_path / file) for file in each) for name, each in found.items()} == {
        str(name): sorted(set(each)) for name, each in expected.items()
    }


def test_a_folder_with_links_is_listed_once(tmp_path):
    touch(tmp_path, ["a/0.tar", "b.tar", ".c.tar"])
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    assert list_folder(str(tmp_path)) == ["a/0.tar", "b.tar"]
    with pytest.raises(EmptyDatasetError):
        get_data_patterns(str(tmp_path / "none"))


def captions(folder, **options) -> list[str]:
    source = open_source(str(folder), **options)
    values = [source.target(row) for row in source.rows()]
    return sorted(value.decode() if isinstance(value, bytes) else value for value in values)


def table(samples) -> Dataset:
    columns = {"image": [{"bytes": s[1], "path": None} for s in samples], "caption": [s[2].decode() for s in samples]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "caption": Value("string")}))


def cloned(folder, train, test):
    table(train).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    table(test).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))


def tars(folder, train, test):
    for name, each in (("train", train), ("test", test)):
        (folder / name).mkdir(parents=True)
        write_tar(folder / name / "0.tar", each)


def top(folder, train, test):
    table(train).to_parquet(str(folder / "train.parquet"))
    table(test).to_parquet(str(folder / "test.parquet"))


def saved(folder, train, test):
    DatasetDict({"train": table(train), "test": table(test)}).save_to_disk(str(folder))


def beside(folder, train, test):
    for name, each in (("train", train), ("test", test)):
        (folder / name).mkdir(parents=True)
        for key, image, caption in each:
            (folder / name / f"{key}.jpg").write_bytes(image)
            (folder / name / f"{key}.txt").write_bytes(caption)


def described(folder, train, test):
    table(train).to_parquet(str(folder / "a" / "x.parquet"))
    table(test).to_parquet(str(folder / "b" / "x.parquet"))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*\n"
        "  - split: test\n    path: [b/*]\n- config_name: swapped\n  data_dir: b\n---\n# Data\n"
    )


@pytest.mark.parametrize("write", [cloned, tars, top, saved, beside, described], ids=lambda write: write.__name__)
def test_each_split_has_its_own_rows_and_an_unknown_one_is_an_error(write, samples, tmp_path):
    train = samples[:9]
    test = samples[20:25]
    write(tmp_path / "data", train, test)
    assert captions(tmp_path / "data") == [caption.decode() for _, _, caption in train]
    assert captions(tmp_path / "data", split="test") == [caption.decode() for _, _, caption in test]
    with pytest.raises(ValueError, match="has no split 'validation', only: (train, test|test, train)"):
        open_source(str(tmp_path / "data"), split="validation")
    with pytest.raises(ValueError, match="configuration.* 'nope'"):
        open_source(str(tmp_path / "data"), config="nope")


def test_a_configuration_of_a_card_is_read(samples, tmp_path):
    described(tmp_path, samples[:9], samples[20:25])
    assert captions(tmp_path, config="swapped") == [caption.decode() for _, _, caption in samples[20:25]]


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("configs:\n- config_name: x\n  data_files: ../*.parquet", "no such file is in the folder"),
        ("configs:\n- config_name: x\n  data_files: https://example.org/x.parquet", "no such file is in the folder"),
        ("configs:\n- config_name: x\n  data_files: /etc/passwd", "no such file is in the folder"),
        ("configs:\n- config_name: x\n  data_dir: ../other", "has no split 'train'"),
        ("configs:\n- config_name: x\n  columns: [image]", "asks for columns, which is not supported"),
        ("configs:\n- config_name: x\n- config_name: y", "has several configurations: x, y. Name one"),
        ("configs: 3", "has damaged configs"),
        ("configs: [", "cannot be read as the card"),
        ("configs: !!python/object/apply:os.system [true]", "cannot be read as the card"),
    ],
)
def test_a_card_names_files_of_its_folder_alone(card, message, samples, tmp_path):
    table(samples[:4]).to_parquet(str(tmp_path / "other" / "x.parquet"))
    table(samples[:4]).to_parquet(str(tmp_path / "data" / "x.parquet"))
    (tmp_path / "data" / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(ValueError, match=message) as caught:
        open_source(str(tmp_path / "data"))
    assert "\n" not in str(caught.value)


def test_undivided_data_are_train_and_other_splits_an_error(tar_folder, samples, tmp_path):
    with pytest.raises(ValueError, match="no split 'test', only: train. Nothing in it is named after a split"):
        open_source(str(tar_folder), split="test")
    assert len(captions(tar_folder, split=None)) == len(samples)
    assert len(captions(tar_folder / "*.tar", split="test")) == len(samples)  # files that are named are all read
    table(samples[:3]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="no split 'test', only: train"):
        open_source(str(tmp_path / "saved"), split="test")


def test_pictures_of_which_some_are_in_no_split_are_refused(samples, tmp_path):
    for name in ("a.jpg", "b.jpg", "test drive.jpg"):
        (tmp_path / name).write_bytes(samples[0][1])
    with pytest.raises(ValueError, match="2 of the 3 pictures .* are in no split, such as 'a.jpg'"):
        open_source(str(tmp_path), kind="image")


def test_classes_of_an_image_folder_have_one_number_in_all_splits(samples, tmp_path):
    """A class of which one split has no picture is numbered all the same."""
    for name in ("train/ant", "train/bee", "train/cat", "test/bee", "test/cat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(samples[0][1])
    source = open_source(str(tmp_path), split="test", kind="label")
    assert source.class_names == ("ant", "bee", "cat") and [source.target(row) for row in source.rows()] == [1, 2]


def test_shards_of_a_split_are_found_in_a_tar_by_name_too(samples, tmp_path):
    for name, each in (("pairs-train-0", samples[:3]), ("pairs-test-0", samples[3:5])):
        write_tar(tmp_path / f"{name}.tar", each)
    assert captions(tmp_path, split="test") == [caption.decode() for _, _, caption in samples[3:5]]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    (tmp_path / "train.tar.gz").write_bytes(packed.getvalue())
    assert set(find_splits(list_folder(str(tmp_path)))) == {"train", "test"}


@pytest.mark.parametrize("form", ["tars", "parquet", "pictures", "saved"])
def test_a_folder_without_splits_may_be_one_as_a_whole(form, samples, tmp_path):
    folder = tmp_path / "heldout"
    if form == "saved":
        table(samples[:3]).save_to_disk(str(folder))
    else:
        {"tars": tars, "parquet": cloned, "pictures": beside}[form](tmp_path / "made", samples[:3], samples[3:6])
        folder = (tmp_path / "made" / ("data" if form == "parquet" else "train")).rename(folder)
        for file in folder.glob("*.parquet"):
            file.rename(folder / "0.parquet") if "train" in file.name else file.unlink()
    assert len(captions(folder, split="heldout")) == len(captions(folder)) == 3
    with pytest.raises(ValueError, match="has no split 'test', only: train.*all of it is 'train'.*--test_split"):
        open_source(str(folder), split="test")


def test_shards_of_no_split_are_named(samples, tmp_path, caplog):
    for name in ("train-0.tar", "more-1.tar"):
        write_tar(tmp_path / name, samples[:2])
    assert len(captions(tmp_path)) == 2
    assert f"{tmp_path}: skipped 1 files that are in no split, such as more-1.tar" in caplog.text


def test_shards_keep_their_order_and_names(samples, tmp_path, monkeypatch):
    """A resumed run and its seed depend on both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked" / "c").mkdir(parents=True)
    for name in ("b.tar", "a.tar", "c/d.tar"):
        write_tar(tmp_path / "linked" / name, samples[:2])
    (tmp_path / "shards").symlink_to("linked")
    assert open_source("shards").shards.urls == ("shards/a.tar", "shards/b.tar", "shards/c/d.tar")  # pyright: ignore


def test_a_folder_that_is_a_url_has_splits_too(samples, tmp_path):
    tars(tmp_path / "data", samples[:9], samples[20:25])
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "data"), "/splits", recursive=True)
    try:
        assert len(captions("memory://splits")) == 9
        assert len(captions("memory://splits", split="test")) == 5
        assert len(captions("memory://splits", split=None)) == 14
        assert len(captions("memory://splits/test", split="test")) == 5
        with pytest.raises(ValueError, match="has no split 'validation', only: (train, test|test, train)"):
            open_source("memory://splits", split="validation")
    finally:
        memory.rm("/splits", recursive=True)
