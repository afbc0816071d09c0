"""Folders of features that are damaged or come from anyone, and folders and names that belong to others."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flip_hf.commands.embed import main as embed
from flip_hf.commands.search import main as search
from flip_hf.retrieval.folder import read_manifest
from tests.helpers.embedding import SMALL, embedded
from tests.helpers.pairs import write_tar


@pytest.fixture(scope="module")
def features(clip, tars, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "out"
    embedded(clip, tars / "0.tar", folder, "--index", "flat")
    return folder


@pytest.fixture
def own(features, tmp_path) -> Path:
    return shutil.copytree(features, tmp_path / "own")


def refusal(capsys, command: Callable, *words: object) -> str:
    with pytest.raises(SystemExit):
        command([*map(str, words)])
    return capsys.readouterr().err


def test_a_manifest_cannot_name_files_elsewhere(own, clip, tars, tmp_path, capsys):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    about = json.loads((own / "embeddings.json").read_text())
    about["files"]["../precious.txt"] = {"rows": 0, "sha256": ""}
    (own / "embeddings.json").write_text(json.dumps(about))
    assert "no name of a file" in refusal(capsys, embed, clip, tars / "0.tar", own, *SMALL, "--workers", "0")
    assert precious.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5},
        {"model": {"name": 3, "revision": None}},
        {"options": {}},
        {"data": {}},
        {"files": [1]},
        {"files": {"part-00000-00000.parquet": {"rows": "8", "sha256": ""}}},
        {"images": "many"},
        {"refused": {"oversized image": "many"}},
        {"index": {}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_of_other_values_is_damaged(change, own):
    about = json.loads((own / "embeddings.json").read_text())
    (own / "embeddings.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(ValueError, match="is damaged"):
        read_manifest(own)


def unfinish(folder: Path) -> dict:
    """Lets a folder look as if its run had been ended before the manifest was complete, which it returns."""
    path = folder / "embeddings.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, "finished": False, "files": {}}))
    return before


@pytest.mark.parametrize(
    "change",
    [
        {"block": ["0", "0"]},
        {"block": [0]},
        {"block": [99999, 0]},
        {"captions": "many"},
        {"rows": None},
        {"is_last": 5},
        {"refused": [[0, "key", ["a"]]]},
        {"refused": 5},
        {"damage": [["unreadable shard", 5]]},
    ],
)
def test_a_file_that_says_something_else_of_its_block_is_written_again(change, own, clip, tars):
    path = own / "part-00000-00000.parquet"
    whole = path.read_bytes()
    table = pq.read_table(path)
    about = {**json.loads(table.schema.metadata[b"flip_hf"]), **change}
    pq.write_table(table.replace_schema_metadata({"flip_hf": json.dumps(about)}), path)
    unfinish(own)
    embedded(clip, tars / "0.tar", own)
    assert path.read_bytes() == whole


def test_a_file_of_a_shard_that_the_data_do_not_have_is_not_taken(own, clip, tars):
    path = own / "part-00000-00000.parquet"
    table = pq.read_table(path)
    about = {**json.loads(table.schema.metadata[b"flip_hf"]), "block": [9, 0]}
    refused = {"refused": [[0, "key", "damaged image"]]}
    changed = table.replace_schema_metadata({"flip_hf": json.dumps({**about, **refused})})
    pq.write_table(changed, own / "part-00009-00000.parquet")
    before = unfinish(own)
    assert embedded(clip, tars / "0.tar", own)["files"] == before["files"]


@pytest.mark.parametrize("name", ["part-00000-00000.parquet", "refused.jsonl", ".embeddings.json.part.json"])
def test_links_in_a_folder_are_replaced_and_not_followed(name, own, clip, tars, tmp_path):
    mine = tmp_path / "mine"
    precious = (own / name).read_bytes() if (own / name).exists() else b"precious"
    mine.write_bytes(precious)
    (own / name).unlink(missing_ok=True)
    (own / name).symlink_to(mine)
    unfinish(own)
    embedded(clip, tars / "0.tar", own)
    assert mine.read_bytes() == precious and not (own / name).is_symlink()


@pytest.mark.parametrize("name", ["embeddings.json", "run.lock"])
def test_a_link_to_the_state_of_another_folder_is_refused(name, own, clip, tars, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.write_text((own / "embeddings.json").read_text())
    (own / name).unlink(missing_ok=True)
    (own / name).symlink_to(mine)
    assert f"{own / name} is a link" in refusal(capsys, embed, clip, tars / "0.tar", own, *SMALL, "--workers", "0")
    assert mine.read_text().startswith("{")


def without_features(table: pa.Table) -> pa.Table:
    return table.drop_columns(["image_features"])


def without_captions(table: pa.Table) -> pa.Table:
    none = pa.array([None] * len(table), pa.list_(pa.string()))
    return table.set_column(table.column_names.index("captions"), "captions", none)


def shorter(table: pa.Table) -> pa.Table:
    return table.slice(0, 2)


@pytest.mark.parametrize("change", [without_features, without_captions, shorter])
def test_a_file_of_other_columns_is_named(change, own, capsys):
    path = own / "part-00000-00000.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    said = refusal(capsys, search, own, "a red circle", "--top", "30", "--exact")
    assert f"{path} is damaged" in said


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_index_is_built_again(damage, own, clip, tars, capsys):
    index = own / "index.faiss"
    whole = index.read_bytes()
    index.write_bytes(b"?") if damage == "changed" else index.unlink()
    assert "--index flat" in refusal(capsys, search, own, "a red circle")
    embedded(clip, tars / "0.tar", own, "--index", "flat")
    assert index.read_bytes() == whole


def test_an_index_of_other_features_is_not_searched(own, clip, tars, tmp_path, capsys):
    embedded(clip, tars / "1.tar", tmp_path / "other", "--index", "flat")
    other = json.loads((tmp_path / "other" / "embeddings.json").read_text())
    about = json.loads((own / "embeddings.json").read_text())
    (own / "embeddings.json").write_text(json.dumps({**about, "index": other["index"]}))
    shutil.copy(tmp_path / "other" / "index.faiss", own)
    assert "not the index of these features" in refusal(capsys, search, own, "a red circle")


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_without_a_picture_no_index_is_built(kind, clip, tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("a", b"no picture", b"words")])
    assert "could be used: 1 x not an image" in refusal(
        capsys, embed, clip, tmp_path / "0.tar", tmp_path / "out", *SMALL, "--workers", "0", "--index", kind
    )
    assert read_manifest(tmp_path / "out").index is None


def test_nothing_is_left_in_or_removed_from_a_folder_of_others(clip, tars, tmp_path, capsys):
    theirs = tmp_path / "downloads"
    theirs.mkdir()
    (theirs / "film.mp4.partial").write_text("half")
    assert "such as film.mp4.partial" in refusal(capsys, embed, clip, tars, theirs, *SMALL)
    assert os.listdir(theirs) == ["film.mp4.partial"]


def test_names_that_are_not_utf8_are_kept_as_codes(clip, samples, tmp_path):
    for folder, name in ((b"cat\xff", b"a\xfe.jpg"), (b"dog", b"b.jpg")):
        path = os.path.join(os.fsencode(tmp_path / "images"), folder)
        os.makedirs(path)
        with open(os.path.join(path, name), "wb") as file:
            file.write(samples[0][1])
    embedded(clip, tmp_path / "images", tmp_path / "out")
    table = pq.read_table(sorted((tmp_path / "out").glob("*.parquet")))
    assert table.column("key").to_pylist() == ["a\\udcfe.jpg", "b.jpg"]
    assert table.column("captions").to_pylist() == [["cat\\udcff"], ["dog"]]


def test_keys_and_captions_cannot_drive_the_terminal(clip, samples, tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("a\n\x1b[2J", samples[0][1], b"red\x1b[31m")])
    embedded(clip, tmp_path / "0.tar", tmp_path / "out")
    capsys.readouterr()
    search([str(tmp_path / "out"), "a red\x1b[31m circle"])
    said = capsys.readouterr().out
    assert "\x1b" not in said and len(said.splitlines()) == 2
