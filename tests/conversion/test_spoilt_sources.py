"""Every file of every kind of source, spoilt in every way: one line of an error, and nothing is written."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from flip_hf import FlipModel
from flip_hf.commands.convert import main
from tests.helpers.models import tiny_clip
from tests.helpers.siglip_folder import save_siglip_1

VALUES = [None, True, -1, 0, 10**12, 1.5, "x", [], [1], {}, {"a": 1}, "\x1b[31m\n"]


@pytest.fixture
def source(request, tmp_path):
    """A folder to convert, built by the parameter."""
    home = tmp_path / "source"
    home.mkdir()
    request.param(home, request.getfixturevalue)
    return home


def clip(home, fixture) -> None:
    tiny_clip(99).save_pretrained(home)
    _copy_processor(fixture("saved"), home)


def siglip(home, fixture) -> None:
    save_siglip_1(home)


def shards(home, fixture) -> None:
    tiny_clip(99).save_pretrained(home, max_shard_size="200KB")


def flip(home, fixture) -> None:
    FlipModel.from_clip(tiny_clip(99)).save_pretrained(home)
    _copy_processor(fixture("saved"), home)


def _copy_processor(saved, home) -> None:
    for path in saved.iterdir():
        if "processor" in path.name or "tokenizer" in path.name:
            shutil.copy(path, home / path.name)


def mae(home, fixture) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, image_size=32, patch_size=8)).save_pretrained(home)


def open_clip(home, fixture) -> None:
    tiny = fixture("open_clip_tiny")
    (home / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny["model_cfg"]}))
    save_file(tiny["state_dict"], home / "open_clip_model.safetensors")


def pickled(home, fixture) -> None:
    open_clip(home, fixture)
    torch.save(load_file(home / "open_clip_model.safetensors"), home / "open_clip_pytorch_model.bin")
    (home / "open_clip_model.safetensors").unlink()


def official(home, fixture) -> None:
    shutil.move(fixture("vocab"), home / "vocab.txt")
    shutil.move(fixture("official_folder"), home / "checkpoint_1")


FILES = [
    *(("clip", clip, name) for name in ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json")),
    *(("clip", shards, name) for name in ("model.safetensors.index.json", "model-00001-of-*.safetensors")),
    *(("siglip", siglip, name) for name in ("spiece.model", "tokenizer_config.json")),
    *(("to-clip", flip, name) for name in ("config.json", "model.safetensors", "tokenizer_config.json")),
    *(("to-open-clip", flip, name) for name in ("config.json", "model.safetensors")),
    *(("vit-mae", mae, name) for name in ("config.json", "model.safetensors")),
    *(("open-clip", open_clip, name) for name in ("open_clip_config.json", "open_clip_model.safetensors")),
    ("open-clip", pickled, "open_clip_pytorch_model.bin"),
    *(("flip-official", official, f"checkpoint_1/{name}") for name in ("checkpoint", "target.img_mlp1.kernel/.zarray")),
    *(("flip-official", official, name) for name in ("checkpoint_1/target.img_mlp1.kernel/0.0", "vocab.txt")),
]


def places(value, path=()):
    """The ways to every value in a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def with_values(data, generator, count):
    """Documents with another value at one place."""
    ways = list(places(json.loads(data)))
    for _ in range(count):
        document = json.loads(data)
        *inner, last = generator.choice(ways)
        place = document
        for key in inner:
            place = place[key]
        place[last] = generator.choice(VALUES)
        yield json.dumps(document).encode()


def replacements(path, data):
    """Yields things that may be in a file's place: bytes, or a function that puts something there."""
    generator = random.Random(0)
    yield from (b"", generator.randbytes(200), data[: len(data) // 2], data[:-1], b"[" * 100_000)
    yield from (b"{}", b"[]", b"null", b"\xff\xfe" + data)
    for _ in range(2):
        flipped = bytearray(data)
        flipped[generator.randrange(min(len(data), 400))] ^= 1 << generator.randrange(8)
        yield bytes(flipped)
    if path.suffix == ".json" or path.name == ".zarray":
        yield from with_values(data, generator, 10)
    yield from (lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path.name))
    yield lambda: path.symlink_to("/dev/zero")


def put(path, replacement) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(replacement) if isinstance(replacement, bytes) else replacement()


@pytest.mark.parametrize(
    ("command", "source", "name"), FILES, indirect=["source"], ids=[f"{c}-{b.__name__}-{n}" for c, b, n in FILES]
)
def test_a_spoilt_file_ends_in_one_line_and_leaves_nothing(source, tmp_path, command, name):
    out = tmp_path / "made" / "here"
    options = ["--vocab", source / "vocab.txt", "--vision_heads", 4, "--text_heads", 4]
    words = [str(word) for word in (command, source, out, *(options if command == "flip-official" else []))]
    (path,) = list(source.glob(name))[:1]
    data = path.read_bytes()
    refused = 0
    for replacement in replacements(path, data):
        put(path, replacement)
        try:
            main(words)
            shutil.rmtree(out.parent)  # what is spoilt was of no account
        except SystemExit as end:
            refused += 1
            message = str(end)
            assert message.startswith("error: ") and "\n" not in message and len(message) < 2100
            assert not out.parent.exists()
    assert refused >= 8
    put(path, data)
    main(words)
    assert any(out.iterdir())
