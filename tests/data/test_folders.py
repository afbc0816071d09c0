"""Splits and configurations of local folders as a user meets them, an unknown one being an error that lists them."""

import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset

from flip_hf.data.sources import open_source
from tests.conftest import shapes_rows
from tests.data.conftest import write_tar

ROWS = shapes_rows(6)
README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: a/*}
  - {split: test, path: b/*}
- config_name: swapped
  data_files:
  - {split: train, path: b/*}
  - {split: test, path: a/*}
---
"""


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        write_tar(path, [(f"{n}", row["image"]["bytes"], row["caption"].encode()) for n, row in enumerate(rows)])
    elif path.suffix == ".parquet":
        captions = [row["caption"] for row in rows]
        pq.write_table(pa.table({"image": [row["image"] for row in rows], "caption": captions}), path)
    else:
        for number, row in enumerate(rows):
            (path / str(number % 2)).mkdir(parents=True, exist_ok=True)
            (path / str(number % 2) / f"{path.name}{number}.png").write_bytes(row["image"]["bytes"])


def captions(folder, **kwargs) -> list[str]:
    source = open_source(str(folder), **kwargs)
    return sorted(value if isinstance(value, str) else value.decode() for value in map(source.target, source.rows()))


def expected(rows) -> list[str]:
    return sorted(row["caption"] for row in rows)


NAMES = {
    "a cloned repository": ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    "files at the top": ("train.parquet", "test.parquet"),
    "folders of shards": ("train/0.tar", "test/0.tar"),
    "names with numbers": ("train-000.tar", "eval-000.tar"),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_the_splits_of_a_folder_are_those_that_datasets_finds(tmp_path, names):
    for name, rows in zip(names, (ROWS[:4], ROWS[4:]), strict=True):
        write(tmp_path / "data" / name, rows)
    folder = tmp_path / "data"
    assert captions(folder, split="train") == expected(ROWS[:4])
    assert captions(folder, split="test") == expected(ROWS[4:])
    if names[0].endswith(".parquet"):
        assert expected(load_dataset(str(folder), split="test")) == expected(ROWS[4:])
    with pytest.raises(ValueError, match="has no split 'validation', only: (train, test|test, train)"):
        open_source(str(folder), split="validation")


def test_the_readme_of_a_folder_tells_its_splits_and_configurations(tmp_path):
    write(tmp_path / "a" / "x.parquet", ROWS[:4])
    write(tmp_path / "b" / "y.parquet", ROWS[4:])
    assert captions(tmp_path, split="train") == expected(ROWS)  # nothing tells of splits yet
    (tmp_path / "README.md").write_text(README)
    assert captions(tmp_path, split="train") == expected(ROWS[:4])
    assert captions(tmp_path, split="train", config="swapped") == expected(ROWS[4:])
    with pytest.raises(ValueError, match="only: (train, test|test, train)"):
        open_source(str(tmp_path), split="dev")
    with pytest.raises(ValueError, match="no configuration 'other', only: default, swapped"):
        open_source(str(tmp_path), config="other")
    (tmp_path / "README.md").write_text("no yaml")
    with pytest.raises(ValueError, match="no configuration 'other', only: none"):
        open_source(str(tmp_path), config="other")


@pytest.mark.parametrize("pattern", ["../b/*", "/etc/*", "https://example.com/x.parquet", "a/../../b/*"])
def test_a_readme_names_files_of_its_own_folder_alone(tmp_path, pattern):
    write(tmp_path / "d" / "a" / "x.parquet", ROWS[:4])
    write(tmp_path / "b" / "y.parquet", ROWS[4:])
    (tmp_path / "d" / "README.md").write_text(README.replace("a/*", pattern))
    with pytest.raises(ValueError, match="for its split 'train', and no such file is in the folder"):
        open_source(str(tmp_path / "d"))


def test_an_unreadable_readme_is_named(tmp_path):
    write(tmp_path / "x.parquet", ROWS)
    (tmp_path / "README.md").write_text("---\nconfigs: [: }\n---\n")
    with pytest.raises(ValueError, match="README.md cannot be read"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["0.tar", "0.parquet", "images"])
def test_a_folder_that_tells_of_no_splits_is_train_or_what_its_own_name_says(tmp_path, name):
    write(tmp_path / "heldout" / name, ROWS)
    kind = "image" if name == "images" else "caption"
    for split in ("train", "heldout"):
        assert len(list(open_source(str(tmp_path / "heldout"), split=split, kind=kind).rows())) == 6
    with pytest.raises(ValueError, match="has no split 'test', only: train"):
        open_source(str(tmp_path / "heldout"), split="test", kind=kind)


def test_image_folders_list_their_splits(tmp_path):
    write(tmp_path / "train", ROWS[:4])
    write(tmp_path / "test", ROWS[4:])
    assert len(list(open_source(str(tmp_path), split="test", kind="label").rows())) == 2
    with pytest.raises(ValueError, match="has no split 'validation', only: (train, test|test, train)"):
        open_source(str(tmp_path), split="validation", kind="label")


def test_what_was_saved_knows_its_splits(tmp_path):
    def table(rows):
        return Dataset.from_dict({"image": [row["image"] for row in rows], "caption": expected(rows)})

    DatasetDict(train=table(ROWS[:4]), test=table(ROWS[4:])).save_to_disk(tmp_path / "both")
    assert captions(tmp_path / "both", split="test") == expected(ROWS[4:])
    with pytest.raises(ValueError, match="only: (train, test|test, train)"):
        open_source(str(tmp_path / "both"), split="dev")
    table(ROWS).save_to_disk(tmp_path / "one")
    assert captions(tmp_path / "one") == expected(ROWS)
    with pytest.raises(ValueError, match="only: train"):
        open_source(str(tmp_path / "one"), split="test")
    write(tmp_path / "x" / "train.parquet", ROWS)
    load_dataset(str(tmp_path / "x"), split="train").save_to_disk(tmp_path / "named")
    with pytest.raises(ValueError, match="only: train"):
        open_source(str(tmp_path / "named"), split="test")


def test_shards_of_no_split_are_named(tmp_path, caplog):
    for name in ("train-0.tar", "more-1.tar"):
        write(tmp_path / name, ROWS[:2])
    with caplog.at_level(logging.WARNING):
        assert captions(tmp_path) == expected(ROWS[:2])
    assert f"1 files in {tmp_path} are of no split, and left out; the first is more-1.tar" in caplog.text


def test_shards_keep_their_order_and_names(tmp_path, monkeypatch):
    """As before splits were looked for: a resumed run and its seed depend on both."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.tar", "a.tar", "c/d.tar"):
        write(tmp_path / "link to" / name, ROWS[:2])
    os.symlink("link to", "shards")
    assert open_source("shards").shards.urls == ("shards/a.tar", "shards/b.tar", "shards/c/d.tar")  # pyright: ignore
