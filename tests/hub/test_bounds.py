"""Publishing does not follow links, take files by broad names, run or send foreign code, or send NaN."""

import json
import os
import re
import shutil
import socket

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter

from flip_hf.evaluation.pictures import draw
from flip_hf.evaluation.result import Result
from flip_hf.hub import code
from flip_hf.hub.folder import FolderError, prepare
from flip_hf.hub.push import HubRefused, push
from flip_hf.hub.records import _pictures
from flip_hf.hub.regular import NotRegularError, RegularFiles

INDEX = "model.safetensors.index.json"
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----\n"
TOKEN = "hf_" + "Ab1" * 11


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(run_folder, tmp_path):
    """Changes a copy of the folder, and tells why it is not published."""
    count = iter(range(100))

    def refused(change, **options) -> str:
        folder = shutil.copytree(run_folder, tmp_path / f"changed-{next(count)}")
        change(folder)
        ready = tmp_path / f"{folder.name}-ready"
        with pytest.raises(FolderError) as error:
            prepare(folder, ready, **options)
        assert not ready.exists() or not list(ready.iterdir())  # half a folder could be taken for a whole one
        assert not list(tmp_path.glob(".push-*"))
        return str(error.value)

    return refused


def edit(name, **values):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))

    return change


# -- links and names --------------------------------------------------------------------------------------------------


def test_links_are_not_followed(run_folder, tmp_path, caplog, monkeypatch):
    outside = tmp_path / "home"
    (outside / "inner").mkdir(parents=True)
    for name in ("id_ed25519", "results.md", "events.out.tfevents.7", "inner/events.out.tfevents.8"):
        (outside / name).write_text(f"0utside {name}")
    for name in ("LICENSE", "README.md", "results.json", "log.jsonl", "training_curves.png"):
        (run_folder / name).unlink(missing_ok=True)
        (run_folder / name).symlink_to(outside / "id_ed25519")
    (run_folder / "evaluation").symlink_to(outside)
    (run_folder / "logs" / "events.out.tfevents.7").symlink_to(outside / "events.out.tfevents.7")
    (run_folder / "logs" / "1700000000.25").symlink_to(outside / "inner")
    os.mkfifo(run_folder / "LICENSE.md")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(run_folder)  # the path of a socket is short
        listening.bind("LICENSE.txt")
        ready = prepare(run_folder, tmp_path / "ready")
    found = contents(ready)
    assert not [name for name, data in found.items() if b"0utside" in data]
    assert {"recipe.yaml", "logs/events.out.tfevents.1", "README.md"} <= set(found)
    assert not {"LICENSE", "LICENSE.md", "LICENSE.txt", "results.json", "log.jsonl", "evaluation"} & set(found)
    assert "LICENSE is a link, or lies behind one. It is skipped." in caplog.text
    assert "LICENSE.md is not a regular file. It is skipped." in caplog.text
    assert not [path for path in ready.rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("options", [{}, {"link": True}, {"export_clip": True}], ids=["copy", "link", "export"])
def test_a_model_behind_a_link_is_refused(refused, tmp_path, name, options):
    def change(folder):
        shutil.move(folder / name, tmp_path / f"outside-{name}")
        (folder / name).symlink_to(tmp_path / f"outside-{name}")

    assert f"{name} is a link, or lies behind one. Only plain files" in refused(change, **options)


def test_a_folder_that_is_named_by_a_link_is_published(run_folder, tmp_path):
    (tmp_path / "alias").symlink_to(run_folder)
    assert "model.safetensors" in contents(prepare(tmp_path / "alias", tmp_path / "ready", link=True))


def test_a_way_that_leads_out_of_the_folder_is_none(run_folder, tmp_path):
    (tmp_path / "outside").write_text("outside")
    (run_folder / "inner").symlink_to(tmp_path)
    files = RegularFiles(run_folder)
    for name in ("../outside", str(tmp_path / "outside"), "inner/outside", "logs/../../outside", "", "logs"):
        assert not files.has(name)
        with pytest.raises(NotRegularError):
            files.read(name, 100)
    assert files.names("inner") == [] and files.names("logs") == ["events.out.tfevents.1"]
    assert files.read("logs/events.out.tfevents.1", 100)
    with pytest.raises(NotRegularError, match="is larger than 3 bytes"):
        files.read("recipe.yaml", 3)


def test_only_known_names_are_published(run_folder, tmp_path):
    before = set(contents(prepare(run_folder, tmp_path / "before")))
    (run_folder / "evaluation" / "more").mkdir(parents=True)
    for name in (
        *("LICENSE.env", "LICENSE_key", "secret_flip.py", "flip.py", "README.md.orig", "recipe.yaml.bak", ".env"),
        *("model-00001-of-00002.safetensors", "model-old-of-new.safetensors", "optimizer.bin", "vocab.txt.bak"),
        *("evaluation/notes.md", "evaluation/photo.png", "evaluation/more/results.json", "logs/debug.txt"),
        "logs/host.events.out.tfevents.1",
    ):
        (run_folder / name).write_text("mine")
    (run_folder / "logs" / "debug").mkdir()
    (run_folder / "logs" / "debug" / "events.out.tfevents.1").write_text("mine")
    (run_folder / "LICENSE").write_text("Anyone may do anything.\n")
    assert set(contents(prepare(run_folder, tmp_path / "ready"))) == before | {"LICENSE"}


def test_pictures_are_those_that_evaluate_draws(run_folder, tmp_path):
    counts = np.eye(3, dtype=int)
    picture = Image.new("RGB", (8, 8))
    search = {"pictures": [picture], "captions": ["a"], "image_of_text": [0]}
    search |= {"best_images": {0: [0]}, "best_texts": {0: [0]}}
    results = [
        Result("cifar10", "CIFAR-10", "zero-shot", "top1", {"top1": 0.5}, 3, {}, {"classes": 3}),
        Result("my data-2", "Mine", "linear-probe", "top1", {"top1": 0.5}, 3, {}, {}, {"searched": {1.0: 0.5}}),
        Result("flickr", "Flickr", "retrieval", "recall", {"recall": 0.5}, 3, {}, {}, search),
    ]
    results[0].material = {"confusion": counts, "class_names": ["a", "b", "c"]}
    folder = run_folder / "evaluation"
    folder.mkdir()
    drawn = {path.name for path in draw(results, folder, "model")}
    keep = ("data_set", "title", "task", "metric", "metrics", "samples", "refused", "details")
    report = {"results": [{name: getattr(result, name) for name in keep} for result in results]}
    (folder / "results.json").write_text(json.dumps(report))
    (folder / "results.md").write_text("# Results\n")
    (folder / "confusion_other.png").write_bytes(b"of something else")
    assert len(drawn) == 5
    published = {name for name in contents(prepare(run_folder, tmp_path / "ready")) if name.startswith("evaluation/")}
    assert published == {f"evaluation/{name}" for name in drawn | {"results.json", "results.md"}}
    (folder / "results.json").write_text(json.dumps({"results": [{"data_set": "../../x"}, {"data_set": 3}, 4]}))
    assert _pictures(folder / "results.json") == []


def test_oversized_files_are_left_out(run_folder, tmp_path, caplog):
    (run_folder / "LICENSE").write_bytes(b"x" * (2**20 + 1))
    (run_folder / "LICENSE.md").write_bytes(b"\xff\xfe\x00binary")
    found = contents(prepare(run_folder, tmp_path / "ready"))
    assert "LICENSE" not in found and "LICENSE is larger than 1,048,576 bytes. It is skipped." in caplog.text
    assert "LICENSE.md" not in found and "LICENSE.md is not text and is skipped." in caplog.text


# -- code -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        edit("config.json", auto_map={"AutoModel": "secret_flip.Model"}),
        edit("config.json", auto_map={"AutoModel": "somebody/repository--modeling_flip.FlipModel"}),
        edit("config.json", auto_map={"AutoModel": "modeling_flip.os"}),
        edit("config.json", auto_map={"AutoModel": "..modeling_flip.FlipModel"}),
        edit("config.json", custom_pipelines={"x": {"impl": "pipe.Line", "pt": ["AutoModel"]}}),
        edit("config.json", vision_config={"auto_map": {"AutoConfig": "x.Y"}}),
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_x.Tokenizer"]}),
        edit("processor_config.json", image_processor={"auto_map": {"AutoImageProcessor": "x.Y"}}),
    ],
)
def test_code_of_others_is_not_named(refused, change):
    def changed(folder):
        (folder / "secret_flip.py").write_text("class Model: ...")
        change(folder)

    assert "names code that this package does not have: " in refused(changed)


def test_code_is_this_packages_own(run_folder, tmp_path, caplog):
    (run_folder / "modeling_flip.py").write_text("import os; os.system('true')")
    (run_folder / "masking_flip.py").unlink()
    (run_folder / "resizing_flip.py").unlink()
    (run_folder / "resizing_flip.py").symlink_to(run_folder / "notes.py")
    ready = prepare(run_folder, tmp_path / "ready")
    published = {path.name: path.read_bytes() for path in ready.glob("*.py")}
    assert {"modeling_flip.py", "masking_flip.py", "resizing_flip.py"} <= set(published) <= code.NAMES
    assert all(data == (code.PACKAGE / name).read_bytes() for name, data in published.items())
    assert "modeling_flip.py differs from this package's file, which is published in its place." in caplog.text


def test_damaged_configurations_are_named(refused):
    for name in ("config.json", "tokenizer_config.json"):
        assert f"{name} is damaged: it is not JSON" in refused(lambda folder, n=name: (folder / n).write_text("{"))
        assert f"{name} is damaged: it is not a JSON o" in refused(lambda folder, n=name: (folder / n).write_text("[]"))
    assert "is not a model folder" in refused(edit("config.json", model_type=["flip"]))


# -- weights ----------------------------------------------------------------------------------------------------------


def spoil(value, dtype=None, **metadata):
    def change(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        for name in list(weights)[:7]:
            weights[name] = weights[name].to(dtype or weights[name].dtype)
            weights[name].reshape(-1)[-1] = value
        save_file(weights, path, metadata={"format": "pt", **metadata})

    return change


@pytest.mark.parametrize("options", [{}, {"link": True}, {"export_clip": True}], ids=["copy", "link", "export"])
def test_weights_that_are_not_finite_are_not_published(refused, options):
    message = refused(spoil(float("nan")), **options)
    assert "model.safetensors has numbers that are not finite" in message and "and 2 more" in message
    assert "logit_scale" in message or "weight" in message or "bias" in message
    assert "not finite" in refused(spoil(float("-inf"), torch.bfloat16), **options)


def test_a_checkpoint_with_nan_is_not_published(refused):
    def change(folder):
        edit("config.json", auto_map={"AutoConfig": "configuration_flip.FlipConfig"})(folder)
        spoil(float("nan"))(folder)

    assert "not finite" in refused(change)


def test_damaged_weights_are_named(refused):
    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    assert "model.safetensors is damaged or not in safetensors" in refused(cut)
    assert "is damaged or not in safetensors" in refused(lambda f: (f / "model.safetensors").write_bytes(KEY.encode()))
    assert "header of model.safetensors contains something like" in refused(spoil(1.0, about=f"made with {TOKEN}"))


def test_shards_are_those_of_the_index(run_folder, tmp_path, refused):
    weights = load_file(run_folder / "model.safetensors")
    names = sorted(weights)
    (run_folder / "model.safetensors").unlink()
    parts = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, run_folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (run_folder / INDEX).write_text(json.dumps(index))
    (run_folder / "model-00003-of-00003.safetensors").write_text("of an older save")
    found = contents(prepare(run_folder, tmp_path / "ready"))
    assert {name for name in found if name.startswith("model")} == {
        *parts,
        INDEX,
        "modeling_flip.py",
    }

    def naming(**entries):
        return edit(INDEX, weight_map={**index["weight_map"], **entries})

    assert "'../x.safetensors', which is not the name of a weights file" in refused(
        naming(**{names[0]: "../x.safetensors"})
    )
    assert "which is not the name of a weights file" in refused(naming(**{names[0]: "id_ed25519"}))
    assert "lacks tensors" in refused(naming(another="model-00001-of-00002.safetensors"))
    assert "has no weight_map" in refused(lambda f: (f / INDEX).write_text('{"weight_map": 3}'))


# -- texts and binary files -------------------------------------------------------------------------------------------


def test_a_vocabulary_with_a_token_is_refused(refused):
    def change(folder):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] |= {"password": 600, TOKEN: 601}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    assert "tokenizer.json contains something like a Hugging Face token" in refused(change)


def test_words_of_a_vocabulary_stay(run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "dragonfly")
    path = run_folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {"password": 600, "token": 601, "bearer": 602, "dragonfly": 603}
    path.write_text(json.dumps(tokenizer, indent=2))
    assert contents(prepare(run_folder, tmp_path / "ready"))["tokenizer.json"] == path.read_bytes()


def test_secrets_hidden_from_a_parser_are_removed_too(run_folder, tmp_path, caplog):
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in TOKEN)
    (run_folder / "log.jsonl").write_text(
        f'{{"samples": 1}}\n{{"x": "{escaped}"}}\n{{"u": "https:\\/\\/a:pass-w0rd@h"}}\n'
    )
    results = json.loads((run_folder / "results.json").read_text())
    (run_folder / "results.json").write_text(json.dumps({**results, "x": 0})[:-1] + f', "y": "{escaped}"}}')
    (run_folder / "LICENSE").write_text(f"MIT\n{KEY}")
    found = contents(prepare(run_folder, tmp_path / "ready"))
    lines = [json.loads(line) for line in found["log.jsonl"].splitlines()]
    assert lines == [{"samples": 1}, {"x": "[removed]"}, {"u": "https://[removed]@h"}]
    assert json.loads(found["results.json"]) == {**results, "x": 0, "y": "[removed]"}
    assert found["LICENSE"] == b"MIT\n[removed]\n"
    assert "removed from " in caplog.text and "LICENSE" in caplog.text


def test_events_are_looked_into_and_do_not_name_the_host(run_folder, tmp_path, caplog):
    shutil.rmtree(run_folder / "logs")
    host = socket.gethostname()
    folders = {name: run_folder / "logs" / name for name in (".", "1700000000.25", "1700000001.5")}
    for name, folder in folders.items():
        with SummaryWriter(folder) as writer:
            writer.add_scalar("loss", 1.5, 32)
            writer.add_text("note", f"made with {TOKEN}" if name.endswith(".5") else "made with care")
            writer.add_image("grid", np.zeros((3, 8, 8), np.uint8))
            writer.add_hparams({"lr": 0.1, "name": "tiny"}, {}, run_name=".")
    assert any(host in path.name for path in run_folder.rglob("*tfevents*"))
    found = contents(prepare(run_folder, tmp_path / "ready"))
    events = {name: data for name, data in found.items() if "tfevents" in name}
    assert [name.rpartition("/")[0] for name in sorted(events)].count("logs/1700000001.5") == 1  # of two
    assert all(re.fullmatch(r"events\.out\.tfevents\.[\d.]+", name.rpartition("/")[2]) for name in events)
    originals = [path.read_bytes() for path in run_folder.rglob("*tfevents*")]
    assert len(events) == 5 and all(data in originals for data in events.values())
    assert "contains something like a token and is skipped" in caplog.text


def test_pictures_are_published_without_secrets_in_their_comments(run_folder, tmp_path, caplog):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8))
    path = run_folder / "training_curves.png"
    picture.save(path)
    assert contents(prepare(run_folder, tmp_path / "plain"))["training_curves.png"] == path.read_bytes()
    whole = path.read_bytes()
    for number, add in enumerate(
        (
            lambda info: info.add_text("Comment", f"made with {TOKEN}"),
            lambda info: info.add_text("Comment", f"made with {TOKEN}", zip=True),
            lambda info: info.add_itxt("Comment", f"made with {TOKEN}", zip=True),
            None,
        )
    ):
        info = PngImagePlugin.PngInfo()
        if add is None:
            path.write_bytes(whole + TOKEN.encode())
        else:
            add(info)
            picture.save(path, pnginfo=info)
        assert "training_curves.png" not in contents(prepare(run_folder, tmp_path / f"comment-{number}"))
    assert caplog.text.count("training_curves.png contains something like a token") == 4


def test_links_are_not_pushed(hub, api, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    ready = prepare(run_folder, tmp_path / "ready")
    (ready / "notes.md").symlink_to(run_folder / "notes.py")
    with pytest.raises(HubRefused, match="Links would publish their targets"):
        push(ready, "you/flip", api=api)
    assert not hub.repositories
