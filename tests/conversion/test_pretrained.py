"""Folders of Transformers' models that are incomplete, lead elsewhere, or describe what they do not hold."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flip_hf import FlipModel
from flip_hf.conversion.clip import convert_from_clip, convert_to_clip
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.open_clip import write_open_clip
from tests.helpers.bounded import outcome
from tests.helpers.models import tiny_clip

NAME = "text_model.final_layer_norm.weight"


@pytest.fixture
def clip(tmp_path):
    tiny_clip(99).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def rewrite(folder, change) -> None:
    """Changes the tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def reconfigure(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(clip, value):
    rewrite(clip, lambda tensors: tensors[NAME].view(-1)[:1].fill_(value))
    with pytest.raises(ConversionError, match=rf"infinite numbers or NaN in its weights: 1 \({NAME}\)"):
        convert_from_clip(str(clip))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_weights_of_other_kinds_are_named(clip, dtype):
    rewrite(clip, lambda tensors: tensors.update({NAME: tensors[NAME].to(dtype)}))
    with pytest.raises(ConversionError, match=rf"not plain weights: 1 \({NAME}\)"):
        convert_from_clip(str(clip))


def test_a_tensor_of_another_shape_is_named(clip):
    rewrite(clip, lambda tensors: tensors.update({NAME: torch.ones(3)}))
    with pytest.raises(ConversionError, match=rf"{NAME} has the shape \(3,\), expected"):
        convert_from_clip(str(clip))


@pytest.mark.parametrize("write", [convert_to_clip, lambda source: write_open_clip(source, None)])
def test_a_flip_model_with_a_tensor_missing_is_not_exported_with_a_new_one(clip, tmp_path, write):
    FlipModel.from_clip(str(clip)).save_pretrained(tmp_path / "flip")
    rewrite(tmp_path / "flip", lambda tensors: tensors.pop(NAME))
    with pytest.raises(ConversionError, match=rf"not a complete FlipModel: missing \['{NAME}'\]"):
        write(str(tmp_path / "flip"))


def test_an_adapters_base_is_not_loaded_in_its_place(clip, tmp_path):
    """Transformers goes to the base that an adapter names, if peft is installed."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "config.json").write_bytes((clip / "config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(clip)}))
    with pytest.raises(ConversionError, match="has neither model.safetensors nor"):
        convert_from_clip(str(folder))


def test_pickled_weights_are_not_read(clip):
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="pytorch_model.bin, are not read here"):
        convert_from_clip(str(clip))


@pytest.mark.parametrize(
    "name", ["../clip/model.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", "a\\b.safetensors"]
)
def test_an_index_names_files_of_its_folder_only(clip, tmp_path, name):
    folder = tmp_path / "indexed"
    folder.mkdir()
    (folder / "config.json").write_bytes((clip / "config.json").read_bytes())
    weights = dict.fromkeys(load_file(clip / "model.safetensors"), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(ConversionError, match="names a file other than the folder's weights"):
        convert_from_clip(str(folder))


def test_shards_hold_the_tensors_of_their_index(tmp_path):
    clip = tiny_clip(99)
    clip.save_pretrained(tmp_path / "clip", max_shard_size="200KB")
    flip = convert_from_clip(str(tmp_path / "clip")).model
    assert torch.equal(flip.visual_projection.weight, clip.visual_projection.weight)
    path = tmp_path / "clip" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more"] = index["weight_map"].pop(NAME)
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=rf"Missing: 1 \(more\). Left over: 1 \({NAME}\)"):
        convert_from_clip(str(tmp_path / "clip"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_not_followed(clip, tmp_path, name):
    (clip / name).rename(tmp_path / name)
    (clip / name).symlink_to(tmp_path / name)
    with pytest.raises(ConversionError, match="outside the checkpoint's folder"):
        convert_from_clip(str(clip))


def test_no_room_is_made_for_a_model_that_the_weights_do_not_fill(clip):
    text = json.loads((clip / "config.json").read_text())["text_config"] | {"vocab_size": 2**22, "hidden_size": 2**10}
    reconfigure(clip, text_config=text)
    assert "describes a CLIPModel of 4," in outcome(lambda: convert_from_clip(str(clip)), megabytes=1024)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "has quantization_config"),
        ({"transformers_weights": "../other.safetensors"}, "has transformers_weights"),
        ({"dtype": "float8_e4m3fn"}, "dtype must be one of float32, float16"),
        ({"vision_config": {"image_size": {"a": 1}}}, "vision_config: image_size must be a whole number"),
        ({"vision_config": {"patch_size": 0}}, "vision_config: patch_size must be a whole number from 1"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers must be a whole number from 1 to 512"),
        ({"text_config": {"num_attention_heads": -2}}, "num_attention_heads must be a whole number from 1"),
        (
            {"text_config": {"num_attention_heads": 7, "hidden_size": 64}},
            "7 attention heads do not divide the width, 64",
        ),
        ({"text_config": {"layer_norm_eps": "small"}}, "layer_norm_eps must be a number from 0 to 1"),
        ({"text_config": {"hidden_act": "none_such"}}, "not valid for CLIPModel"),
        ({"text_config": [1]}, "does not describe a CLIPConfig|not valid for CLIPModel"),
        ({"model_type": ["clip"]}, "not a CLIPModel"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(clip, fields, message):
    reconfigure(clip, **fields)
    with pytest.raises(ConversionError, match=message):
        convert_from_clip(str(clip))
