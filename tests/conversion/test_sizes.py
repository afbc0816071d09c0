"""Numbers of options and of open_clip's configurations, each refused in a sentence."""

import copy

import pytest
import torch

from flip_hf import FlipVisionModel
from flip_hf.conversion.clip import convert_from_clip
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.mae import convert_from_mae
from flip_hf.conversion.official import read_official
from flip_hf.conversion.open_clip import convert_from_open_clip
from flip_hf.conversion.open_clip_config import config_from_open_clip
from flip_hf.conversion.processors import image_processor_from_open_clip
from flip_hf.conversion.tables import load
from tests.helpers.models import tiny_config


@pytest.mark.parametrize("option", ["vision_heads", "text_heads"])
@pytest.mark.parametrize("value", [-2, 0, 5, 1000, 2.0, True])
def test_heads_that_do_not_divide_the_width_are_refused(official_zip, option, value):
    heads = {"vision_heads": 4, "text_heads": 4} | {option: value}
    with pytest.raises(ConversionError, match=f"--{option} {value!r} is not a number of attention heads for the width"):
        read_official(official_zip, **heads)


@pytest.mark.parametrize("convert", [convert_from_clip, convert_from_mae, convert_from_open_clip])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), float("inf"), "half", None])
def test_a_mask_ratio_is_checked_before_anything_is_read(convert, value):
    with pytest.raises(ConversionError, match=r"--mask_ratio .* is not in \[0, 1\)"):
        convert("none/such", mask_ratio=value)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("vision_cfg", "head_width", 0, "vision_cfg.head_width must be a whole number from 1"),
        ("vision_cfg", "width", "wide", "vision_cfg.width must be a whole number"),
        ("vision_cfg", "layers", 10**9, "vision_cfg.layers must be a whole number from 1 to 512"),
        ("vision_cfg", "image_size", -24, "vision_cfg.image_size must be a whole number"),
        ("vision_cfg", "image_size", 25, "do not divide an image of 25"),
        ("vision_cfg", "head_width", 1000, "num_attention_heads must be a whole number from 1"),
        ("vision_cfg", "mlp_ratio", float("inf"), "vision_cfg.mlp_ratio must be a number"),
        ("vision_cfg", "mlp_ratio", [4], "vision_cfg.mlp_ratio must be a number"),
        ("vision_cfg", "act_kwargs", [1], "vision_cfg.act_kwargs must be an object"),
        ("vision_cfg", "no_ln_pre", "yes", "vision_cfg.no_ln_pre must be true or false"),
        ("text_cfg", "heads", -4, "text_cfg.heads must be a whole number"),
        ("text_cfg", "heads", 5, "do not divide the width"),
        ("text_cfg", "vocab_size", 2**40, "text_cfg.vocab_size must be a whole number"),
        ("text_cfg", "context_length", None, "text_cfg.context_length must be a whole number"),
        ("text_cfg", "norm_kwargs", {"eps": "x"}, "layer_norm_eps must be a number"),
        ("text_cfg", "eos_id", "x", "text_cfg.eos_id must be a whole number"),
        (None, "embed_dim", 0, "projection_dim must be a whole number"),
        (None, "quick_gelu", [1], "model_cfg.quick_gelu must be true or false"),
        (None, "init_logit_scale", "hot", "logit_scale_init_value must be a number"),
    ],
)
def test_open_clips_configurations_are_checked_field_by_field(open_clip_tiny, part, field, value, message):
    model_cfg = copy.deepcopy(open_clip_tiny["model_cfg"])
    (model_cfg if part is None else model_cfg[part])[field] = value
    with pytest.raises(ConversionError, match=message):
        config_from_open_clip(model_cfg)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": "x"}, "mean must be three numbers"),
        ({"mean": [0.5]}, "mean must be three numbers"),
        ({"std": [0.5, None, 0.5]}, "std must be a number"),
        ({"std": [0, 0, 0]}, "std must be a number from 1e-06"),
        ({"interpolation": ["bicubic"]}, "resize_mode 'shortest' and interpolation"),
    ],
)
def test_open_clips_preprocessing_is_checked(fields, message):
    with pytest.raises(ConversionError, match=message):
        image_processor_from_open_clip(fields, 32)


def test_mixed_dtypes_are_read_in_the_one_that_holds_both():

    config = tiny_config().vision_config
    tensors = FlipVisionModel(config).state_dict()
    name = next(iter(tensors))
    for first, second, expected in (
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ):
        mixed = {n: tensor.to(second if n == name else first) for n, tensor in tensors.items()}
        assert load(FlipVisionModel, config, mixed).dtype == expected
