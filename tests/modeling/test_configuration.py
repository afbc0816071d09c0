import json
import math
from typing import get_args

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from flip_hf import FlipConfig, FlipPreTrainingConfig, FlipTextConfig, FlipVisionConfig
from flip_hf.modeling import FlipDecoderConfig
from flip_hf.modeling.configuration_flip import RANGES


def test_defaults_are_the_papers_base_model():
    config = FlipConfig()
    vision = config.vision_config
    text = config.text_config
    assert (vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads) == (12, 768, 12)
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == (12, 512, 8)
    assert (text.max_position_embeddings, config.projection_dim, vision.layer_norm_eps) == (32, 512, 1e-6)
    assert (vision.pooling_type, text.pooling_type, text.causal) == ("mean", "first", False)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, "0.5", True, None])
def test_a_bad_mask_ratio_is_refused_wherever_it_is_given(ratio):
    with pytest.raises(StrictDataclassError):
        FlipVisionConfig(mask_ratio=ratio)
    with pytest.raises(StrictDataclassError):
        FlipConfig(mask_ratio=ratio)
    with pytest.raises(StrictDataclassError):
        FlipConfig().mask_ratio = ratio


def test_mask_ratio_has_one_place():
    config = FlipConfig(mask_ratio=0.75)
    assert config.mask_ratio == config.vision_config.mask_ratio == 0.75
    config.mask_ratio = 0
    assert config.vision_config.mask_ratio == 0
    assert "mask_ratio" not in config.to_dict()


def test_mask_ratio_survives_saving_and_can_be_overridden_in_loading(tmp_path):
    FlipConfig(mask_ratio=0.75).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vision_config.mask_ratio == 0.75
    assert AutoConfig.from_pretrained(tmp_path, mask_ratio=0.0).vision_config.mask_ratio == 0
    assert FlipVisionConfig.from_pretrained(tmp_path).mask_ratio == 0.75


def test_the_mask_strategy_is_the_vision_towers_and_random_where_a_saved_one_has_none(tmp_path):
    config = FlipConfig(mask_strategy="block")
    assert config.vision_config.mask_strategy == "block" and "mask_strategy" not in config.to_dict()
    config.save_pretrained(tmp_path)
    assert FlipConfig.from_pretrained(tmp_path).mask_strategy == "block"
    assert FlipConfig.from_pretrained(tmp_path, mask_strategy="grid").vision_config.mask_strategy == "grid"
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["vision_config"]["mask_strategy"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert FlipConfig.from_pretrained(tmp_path).mask_strategy == "random"


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (FlipVisionConfig, {"mask_strategy": "resize"}, "mask_strategy"),
        (FlipConfig, {"mask_strategy": "blocks"}, "mask_strategy"),
        (FlipVisionConfig, {"image_size": 225}, "224 and 240"),
        (FlipVisionConfig, {"hidden_size": 770}, "multiple of num_attention_heads"),
        (FlipVisionConfig, {"image_size": 32, "mask_ratio": 0.9}, "keeps none of the 4 patches"),
        (FlipVisionConfig, {"pooling_type": "max"}, "pooling_type"),
        (FlipVisionConfig, {"hidden_size": "8"}, "hidden_size"),
        (FlipTextConfig, {"pooling_type": "eos"}, "needs eos_token_id"),
        (FlipTextConfig, {"attend_to_padding": True, "causal": True}, "bidirectional"),
    ],
)
def test_a_bad_architecture_is_refused_with_the_field_named(config_class, fields, message):
    with pytest.raises(StrictDataclassError) as caught:
        config_class(**fields)
    assert message in str(caught.value) + str(caught.value.__cause__)


def test_the_shared_embedding_is_the_same_for_both_towers():
    config = FlipConfig(text_config={"projection_dim": 8}, projection_dim=48, projection_bias=True)
    assert config.text_config.projection_dim == config.vision_config.projection_dim == 48
    assert config.text_config.projection_bias and config.vision_config.projection_bias


def test_config_equals_itself_after_json(tmp_path):
    config = FlipConfig(vision_config={"patch_size": 14}, max_logit_scale=None)
    config.save_pretrained(tmp_path)
    assert FlipConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


CLASSES = [FlipTextConfig, FlipVisionConfig, FlipConfig, FlipDecoderConfig, FlipPreTrainingConfig]
NUMBERS = [
    (config_class, name)
    for config_class in CLASSES
    for name, hint in config_class.__annotations__.items()
    if {int, float} & {hint, *get_args(hint)}
]


@pytest.mark.parametrize(("config_class", "name"), NUMBERS, ids=lambda each: getattr(each, "__name__", each))
def test_every_number_has_a_range(config_class, name):
    assert name in RANGES or name == "mask_ratio"
    low, high = RANGES.get(name, (0, 1))
    outside = [low - 1, high + 1 if high < 2**31 else high * 2, "1", True, math.nan, math.inf, -math.inf, 10**40]
    for value in outside:
        with pytest.raises(StrictDataclassError) as caught:
            config_class(**{name: value})
        assert name in str(caught.value)


def test_options_that_do_not_fit_together_are_named_before_any_division():
    for fields, message in (
        ({"num_attention_heads": 0}, "num_attention_heads must be between 1"),
        ({"num_attention_heads": 7}, "hidden_size .768. must be a multiple of num_attention_heads .7."),
        ({"patch_size": 0}, "patch_size must be between 1"),
        ({"patch_size": 15}, "the nearest are 210 and 225"),
        ({"patch_size": 1, "image_size": 16384}, "make 268,435,456 patches"),
        ({"hidden_act": "gelus"}, "hidden_act is one of gelu, .*, got 'gelus'"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            FlipVisionConfig(**fields)
