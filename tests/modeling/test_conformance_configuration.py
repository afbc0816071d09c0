"""Transformers' expectations of any configuration and any model class.

In the spirit of Transformers' own mixins, which are not shipped. What is FLIP's own is in test_flip_model.py.
"""

import copy
import inspect
import json
import pickle

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPVisionConfig

from flip_hf import (
    FlipConfig,
    FlipForImageClassification,
    FlipModel,
    FlipTextConfig,
    FlipVisionConfig,
)
from tests.helpers.conformance import ALL, ARCHITECTURES, CONFIGS, EACH, TEXT_MODELS, build, fields_of, make_inputs
from tests.helpers.models import tiny_config


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_config_is_the_same_after_json_copy_and_pickle(config_class, tmp_path):
    config = config_class(projection_dim=24, id2label={0: "cat", 1: "dog"}, initializer_factor=0.5)
    expected = fields_of(config)
    assert fields_of(config_class.from_dict(json.loads(config.to_json_string()))) == expected
    config.to_json_file(tmp_path / "config.json")
    assert fields_of(config_class.from_json_file(tmp_path / "config.json")) == expected
    config.save_pretrained(tmp_path / "saved")
    assert fields_of(config_class.from_pretrained(tmp_path / "saved")) == expected
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is config_class
    assert fields_of(copy.deepcopy(config)) == fields_of(pickle.loads(pickle.dumps(config))) == expected


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_a_tower_config_loads_from_the_whole_ones_folder(key, tmp_path):
    config = tiny_config(**ARCHITECTURES["clip"])
    config.save_pretrained(tmp_path)
    part = getattr(config, key)
    assert type(part).base_config_key == key
    loaded = type(part).from_pretrained(tmp_path)
    assert fields_of(loaded) == fields_of(part)
    loaded.save_pretrained(tmp_path / "alone")
    assert fields_of(type(part).from_pretrained(tmp_path / "alone")) == fields_of(part)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_making_a_config_logs_nothing(config_class, warnings_logged):
    config_class()
    config_class(num_labels=3)
    config_class.from_dict(config_class().to_dict())
    assert warnings_logged == []


def test_labels_and_their_number_follow_each_other(tmp_path):
    config = FlipConfig(num_labels=5)
    assert len(config.id2label) == len(config.label2id) == 5
    config.num_labels = 3
    assert len(config.id2label) == len(config.label2id) == 3
    config = FlipConfig(id2label={0: "cat", 1: "dog", 2: "eel", 3: "fox"}, label2id={"cat": 0})
    assert config.num_labels == 4
    config.save_pretrained(tmp_path)
    assert FlipConfig.from_pretrained(tmp_path).id2label == config.id2label  # the keys are integers again
    assert FlipForImageClassification(tiny_config(num_labels=4)).classifier.out_features == 4


@pytest.mark.parametrize(
    ("config_class", "name", "value"),
    [
        *[(c, n, v) for c in CONFIGS[1:] for n, v in (("hidden_size", 96), ("num_attention_heads", 4))],
        *[(c, "num_hidden_layers", 3) for c in CONFIGS[1:]],
        (FlipTextConfig, "vocab_size", 64),
        (FlipVisionConfig, "image_size", 64),
        (FlipConfig, "projection_dim", 64),
        (FlipConfig, "logit_scale_init_value", 1.5),
    ],
)
def test_common_properties_can_be_given_and_set(config_class, name, value):
    assert getattr(config_class(**{name: value}), name) == value
    config = config_class()
    setattr(config, name, value)
    assert getattr(config, name) == value == config.to_dict()[name]


def test_the_whole_config_takes_its_towers_as_dicts_objects_or_not_at_all():
    text = {"hidden_size": 64, "causal": True}
    vision = {"patch_size": 32}
    from_dicts = FlipConfig(text_config=text, vision_config=vision)
    from_objects = FlipConfig(text_config=FlipTextConfig(**text), vision_config=FlipVisionConfig(**vision))
    assert from_dicts.to_dict() == from_objects.to_dict()
    assert FlipConfig(text_config=None, vision_config=None).to_dict() == FlipConfig().to_dict()
    assert FlipConfig().text_config.to_dict() == FlipTextConfig().to_dict()
    assert FlipConfig().vision_config.to_dict() == FlipVisionConfig().to_dict()
    # A whole dict of a tower, with its `model_type`, as it stands in config.json.
    whole = FlipConfig(text_config=from_dicts.text_config.to_dict(), vision_config=vision)
    assert whole.to_dict() == from_dicts.to_dict()
    assert text == {"hidden_size": 64, "causal": True}  # the caller's dict is left as it was


@pytest.mark.parametrize("wrong", [{"text_config": FlipVisionConfig()}, {"vision_config": CLIPVisionConfig()}])
def test_another_models_tower_is_refused(wrong):
    with pytest.raises(StrictDataclassError, match="_config"):
        FlipConfig(**wrong)


def test_the_whole_config_names_its_towers():
    parts = {"text_config": FlipTextConfig, "vision_config": FlipVisionConfig}
    assert FlipConfig.sub_configs == parts and FlipTextConfig.sub_configs == FlipVisionConfig.sub_configs == {}
    config = FlipConfig()
    assert config.get_text_config() is config.text_config
    assert {c.model_type for c in CONFIGS} == {"flip", "flip_text_model", "flip_vision_model"}
    assert [type(AutoConfig.for_model(c.model_type)) for c in CONFIGS] == CONFIGS


def test_two_configs_share_nothing():
    first = FlipConfig()
    second = FlipConfig()
    first.text_config.hidden_size = 8
    first.vision_config.mask_ratio = 0.75
    assert (second.text_config.hidden_size, second.mask_ratio) == (512, 0.5)
    text = FlipTextConfig()
    first, second = (FlipConfig(text_config=text, projection_dim=size) for size in (64, 32))
    assert (first.text_config.projection_dim, second.text_config.projection_dim) == (64, 32)


def test_the_shared_embedding_stays_shared_when_it_is_changed(tmp_path):
    """`from_pretrained` assigns what it is given after the configuration is built."""
    FlipConfig(projection_dim=64).save_pretrained(tmp_path)
    config = FlipConfig.from_pretrained(tmp_path, projection_dim=32)
    assert config.projection_dim == config.text_config.projection_dim == config.vision_config.projection_dim == 32


def test_a_saved_config_holds_nothing_of_this_process(tmp_path):
    build(FlipModel).save_pretrained(tmp_path / "made")
    FlipModel.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "first")
    model = FlipModel.from_pretrained(tmp_path / "made", attn_implementation="eager", device_map="cpu").train()
    model.save_pretrained(tmp_path / "second")
    text = (tmp_path / "second" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert not any(word in text for word in ("attn_implementation", "_commit_hash", "device_map", "name_or_path"))
    assert json.loads(text) == json.loads((tmp_path / "first" / "config.json").read_text())
    assert json.loads(text)["transformers_version"] == transformers.__version__


def test_a_field_of_a_later_version_does_not_stop_loading(tmp_path):
    FlipConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["from_the_future"] = fields["vision_config"]["from_the_future"] = 1
    path.write_text(json.dumps(fields))
    assert FlipConfig.from_pretrained(tmp_path).vision_config.from_the_future == 1


# -- the class itself -------------------------------------------------------------------------------------------------


@EACH
def test_the_first_argument_is_the_main_input(model_class):
    arguments = list(inspect.signature(model_class.forward).parameters.values())
    assert arguments[1].name == model_class.main_input_name
    assert arguments[-1].kind is inspect.Parameter.VAR_KEYWORD
    expected = {"input_ids": ("text",), "pixel_values": ("image",)}[model_class.main_input_name]
    assert model_class.input_modalities == (("image", "text") if model_class is FlipModel else expected)


@ALL
def test_a_model_neither_generates_nor_ties_and_counts_its_parameters(model_class, architecture):
    model = build(model_class, architecture)
    assert not model.can_generate()
    assert not model.all_tied_weights_keys
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert all(p.ndim > 0 for p in model.parameters())
    assert all(p.is_contiguous() for p in model.parameters())


@EACH
def test_the_modules_that_must_stay_whole_exist(model_class):
    """accelerate splits a model over devices between them."""
    model = build(model_class)
    present = {type(module).__name__ for module in model.modules()}
    named = set(model._no_split_modules)
    assert {name for name in present if name.endswith(("Embeddings", "EncoderLayer"))} <= named
    assert model_class is not FlipModel or named <= present


@EACH
def test_input_embeddings_can_be_read_and_replaced(model_class):
    """Of two kinds of input, FlipModel shows its texts' embeddings, as SiglipModel does."""
    model = build(model_class)
    inputs = make_inputs(model_class)
    before = model(**inputs)[0]
    embeddings = model.get_input_embeddings()
    assert embeddings.weight.shape[0] == (600 if model_class in [FlipModel, *TEXT_MODELS] else 32)
    replaced = copy.deepcopy(embeddings)
    torch.nn.init.zeros_(replaced.weight)
    model.set_input_embeddings(replaced)
    assert model.get_input_embeddings() is replaced
    assert not torch.allclose(model(**inputs)[0], before)


@pytest.mark.parametrize("model_class", TEXT_MODELS)
def test_the_vocabulary_can_grow(model_class, tmp_path):
    model = build(model_class)
    inputs = make_inputs(model_class)
    before = model(**inputs)[0]
    model.resize_token_embeddings(610)
    assert model.config.vocab_size == 610
    assert model.get_input_embeddings().weight.shape == (610, 32)
    assert torch.equal(model(**inputs)[0], before)  # old tokens keep their rows
    inputs["input_ids"][0, 0] = 609
    grown = model(**inputs)[0]
    assert grown.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["mismatched_keys"]
    assert torch.equal(loaded(**inputs)[0], grown)
    model.resize_token_embeddings(600)
    assert model.get_input_embeddings().weight.shape == (600, 32)


@pytest.mark.parametrize("asked", ["whole model", "text tower"])
def test_the_vocabulary_of_the_whole_model_can_grow(asked, tmp_path):
    model = build(FlipModel)
    inputs = make_inputs(FlipModel)
    (model if asked == "whole model" else model.text_model).resize_token_embeddings(610)
    assert model.config.text_config.vocab_size == 610  # the tower's configuration is the whole one's part
    inputs["input_ids"][0, 0] = 609
    model.save_pretrained(tmp_path)
    assert torch.equal(FlipModel.from_pretrained(tmp_path)(**inputs).text_embeds, model(**inputs).text_embeds)
