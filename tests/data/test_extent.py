"""What is known of data without reading them."""

import shutil

import pytest

from flip_hf.data.extent import shared_file
from flip_hf.data.sources import open_source
from tests.helpers.labelled import labelled_pictures

COLOUR_FOLDERS = ("red", "blue")


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        labelled_pictures(3).to_parquet(str(tmp_path / "tables" / f"{split}.parquet"))
        for name in COLOUR_FOLDERS:
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            labelled_pictures(1)[0]["img"].save(tmp_path / "pictures" / split / name / "0.png")
    shutil.copy(tmp_path / "tables" / "train.parquet", tmp_path / "copy.parquet")
    (tmp_path / "link.parquet").symlink_to(tmp_path / "tables" / "train.parquet")
    return tmp_path


def opened(path, split=None):
    return open_source(str(path), split=split, kind="image").shards


@pytest.mark.parametrize("form", ["tables", "pictures"])
def test_splits_share_no_file_and_one_shares_its_own(folder, form):
    train, test = (opened(folder / form, split) for split in ("train", "test"))
    assert shared_file(train, test) is None
    assert shared_file(train, opened(folder / form / "train" if form == "pictures" else folder / form, "train"))


def test_a_link_is_the_same_file_and_a_copy_is_not(folder):
    table = opened(folder / "tables" / "train.parquet")
    assert shared_file(opened(folder / "link.parquet"), table) == str(folder / "link.parquet")
    assert shared_file(opened(folder / "copy.parquet"), table) is None
