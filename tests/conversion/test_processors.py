"""Tokenizers and image processors that are there but damaged: refused, not left out."""

import json

import pytest
from safetensors.torch import save_file

from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.open_clip import convert_from_open_clip
from flip_hf.conversion.processors import find_image_processor, find_tokenizer


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 10_000, b"\xff\xfe", b'{"model": {"type": "BPE", "merges": 3}}']
)
def test_a_damaged_tokenizer_is_refused(saved, content):
    (saved / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConversionError, match="tokenizer of .* cannot be loaded .*Fix tokenizer.json"):
        find_tokenizer(str(saved), 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_max_length": "long"}, "model_max_length is 'long'|cannot be loaded"),
        ({"model_max_length": 1.5}, "model_max_length is 1.5"),
        ({"model_input_names": "../../x"}, "model_input_names must be a list of plain names"),
        ({"fast_tokenizer_files": ["../tokenizer.1.json"]}, "fast_tokenizer_files must be a list of plain names"),
    ],
)
def test_a_tokenizer_with_odd_settings_is_refused(saved, fields, message):
    path = saved / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ConversionError, match=message):
        find_tokenizer(str(saved), 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_mean": [0.5, None, 0.5]}, "image_mean must be a number"),
        ({"image_std": [0, 0, 0]}, "image_std must be a number from 1e-06"),
        ({"image_std": [0.5, 0.5]}, "image_std must be three numbers"),
        ({"size": {"height": -1, "width": 32}}, "size must be a whole number from 1"),
        ({"do_resize": "no"}, "do_resize must be true or false"),
        ({"rescale_factor": "x"}, "rescale_factor must be a number"),
        ({"resample": 99}, "resample must be a whole number from 0 to 5|cannot be loaded"),
    ],
)
def test_an_image_processor_with_odd_settings_is_refused(saved, fields, message):
    path = saved / "processor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"image_processor": config["image_processor"] | fields}))
    with pytest.raises(ConversionError, match=message):
        find_image_processor(str(saved))


def test_a_link_out_of_the_folder_is_not_followed(saved, tmp_path):
    (saved / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (saved / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(ConversionError, match="outside the checkpoint's folder"):
        find_tokenizer(str(saved), 16)


def test_a_tokenizer_that_was_asked_for_is_not_left_out(tmp_path, open_clip_tiny):
    save_file(open_clip_tiny["state_dict"], tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text(json.dumps(open_clip_tiny["model_cfg"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="--tokenizer .*empty has no tokenizer"):
        convert_from_open_clip(
            str(tmp_path / "a.safetensors"), model_config=str(tmp_path / "a.json"), tokenizer=str(tmp_path / "empty")
        )
