"""scripts/convert.py as a person runs it."""

from pathlib import Path

import pytest
from transformers import AutoModel, CLIPModel

from flip_hf import FlipModel, FlipVisionModel
from flip_hf.commands.convert import main
from tests.helpers.fixtures import FIXTURES
from tests.helpers.models import tiny_clip
from tests.helpers.programs import ROOT, run_program

SCRIPT = ROOT / "scripts" / "convert.py"


@pytest.fixture
def clip(saved, tmp_path) -> Path:
    """A CLIPModel's folder, with the processor of another."""
    tiny_clip(99).save_pretrained(tmp_path / "clip")
    for path in saved.iterdir():
        if "processor" in path.name or "tokenizer" in path.name:
            (tmp_path / "clip" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "clip"


@pytest.fixture
def converted(clip, tmp_path) -> Path:
    """The CLIP as a FLIP."""
    made = run_program(SCRIPT, "clip", clip, tmp_path / "flip", "--mask_ratio", "0.75")
    assert made.returncode == 0, made.stderr
    assert "flip: a FlipModel of 205,361 parameters" in made.stdout
    return tmp_path / "flip"


def test_clip_becomes_flip(converted):
    assert FlipModel.from_pretrained(converted).config.mask_ratio == 0.75
    assert (converted / "tokenizer.json").is_file()


def test_flip_becomes_a_clip_again_that_needs_no_code_of_this_package(converted, tmp_path):
    back = run_program(SCRIPT, "to-clip", converted, tmp_path / "again")
    assert back.returncode == 0, back.stderr
    assert type(AutoModel.from_pretrained(tmp_path / "again")) is CLIPModel
    assert "CLIPProcessor" in (tmp_path / "again" / "processor_config.json").read_text()
    for path in (tmp_path / "again").glob("*.json"):
        assert "auto_map" not in path.read_text(), path.name
    assert not list((tmp_path / "again").glob("*.py"))


def test_official_weights_become_a_folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    options = ["--vocab", tmp_path / "vocab.txt", "--vision_heads", 4, "--text_heads", 4]
    made = run_program(SCRIPT, "flip-official", FIXTURES / "official_flip_tiny.zip", tmp_path / "flip", *options)
    assert made.returncode == 0, made.stderr
    tower = FlipVisionModel.from_pretrained(tmp_path / "flip")
    assert tower.config.hidden_size == 96
    again = run_program(SCRIPT, "flip-official", FIXTURES / "official_flip_tiny.zip", tmp_path / "flip", *options)
    assert again.returncode == 1 and "exists already" in again.stderr  # nothing is overwritten


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flip-official", "half.zip", "OUT", "--vocab", "none"], "not a complete zip file"),
        (["flip-official", "absent", "OUT", "--vocab", "none"], "does not exist"),
        (["clip", "flip", "OUT"], "type 'flip'"),
        (["vit-mae", "flip", "OUT"], "not a ViTMAE"),
        (["to-clip", "flip", "OUT"], "text_config.causal is False"),
        (["to-open-clip", "flip", "OUT"], "pooling_type must be 'cls'"),
        (["open-clip", "flip", "OUT"], "no open_clip_config.json"),
    ],
)
def test_a_failed_conversion_leaves_nothing_behind(saved, tmp_path, arguments, message):
    (tmp_path / "half.zip").write_bytes((FIXTURES / "official_flip_tiny.zip").read_bytes()[:99_999])
    saved.rename(tmp_path / "flip")
    before = sorted(tmp_path.iterdir())
    paths = {"flip", "half.zip", "absent", "OUT"}
    words = [str(tmp_path / word) if word in paths else word for word in arguments]
    with pytest.raises(SystemExit) as end:  # in this process: each start of another takes seconds
        main(words)
    assert str(end.value).startswith("error: ") and message in str(end.value)
    assert sorted(tmp_path.iterdir()) == before
