"""Paths in data: none is opened but those inside a folder that the user named, and nothing waits for a FIFO."""

import http.server
import itertools
import json
import os
import threading
import zipfile

import pytest
from datasets import Dataset

from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.files import MAX_FILE_BYTES, StoredFile, open_at, read_file
from flip_hf.data.paths import FilesBelow
from flip_hf.data.sources import open_source
from tests.helpers.loading import make_train_loader, numbers

OUTSIDE = "path outside the data folder"


def refused(loader) -> dict[str, int]:
    return next(iter(loader.counts["refused"].values()), {})


@pytest.fixture
def server():
    """(its address, the paths that it was asked for)"""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()


def pictures(folder, samples, count: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, image, _ in samples[:count]:
        (folder / f"{key}.jpg").write_bytes(image)


def test_paths_in_a_table_are_not_opened(samples, server, tmp_path):
    url, asked = server
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pictures(tmp_path, samples)
    paths = [f"{url}/latest/meta-data", f"simplecache::{url}/x", "/etc/passwd", "/dev/zero", "file:///etc/passwd"]
    paths += [str(fifo), str(tmp_path / "00003.jpg"), "00003.jpg"]
    images = [*({"bytes": None, "path": path} for path in paths), {"bytes": samples[9][1], "path": "/etc/passwd"}]
    captions = [f"{n:05d} x" for n in range(len(images))]
    Dataset.from_dict({"image": images, "caption": captions}).to_parquet(str(tmp_path / "x.parquet"))
    for options in ({}, {"image_column": "image"}):  # a column of pictures does not become one of paths
        source = open_source(str(tmp_path / "x.parquet"), **options)
        assert source.files is None and source.image(list(source.rows())[-1])["bytes"] == samples[9][1]
    loader = make_train_loader(tmp_path / "x.parquet", batch_size=1, block=1)
    assert numbers(itertools.islice(loader, 2)) == [8, 8] and not asked
    assert refused(loader)["image is a path, not bytes"] >= len(paths)
    with pytest.raises(RefusedSample, match="image is a path, not bytes"):
        decode_image({"bytes": None, "path": str(tmp_path / "00003.jpg")})


def test_a_column_of_paths_is_read_where_the_user_names_it(samples, server, tmp_path):
    url, asked = server
    pictures(tmp_path / "data" / "images", samples)
    pictures(tmp_path / "private", samples)
    (tmp_path / "data" / "link.jpg").symlink_to(tmp_path / "private" / "00000.jpg")
    inside = ["images/00000.jpg", str(tmp_path / "data" / "images" / "00001.jpg")]
    outside = ["../private/00000.jpg", "link.jpg", str(tmp_path / "private" / "00000.jpg"), f"{url}/x.jpg", "/dev/zero"]
    outside += ["images/../../private/00000.jpg", "file:///etc/passwd", "zip://x::/etc/passwd", "a\0b", "."]
    table = {"file": [*inside, *outside, "images/none.jpg"], "caption": ["x"] * 13}
    Dataset.from_dict(table).to_parquet(str(tmp_path / "data" / "x.parquet"))
    for data in (tmp_path / "data", tmp_path / "data" / "x.parquet", tmp_path / "data" / "*.parquet"):
        source = open_source(str(data), image_column="file")
        found = []
        for row in source.rows():
            try:
                found.append(decode_image(source.image(row)).size)
            except RefusedSample as error:
                found.append(error.reason)
        assert found == [(64, 64)] * 2 + [OUTSIDE] * len(outside) + ["unreadable image file"]
    assert not asked


def test_an_image_folder_opens_its_own_files(samples, tmp_path):
    """Links inside are followed; those that lead out are counted."""
    pictures(tmp_path / "private", samples, 2)
    pictures(tmp_path / "data", samples, 4)
    (tmp_path / "data" / "inside.jpg").symlink_to("00001.jpg")
    (tmp_path / "data" / "outside.jpg").symlink_to(tmp_path / "private" / "00000.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for folder in (tmp_path / "data", tmp_path / "link"):
        source = open_source(str(folder), kind="image")
        reasons = []
        for row in source.rows():
            try:
                reasons.append(decode_image(source.image(row)).size)
            except RefusedSample as error:
                reasons.append(error.reason)
        assert sorted(map(str, reasons)) == ["(64, 64)"] * 5 + [OUTSIDE]


def test_pictures_in_an_archive_of_the_folder_are_opened(samples, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for key, image, _ in samples[:3]:
            archive.writestr(f"{key}.jpg", image)
    below = FilesBelow(str(tmp_path))
    assert decode_image(below.allow(f"zip://00001.jpg::{tmp_path}/a.zip")).size == (64, 64)
    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("large.jpg", bytes(MAX_FILE_BYTES + 1))
    with pytest.raises(RefusedSample, match="oversized file"):
        decode_image(below.allow(f"zip://large.jpg::{tmp_path}/large.zip"))
    with pytest.raises(RefusedSample, match=OUTSIDE):
        FilesBelow(str(tmp_path / "other")).allow(f"zip://00001.jpg::{tmp_path}/a.zip")


def test_paths_of_a_repository_stay_in_it():
    below = FilesBelow("hf://datasets/owner/name@abc/train")
    path = "hf://datasets/owner/name@abc/train/a/b c.jpg"
    assert below.allow(path).path == below.allow("a/b c.jpg").path == path
    assert below.allow(f"zip://x.jpg::{path}").path == f"zip://x.jpg::{path}"
    others = [
        "hf://datasets/owner/other@abc/train/a.jpg",
        "hf://datasets/owner/name@abc/train/../../x.jpg",
        "/etc/passwd",
    ]
    others += [
        "https://example.org/a.jpg",
        "a/%2e%2e/%2e%2e/%2e%2e/x.jpg",
        "zip://x::zip://y::/etc/passwd",
        "a.jpg?x=1",
    ]
    for other in others:
        with pytest.raises(RefusedSample, match=OUTSIDE):
            below.allow(other)


@pytest.mark.parametrize("name", ["fifo", "/dev/zero", "folder", "none"])
def test_only_regular_files_are_opened(name, tmp_path):
    """Each of these would wait or read for ever, but for the last two."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    path = name if name.startswith("/") else str(tmp_path / name)
    for opener in (open_at, read_file, lambda path: open_at(f"file://{path}")):
        with pytest.raises(OSError, match="egular file|directory"):
            opener(path)
    with pytest.raises(RefusedSample, match="unreadable image file"):
        decode_image(StoredFile(path))


@pytest.mark.parametrize("name", ["x.tar", "metadata.jsonl", "state.json", "dataset_dict.json"])
def test_a_fifo_among_the_data_does_not_hang(name, samples, tmp_path):
    pictures(tmp_path / "data", samples)
    os.mkfifo(tmp_path / "data" / name)
    with pytest.raises((OSError, ValueError), match="Not a regular file"):
        open_source(str(tmp_path / "data"), kind="image")


def test_metadata_that_name_files_elsewhere_open_none(samples, tmp_path):
    pictures(tmp_path / "private", samples)
    pictures(tmp_path / "data", samples)
    rows = [{"file_name": "00000.jpg", "caption": "a"}, {"file_name": "../private/00000.jpg", "caption": "b"}]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path / "data"))
    opened = []
    for row in source.rows():
        with pytest.MonkeyPatch.context():
            try:
                opened.append(source.image(row).path)
            except RefusedSample:
                continue
    assert all(os.path.dirname(path) == str(tmp_path / "data") for path in opened)
