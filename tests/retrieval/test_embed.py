"""`flip-hf embed` as a person runs it: what its files hold, by how many processes, and after how many kills."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from flip_hf.commands.embed import main
from flip_hf.console.lock import lock_folder, unlock_folder
from flip_hf.data.decode import decode_image
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.fingerprints import model_fingerprint
from flip_hf.retrieval.embed import align
from flip_hf.retrieval.folder import read_manifest
from flip_hf.retrieval.opening import open_again
from flip_hf.retrieval.search import EmbeddedData
from tests.helpers.embedding import SMALL, embedded, features_of
from tests.helpers.pairs import write_tar
from tests.helpers.programs import ROOT, Program, run_program

KILLS = int(os.environ.get("FLIP_HF_KILLS", "3"))
SCRIPT = ROOT / "scripts" / "embed.py"


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the one of the running process."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".lock"}


def test_the_files_hold_the_features_of_every_usable_picture(clip, tars, samples, tmp_path):
    manifest = embedded(clip, tars, tmp_path / "out", "--texts")
    usable = [sample for sample in samples[:60] if sample[0] != "00005"]
    table = pq.read_table(sorted((tmp_path / "out").glob("*.parquet")))
    assert table.column("key").to_pylist() == [key for key, _, _ in usable]
    encoder = Encoder.from_pretrained(clip)
    pixels = torch.stack([encoder.transform(decode_image(image)) for _, image, _ in usable])
    with torch.no_grad():
        expected = encoder.images(pixels).numpy()
    assert np.allclose(features_of(tmp_path / "out"), expected, atol=1e-3)
    captions = [caption.decode() for _, _, caption in usable]
    assert table.column("captions").to_pylist() == [[caption] for caption in captions]
    texts = features_of(tmp_path / "out", "text_features")[:, 0]
    assert np.allclose(texts, encoder.texts(captions).numpy(), atol=1e-3)
    assert (manifest["images"], manifest["captions"]) == (59, 59)


def test_unusable_samples_are_counted_and_listed(clip, tars, tmp_path):
    manifest = embedded(clip, tars, tmp_path / "out")
    (listed,) = map(json.loads, (tmp_path / "out" / "refused.jsonl").read_text().splitlines())
    assert manifest["refused"] == {"not an image": 1}
    assert (listed["row"], listed["key"], listed["reason"]) == (5, "00005", "not an image")


def test_features_that_are_not_finite_are_not_written(clip, tars, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(clip, broken)
    weights = load_file(broken / "model.safetensors")
    weights["visual_projection.weight"].fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="could be used: 59 x features are not finite, 1 x not an image"):
        embedded(broken, tars, tmp_path / "out")
    assert read_manifest(tmp_path / "out").images == 0


def test_labels_become_the_names_of_their_classes(clip, samples, tmp_path):
    for name, (_, image, _) in zip(("cat", "dog", "dog"), samples, strict=False):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name / f"{len(image)}.jpg").write_bytes(image)
    embedded(clip, tmp_path / "images", tmp_path / "out")
    table = pq.read_table(sorted((tmp_path / "out").glob("*.parquet")))
    assert table.column("captions").to_pylist() == [["cat"], ["dog"], ["dog"]]


def test_captions_without_tokens_have_zeros(saved, samples, tmp_path):
    """This tokenizer has no special tokens, so that of a blank that no stripping removes nothing is left."""
    blank = "\u200b".encode()
    write_tar(tmp_path / "0.tar", [("a", samples[0][1], blank), ("b", samples[1][1], samples[1][2])])
    embedded(saved, tmp_path / "0.tar", tmp_path / "out", "--texts")
    texts = features_of(tmp_path / "out", "text_features")[:, 0]
    assert not texts[0].any() and np.isclose(np.linalg.norm(texts[1]), 1, atol=1e-2)


@pytest.mark.parametrize("form", ["two shards", "one file"])
def test_two_processes_with_workers_write_the_bytes_of_one(form, clip, tars, samples, parquet_folder, tmp_path):
    """Two shards are fewer than the four readers, so that their blocks are dealt out, and so is a file's."""
    data = tars if form == "two shards" else parquet_folder / "part-0.parquet"
    columns = () if form == "two shards" else ("--image_column", "picture", "--caption_column", "words")
    embedded(clip, data, tmp_path / "one", "--texts", *columns)
    words = (clip, data, tmp_path / "two", *SMALL, "--workers", "2", "--texts", *columns)
    run = run_program(SCRIPT, *words, processes=2)
    assert run.returncode == 0, run.stderr
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert len(files_of(tmp_path / "one")) > 5


def killed_until_done(words: list[str], out: Path, processes: int, kills: int) -> int:
    """Runs the command and kills it after a random number of further files, or seconds, again and again.

    Returns:
        How often it was killed before it had finished.
    """
    draw = random.Random(0)
    done = 0
    for _ in range(kills):
        before = len(list(out.glob("part-*")))
        more = draw.randint(0, 3)
        program = Program(SCRIPT, words, (out.with_suffix(".txt"),) * 2, processes)
        deadline = time.monotonic() + 60
        while program.poll() is None and time.monotonic() < deadline:
            if (out / "embeddings.json").exists() and len(list(out.glob("part-*"))) >= before + more:
                time.sleep(draw.random() * 0.02)
                break
            time.sleep(0.001)
        done += program.poll() is None
        program.kill()
    return done


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again_writes_the_bytes_of_one_that_is_not(processes, clip, tars, tmp_path):
    """`FLIP_HF_KILLS=10` is the long form."""
    small = ("--batch_size", "1", "--rows_per_file", "1")  # so many files that each kill meets a run that is not done
    embedded(clip, tars, tmp_path / "whole", *small)
    out = tmp_path / "killed"
    words = [*map(str, (clip, tars, out, *small, "--workers", "1"))]
    assert killed_until_done(words, out, processes, KILLS) >= KILLS - 1
    run = run_program(SCRIPT, *words, processes=processes)
    assert run.returncode == 0, run.stderr
    assert files_of(out) == files_of(tmp_path / "whole")


def test_weights_lie_alike_in_every_run():
    """Of a single picture, the last bits depend on where they lie: one of ten killed runs differed in one number."""
    layer = torch.nn.Linear(3, 4)
    values = [each.detach().clone() for each in layer.parameters()]
    for each in layer.parameters():
        apart = torch.empty(each.numel() + 1)[1:].view_as(each)
        each.data = apart.copy_(each.data)
    align(layer)
    assert [each.data_ptr() % 64 for each in layer.parameters()] == [0, 0]
    assert all(map(torch.equal, layer.parameters(), values))


def test_a_damaged_file_is_written_again(clip, tars, tmp_path):
    out = tmp_path / "out"
    embedded(clip, tars, out)
    whole = files_of(out)
    first, second, *_ = sorted(out.glob("part-*"))
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes(whole[second.name].replace(b"00009", b"00008"))
    embedded(clip, tars, out)
    assert files_of(out) == whole


def test_a_shard_that_cannot_be_read_is_no_loss_in_silence(clip, samples, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for number, some in enumerate((samples[:30], samples[30:59])):
        rows = [{"image": {"bytes": image}, "caption": caption.decode()} for _, image, caption in some]
        pq.write_table(pa.Table.from_pylist(rows), data / f"{number}.parquet")
    last = data / "1.parquet"
    whole = last.read_bytes()
    last.write_bytes(whole[:-8] + bytes(8))  # of the same size, as after a failure of the disk
    said = refusal(capsys, clip, data, tmp_path / "out", *SMALL, "--workers", "0").splitlines()[-1]
    assert said.startswith(f"error: 1 shard could not be read to the end, such as {last}; all others are encoded.")
    skipped = embedded(clip, data, shutil.copytree(tmp_path / "out", tmp_path / "skipped"), "--skip_unreadable")
    assert skipped["refused"] == {"unreadable shard": 1} and skipped["images"] == 30
    refusal(capsys, clip, data, tmp_path / "skipped", *SMALL, "--workers", "0")
    assert not read_manifest(tmp_path / "skipped").finished  # its files may now be others than those listed
    last.write_bytes(whole)
    for folder in (tmp_path / "out", tmp_path / "skipped"):
        assert embedded(clip, data, folder)["images"] == 59
    assert files_of(tmp_path / "out") == files_of(tmp_path / "skipped")


def refusal(capsys, *words: object) -> str:
    with pytest.raises(SystemExit):
        main([*map(str, words)])
    return capsys.readouterr().err


def test_a_folder_of_other_features_is_left_alone(clip, tars, tmp_path, capsys):
    out = tmp_path / "out"
    embedded(clip, tars, out)
    whole = files_of(out)
    said = refusal(capsys, clip, tars, out, "--batch_size", "5", "--rows_per_file", "8")
    assert "--batch_size differ" in said
    other = tmp_path / "other"
    shutil.copytree(clip, other)
    weights = load_file(other / "model.safetensors")
    weights["logit_scale"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert "the model's weights differ" in refusal(capsys, other, tars, out, *SMALL)
    assert files_of(out) == whole


def changed_config(clip: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(clip, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes, "vision_config": {**config["vision_config"], **changes}}))
    return folder


def test_what_a_configuration_says_of_training_changes_no_features(clip, tars, tmp_path, capsys):
    out = tmp_path / "out"
    embedded(clip, tars, out)
    whole = files_of(out)
    harmless = {"initializer_factor": 0.5, "attention_dropout": 0.25, "id2label": {"0": "cat"}, "return_dict": False}
    embedded(changed_config(clip, tmp_path / "harmless", **harmless), tars, out)
    other = changed_config(clip, tmp_path / "other", layer_norm_eps=0.5)
    assert "the model's architecture differ" in refusal(capsys, other, tars, out, *SMALL)
    assert files_of(out) == whole


def test_folders_with_a_digest_of_the_whole_configuration_are_still_read(clip, tars, tmp_path, capsys):
    encoder = Encoder.from_pretrained(clip)
    earlier = model_fingerprint(encoder.model, encoder.processor, ("config",))
    out = tmp_path / "out"
    embedded(clip, tars, out)
    about = json.loads((out / "embeddings.json").read_text())
    about["model"] = {**{name: about["model"][name] for name in ("name", "revision")}, **earlier}
    (out / "embeddings.json").write_text(json.dumps(about))
    whole = files_of(out)
    assert embedded(clip, tars, out)["model"]["config"] == earlier["config"] and files_of(out) == whole
    assert EmbeddedData(out).manifest.images == 59
    other = changed_config(clip, tmp_path / "other", initializer_factor=0.5)
    assert "the model's config differ" in refusal(capsys, other, tars, out, *SMALL)


@pytest.mark.parametrize("classes", ["", "cat/dog"])
def test_features_of_a_folder_that_has_changed_since_are_of_something_else(classes, clip, samples, tmp_path, capsys):
    """Plain folders and folders of classes are read in two ways."""
    folders = [tmp_path / "images" / name for name in classes.split("/")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(samples[number][1])
    embedded(clip, tmp_path / "images", tmp_path / "out")
    (folders[-1] / "2.jpg").write_bytes(samples[2][1])
    assert "the data's files" in refusal(capsys, clip, tmp_path / "images", tmp_path / "out", *SMALL)
    with pytest.raises(ValueError, match="has changed since it was embedded"):
        open_again(read_manifest(tmp_path / "out").data)


def test_a_folder_of_other_files_is_left_alone(clip, tars, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds other files, such as notes.txt" in refusal(capsys, clip, tars, tmp_path)


def test_two_runs_do_not_write_into_one_folder(clip, tars, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    lock_folder(out)
    try:
        run = run_program(SCRIPT, clip, tars, out)
    finally:
        unlock_folder(out)
    assert run.returncode == 1 and "is in use by another run" in run.stderr


def test_mistakes_are_found_before_anything_is_encoded(clip, tars, samples, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "1.jpg").write_bytes(samples[0][1])
    assert "has no captions to encode" in refusal(capsys, clip, tmp_path / "plain", out, "--texts")
    for column in ("jpg", "jpg;png"):
        words = ("--workers", "0", "--caption_column", column)
        assert f"The column {column!r} of" in refusal(capsys, clip, tars, out, *words)
    assert "--batch_size must be" in refusal(capsys, clip, tars, out, "--batch_size", "0")
    assert not out.exists()


def test_columns_without_pictures_or_captions_end_in_an_error(clip, tars, samples, tmp_path, capsys):
    words = ("--workers", "0")
    said = refusal(capsys, clip, tars, tmp_path / "none", *words, "--image_column", "txt")
    assert "could be used: 60 x not an image. If these are not pictures, name their column with --image_column" in said
    write_tar(tmp_path / "0.tar", [(key, image, b" ") for key, image, _ in samples[:3]])
    said = refusal(capsys, clip, tmp_path / "0.tar", tmp_path / "blank", *words, "--texts")
    assert "has no caption that could be encoded; the pictures were." in said
    assert read_manifest(tmp_path / "blank").images == 3
