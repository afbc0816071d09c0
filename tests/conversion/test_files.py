"""Files of checkpoints that lie elsewhere, are no files, or inflate to more than belongs there."""

import gzip
import json
import os
import shutil
import stat
import zipfile

import msgpack
import pytest
import torch

from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.files import Files, ZipFiles, parse_json, read_file
from flip_hf.conversion.official import read_official
from tests.helpers.bounded import outcome
from tests.helpers.fixtures import HEADS

KERNEL = "target.img_mlp1.kernel"
EXPANDED = 1 << 29


def test_a_chunk_that_is_a_link_out_of_the_checkpoint_is_not_read(official_folder, tmp_path):
    chunk = official_folder / KERNEL / "0.0"
    shutil.move(chunk, tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConversionError, match=r"0\.0 is a link to .*elsewhere, outside the checkpoint's folder"):
        read_official(official_folder, **HEADS)


@pytest.mark.parametrize("name", [KERNEL, "checkpoint", f"{KERNEL}/.zarray"])
def test_other_links_out_of_the_checkpoint_are_not_followed(official_folder, tmp_path, name):
    shutil.move(official_folder / name, tmp_path / "elsewhere")
    (official_folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConversionError, match="is a link to .*elsewhere"):
        read_official(official_folder, **HEADS)


def test_links_inside_the_checkpoint_are_followed(official_folder, official_zip):
    chunk = official_folder / KERNEL / "0.0"
    shutil.move(chunk, official_folder / "kept")
    chunk.symlink_to(official_folder / "kept")
    pairs = zip(
        read_official(official_folder, **HEADS).state_dict().values(),
        read_official(official_zip, **HEADS).state_dict().values(),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(b"weights")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "file").symlink_to("../../blobs/0123")
    assert read_file(snapshot / "file", 100, root=snapshot) == b"weights"
    (tmp_path / "other").write_bytes(b"")
    (snapshot / "more").symlink_to("../../other")
    with pytest.raises(ConversionError, match="outside the checkpoint's folder"):
        read_file(snapshot / "more", 100, root=snapshot)


def test_a_pipe_is_not_waited_for(official_folder):
    (official_folder / KERNEL / "0.0").unlink()
    os.mkfifo(official_folder / KERNEL / "0.0")
    assert "is a pipe" in outcome(lambda: read_official(official_folder, **HEADS))


def test_links_in_a_circle_and_folders_are_no_files(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    files = Files(tmp_path)
    assert "cannot be opened" in files.refused["circle"] and not files.sizes
    with pytest.raises(ConversionError, match="is a folder"):
        read_file(tmp_path / "folder", 10)


def rezipped(folder, path, *, replace=None):
    """The checkpoint as a zip, with other bytes for members whose names end so."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder.parent).as_posix()
            if replace is not None and name.endswith(replace[0]):
                archive.writestr(name, replace[1])
            elif file.is_file():
                archive.write(file, name)
    return path


def test_a_chunk_of_a_zip_is_measured_before_it_is_inflated(official_folder, tmp_path):
    path = tmp_path / "large.zip"
    rezipped(official_folder, path, replace=(f"{KERNEL}/0.0", bytes(EXPANDED)))
    assert path.stat().st_size < 2 * EXPANDED / 200
    assert "inflates to 536,870,912 bytes, but at most" in outcome(lambda: read_official(path, **HEADS), megabytes=256)


def test_a_structure_of_a_zip_is_measured_before_it_is_inflated(official_folder, tmp_path):
    """A megabyte of it was read as a gigabyte of zeros, and copied twice."""
    array = msgpack.ExtType(1, msgpack.packb(([1 << 25], "float32", bytes(1 << 27))))
    structure = msgpack.packb({"optimizer": {"target": {"logit_scale": array}}})
    path = rezipped(official_folder, tmp_path / "large.zip", replace=("/checkpoint", structure))
    assert "bytes, more than any checkpoint's structure" in outcome(lambda: read_official(path, **HEADS), megabytes=64)


def test_arrays_that_hold_no_more_than_zeros_do_not_fill_the_memory(official_folder):
    """Half a gigabyte by every description, in a few megabytes of chunk."""
    folder = official_folder / "target.txt_encoder.token_embedding.embedding"
    shape = [EXPANDED // 256, 64]
    meta = json.loads((folder / ".zarray").read_text()) | {"shape": shape, "chunks": shape}
    (folder / ".zarray").write_text(json.dumps(meta))
    (folder / "0.0").write_bytes(gzip.compress(bytes(EXPANDED), 1))
    assert "do not compress like that" in outcome(lambda: read_official(official_folder, **HEADS), megabytes=256)


def test_a_chunk_is_not_larger_than_its_array(official_folder):
    path = official_folder / KERNEL / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunks": [96_000, 48_000]}))
    with pytest.raises(ConversionError, match="a kind of array that T5X does not write"):
        read_official(official_folder, **HEADS)


@pytest.mark.parametrize("end", ["cut", "more"])
def test_a_chunk_ends_with_its_stream(official_folder, end):
    chunk = official_folder / KERNEL / "0.0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-4] if end == "cut" else data + b"x")
    with pytest.raises(ConversionError, match="has no end, or something follows it"):
        read_official(official_folder, **HEADS)


def member(name, *, mode=0, method=zipfile.ZIP_STORED):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.compress_type = method
    return info


def test_a_zip_with_a_link_in_it_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(member("checkpoint", mode=stat.S_IFLNK | 0o777), "/etc/passwd")
    with pytest.raises(ConversionError, match="a link or a device: 'checkpoint'"):
        ZipFiles(tmp_path / "link.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["a/checkpoint", "./a//checkpoint"])
def test_a_zip_with_two_members_of_one_name_is_refused(tmp_path, second):
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a/checkpoint", b"1")
        archive.writestr(second, b"2")
    with pytest.raises(ConversionError, match="two members named 'a/checkpoint'"):
        ZipFiles(tmp_path / "twice.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_of_unbounded_inflation_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member("checkpoint", method=method), bytes(10**6))
    with pytest.raises(ConversionError, match="neither stored nor deflated"):
        ZipFiles(tmp_path / "a.zip").read("checkpoint", 10**6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "levels"),
        (b"[]", "holds list"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b"\xff", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
    ],
)
def test_json_that_describes_nothing_is_refused(data, message):
    with pytest.raises(ConversionError, match=message):
        parse_json(data, "config.json")
