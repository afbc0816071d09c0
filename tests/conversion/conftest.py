"""Checkpoints to convert."""

import json
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

from flip_hf.conversion.timm_siglip import SIZES, Size
from tests.helpers.fixtures import FIXTURES


@pytest.fixture
def official_zip() -> Path:
    return FIXTURES / "official_flip_tiny.zip"


@pytest.fixture
def official_folder(official_zip, tmp_path) -> Path:
    """The official checkpoint as a folder that a test may change; returns the one with the file `checkpoint`."""
    with zipfile.ZipFile(official_zip) as archive:
        archive.extractall(tmp_path / "release")
    (structure,) = (tmp_path / "release").rglob("checkpoint")
    return structure.parent


@pytest.fixture
def vocab(tmp_path) -> Path:
    """A vocabulary for the tiny checkpoint's 500 rows: 499 pieces, with the release's special ones at its ids."""
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-()[]"
    pieces += [*letters, *(f"##{letter}" for letter in letters), "photo", "cat", "dog", "##s", "of", "the"]
    pieces = list(dict.fromkeys(pieces))
    pieces += [f"word{i}" for i in range(499 - len(pieces))]
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return path


def recorded(name: str) -> dict:
    """A model that open_clip made: its configuration, weights, inputs and features."""
    with safe_open(FIXTURES / name, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["model_cfg"])
    state_dict = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    return {"model_cfg": config, "state_dict": state_dict, **tensors}


@pytest.fixture(scope="session")
def open_clip_tiny():
    return recorded("open_clip_tiny.safetensors")


@pytest.fixture(params=["clipa", "siglip"])
def family(request, monkeypatch):
    """A tiny CLIPA and a tiny SigLIP of open_clip's."""
    monkeypatch.setitem(SIZES, "so400m", Size(16, 2, 4, 59))
    found = recorded(f"open_clip_{request.param}_tiny.safetensors")
    return {**found, "input/pixel_values": found["input/rows"] * found["input/columns"]}
