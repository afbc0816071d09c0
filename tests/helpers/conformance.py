"""Shared parts of the conformance tests: the classes, four architectures, inputs, comparisons."""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from flip_hf import (
    FlipConfig,
    FlipForImageClassification,
    FlipModel,
    FlipTextConfig,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionConfig,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)
from tests.helpers.models import IMAGE_SIZE, randomize, tiny_config

CONFIGS = [FlipConfig, FlipTextConfig, FlipVisionConfig]
TEXT_MODELS = [FlipTextModel, FlipTextModelWithProjection]
IMAGE_MODELS = [FlipVisionModel, FlipVisionModelWithProjection, FlipForImageClassification]
MODELS = [FlipModel, *TEXT_MODELS, *IMAGE_MODELS]
EOS = 599
ARCHITECTURES = {
    "flip": {},
    "clip": {
        "text": {"causal": True, "pooling_type": "eos", "eos_token_id": EOS, "hidden_act": "quick_gelu"},
        "vision": {
            **{"pooling_type": "cls", "position_embedding_type": "learned", "hidden_act": "quick_gelu"},
            **{"use_pre_layernorm": True, "patch_embedding_bias": False},
        },
        "max_logit_scale": None,
    },
    "siglip": {
        "text": {"pooling_type": "last", "attend_to_padding": True},
        "vision": {
            **{"pooling_type": "attention", "position_embedding_type": "learned"},
            **{"use_class_token": False, "use_projection": False},
        },
        **{"projection_dim": 32, "projection_bias": True, "logit_bias_init_value": -10.0, "max_logit_scale": None},
    },
    "clipa": {
        "text": {"pooling_type": "last", "attend_to_padding": True, "hidden_act": "gelu"},
        "vision": {"pooling_type": "patch_mean", "position_embedding_type": "learned", "hidden_act": "gelu"},
        "max_logit_scale": None,
    },
}
ALL = pytest.mark.parametrize(
    ("model_class", "architecture"), [(model_class, name) for model_class in MODELS for name in ARCHITECTURES]
)
EACH = pytest.mark.parametrize("model_class", MODELS)


def part_for(model_class: type, config: FlipConfig):
    """The configuration that this class takes, out of the whole one."""
    parts = {FlipConfig: config, FlipTextConfig: config.text_config, FlipVisionConfig: config.vision_config}
    return parts[model_class.config_class]


def build(model_class: type, architecture: str = "flip", text=None, vision=None, **kwargs) -> PreTrainedModel:
    """A tiny model with every parameter off its initial value, in evaluation mode; other fields as given."""
    fields = {"num_labels": 3, **ARCHITECTURES[architecture], **kwargs}
    fields["text"] = {**fields.get("text", {}), **(text or {})}
    fields["vision"] = {**fields.get("vision", {}), **(vision or {})}
    return randomize(model_class(part_for(model_class, tiny_config(**fields)))).eval()


def make_inputs(model_class: type, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Three images, and three texts of 3, 7 and 5 tokens that end in EOS, as far as the class takes them."""
    inputs = {}
    if model_class not in TEXT_MODELS:
        inputs["pixel_values"] = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=dtype)
    if model_class not in IMAGE_MODELS:
        lengths = torch.tensor([3, 7, 5])[:, None]
        mask = (torch.arange(7) < lengths).long()
        ids = torch.randint(1, EOS, (3, 7)) * mask
        inputs |= {"input_ids": ids.scatter(1, lengths - 1, EOS), "attention_mask": mask}
    return inputs


def training_loss(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A scalar to train on, by class: the model's own loss where it has one."""
    if isinstance(model, FlipModel):
        return model(**inputs, return_loss=True).loss
    if isinstance(model, FlipForImageClassification):
        return model(**inputs, labels=torch.tensor([0, 1, 2])).loss
    outputs = model(**inputs)
    embeds = [outputs.get(name) for name in ("text_embeds", "image_embeds", "pooler_output")]
    return next(e for e in embeds if e is not None).pow(2).sum()


def assert_same(first, second, equal=torch.equal):
    """Two outputs, nested as they may be, hold the same tensors."""
    if isinstance(first, torch.Tensor):
        assert first.shape == second.shape and equal(first, second)
        return
    assert len(first) == len(second) > 0
    pairs = zip(first.to_tuple(), second.to_tuple(), strict=True) if isinstance(first, ModelOutput) else None
    for one, other in pairs or zip(first, second, strict=True):
        assert_same(one, other, equal)


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal up to float64's own noise."""
    return torch.allclose(first, second, rtol=1e-10, atol=1e-12)


def fields_of(config) -> dict:
    """A configuration as a dict, without what saving and loading write into it."""
    notes = ("auto_map", "_name_or_path", "dtype", "architectures")
    clean = {name: value for name, value in config.to_dict().items() if name not in notes}
    for key in ("text_config", "vision_config"):
        if key in clean:
            clean[key] = {name: value for name, value in clean[key].items() if name not in notes}
    return clean


LAYER = [
    f"layers.0.{name}.{kind}"
    for name in (
        *("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        *("layer_norm2", "mlp.fc1", "mlp.fc2"),
    )
    for kind in ("weight", "bias")
]
