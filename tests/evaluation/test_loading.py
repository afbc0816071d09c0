"""Models, tokenizers and processors that cannot be loaded: one line that names the file or the way to get it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from flip_hf import FlipModel, ZeroShotClassifier
from flip_hf.console.loading import ModelUnreadable
from flip_hf.demo.model import DemoModel
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.finetuning.model import make_classifier
from flip_hf.evaluation.loading import read_class_names
from flip_hf.evaluation.reconstruction import load_pretraining

WEIGHTS = "model.safetensors"
READERS = [Encoder.from_pretrained, ZeroShotClassifier.from_pretrained, DemoModel.from_pretrained]


def cut(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


def change(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        target = config if name == "model_type" else config["vision_config"]
        target[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def pickled(folder: Path) -> None:
    torch.save(FlipModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


DAMAGED = {
    "weights cut in the header": (lambda f: cut(f, WEIGHTS, 5000), "model.safetensors is damaged"),
    "weights cut at the end": (lambda f: cut(f, WEIGHTS, -50), "model.safetensors is damaged"),
    "weights empty": (lambda f: cut(f, WEIGHTS, 0), "model.safetensors is damaged"),
    "weights of noise": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 9000), "model.safetensors is damaged"),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), "it has no weights"),
    "weights a pickle": (pickled, "its weights are a pickle"),
    "weights of a narrower model": (lambda f: change(f, hidden_size=64), "do not have the sizes of its config.json"),
    "weights of fewer layers": (lambda f: change(f, num_hidden_layers=5), "has no weights for 48 tensors"),
    "weights of more layers": (lambda f: change(f, num_hidden_layers=1), "that do not fit its config.json"),
    "configuration cut": (lambda f: cut(f, "config.json", 100), "config.json is damaged"),
    "configuration a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "configuration binary": (lambda f: (f / "config.json").write_bytes(b"\xff\x00"), "config.json is damaged"),
    "configuration gone": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "configuration a pipe": (lambda f: pipe(f, "config.json"), "config.json is not a regular file"),
    "configuration huge": (lambda f: (f / "config.json").write_text(" " * 2**21), "config.json is too large"),
    "type unknown": (lambda f: change(f, model_type="foo"), "of type 'foo', which is unknown"),
    "type a number": (lambda f: change(f, model_type=3), "of type 3, which is unknown"),
    "type gone": (lambda f: change(f, model_type=None), "does not say which model it is"),
    "field of another type": (lambda f: change(f, hidden_size="64"), "'hidden_size' expected int, got str"),
    "field out of range": (lambda f: change(f, hidden_size=10**9), "hidden_size must be between 1"),
    "field unknown to torch": (lambda f: change(f, hidden_act="sinus"), "hidden_act is one of"),
    "tokenizer cut": (lambda f: cut(f, "tokenizer.json", 100), "tokenizer.json is damaged"),
    "tokenizer empty": (lambda f: (f / "tokenizer.json").write_text("{}"), "processor .* cannot be loaded"),
    "processor gone": (lambda f: (f / "processor_config.json").unlink(), "cannot be loaded"),
    "processor cut": (lambda f: cut(f, "processor_config.json", 3), "processor_config.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_named_by_its_file_in_one_line(saved, damage, monkeypatch):
    spoil, message = DAMAGED[damage]
    spoil(saved)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run code"))
    for read in READERS:
        with pytest.raises(ModelUnreadable, match=message) as caught:
            read(saved)
        assert "\n" not in str(caught.value) and str(saved) in str(caught.value)


def test_the_decoder_and_the_classifier_give_the_same_output(saved):
    cut(saved, WEIGHTS, 5000)
    with pytest.raises(ModelUnreadable, match="model.safetensors is damaged"):
        make_classifier(saved, 3)
    (saved / "config.json").write_text("{")
    for read in (load_pretraining, lambda folder: make_classifier(folder, 3)):
        with pytest.raises(ModelUnreadable, match="config.json is damaged"):
            read(saved)


@pytest.mark.parametrize("name", ["/nowhere/model", "./runs/model", "runs/a/model", "a b", "x" * 300])
def test_a_name_that_is_neither_folder_nor_id_is_refused(name):
    for read in READERS:
        with pytest.raises(ModelUnreadable, match="cannot be loaded: there is no such folder.$"):
            read(name)


def test_an_id_that_is_not_here_offline_is_one_line_with_the_way_to_get_it(tmp_path, monkeypatch):
    assert constants.HF_HUB_OFFLINE  # as tests/conftest.py sets it
    for read in READERS:
        with pytest.raises(ModelUnreadable, match=r"HF_HUB_OFFLINE.*`hf download some-body/some-model`") as caught:
            read("some-body/some-model")
        assert "\n" not in str(caught.value)
    shutil.copyfile(__file__, tmp_path / "model.py")
    with pytest.raises(ModelUnreadable, match="it is a file; name the folder"):
        Encoder.from_pretrained(tmp_path / "model.py")


# -- class names -------------------------------------------------------------------------------------------------------


def test_class_names_are_read_within_bounds(tmp_path):
    (tmp_path / "bom.txt").write_bytes("\ufeffa cat\r\n a dog \n\r\n".encode())
    assert read_class_names(tmp_path / "bom.txt") == ("a cat", "a dog")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "null.txt").write_bytes(b"a\0b\n")
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(2**30)  # sparse
    os.mkfifo(tmp_path / "pipe.txt")
    cases = {
        "empty.txt": "has no class names",
        "binary.txt": "not UTF-8 text",
        "null.txt": "is a binary file",
        "huge.txt": "is too large for class names",
        "pipe.txt": "is not a regular file but a pipe",
        ".": "is a folder; name the file",
        "none.txt": "There is no file .*none.txt with class names",
    }
    for name, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            read_class_names(tmp_path / name)
        assert "\n" not in str(caught.value)
