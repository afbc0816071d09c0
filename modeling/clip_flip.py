"""Conversion from CLIPModel to FlipModel and back, tensor by tensor.

The two differ in one module's name, in the shape of one parameter, and in configuration. A FlipModel made from a
CLIPModel computes the same numbers on whole images, can be trained on masked ones, and converts back to a stock
CLIPModel, which needs none of this code.
"""

# No `from __future__ import annotations` here, as in the other published files.
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel

from .configuration_flip import FlipConfig

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
)
_TEXT = (*_SHARED, "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
_VISION = (*_SHARED, "num_channels", "image_size", "patch_size")
# Module names, CLIPModel's and FlipModel's; all others are the same.
_RENAMED = (("vision_model.pre_layrnorm.", "vision_model.pre_layernorm."),)
# CLIPTextModel takes this id as the sign of an old checkpoint, whose end token is the highest id.
_LEGACY_EOS = 2
# What a CLIPModel always does. Switches that are not listed are no obstacle: a table of fixed positions is a table like
# a learned one, padding after the end token is never seen, the clip of the temperature is computed into it.
_CLIP_HAS = {
    "text_config.causal": (True,),
    "text_config.pooling_type": ("eos", "argmax"),
    "vision_config.pooling_type": ("cls",),
    "vision_config.use_projection": (True,),
    "vision_config.use_pre_layernorm": (True,),
    "vision_config.patch_embedding_bias": (False,),
    "projection_bias": (False,),
    "logit_bias_init_value": (None,),
}


def read_fields(config: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def flip_config_from_clip(config: CLIPConfig, mask_ratio: float = 0.5) -> FlipConfig:
    """Makes the FlipConfig of exactly the computation of a `CLIPConfig`, plus a mask ratio for training."""
    text = read_fields(config.text_config, _TEXT)
    return FlipConfig(
        text_config={
            **text,
            "causal": True,
            "pooling_type": "argmax" if text["eos_token_id"] == _LEGACY_EOS else "eos",
        },
        vision_config={
            **read_fields(config.vision_config, _VISION),
            "mask_ratio": mask_ratio,
            "pooling_type": "cls",
            "position_embedding_type": "learned",
            "use_pre_layernorm": True,
            "patch_embedding_bias": False,
        },
        **read_fields(config, ("projection_dim", "logit_scale_init_value", "initializer_factor")),
        max_logit_scale=None,
    )


def in_the_way(config: FlipConfig, needed: dict[str, tuple[object, ...]], whose: str) -> list[str]:
    """Lists the switches of a configuration that do not have one of the values that another model always has.

    Args:
        config: the configuration.
        needed: the other model's values, by names such as `vision_config.pooling_type`.
        whose: the other model's name in the genitive, for messages.
    """
    found = []
    for name, allowed in needed.items():
        value: object = config
        for part in name.split("."):
            value = getattr(value, part)
        if value not in allowed:
            found.append(f"{name} is {value!r}, {whose} is {' or '.join(map(repr, allowed))}")
    return found


def clip_config_from_flip(config: FlipConfig) -> CLIPConfig:
    """Makes the CLIPConfig of the same computation.

    Raises:
        ValueError: CLIPModel cannot compute it; the message names the switches in the way.
    """
    text = config.text_config
    obstacles = in_the_way(config, _CLIP_HAS, "CLIP's")
    if text.pooling_type == "eos" and text.eos_token_id == _LEGACY_EOS:
        obstacles.append(f"text_config.eos_token_id is {_LEGACY_EOS}, which CLIPModel takes for an old checkpoint")
    if obstacles:
        raise ValueError(
            f"A CLIPModel cannot compute what this FlipModel does: {'; '.join(obstacles)}. Models that start as CLIP "
            "(FlipModel.from_clip) or are configured like it can be exported; this one is used as a FlipModel."
        )
    text_fields = read_fields(text, (*_TEXT, "projection_dim"))
    if text.pooling_type == "argmax":
        text_fields["eos_token_id"] = _LEGACY_EOS
    return CLIPConfig(
        text_config=text_fields,
        vision_config=read_fields(config.vision_config, (*_VISION, "projection_dim")),
        projection_dim=config.projection_dim,
        logit_scale_init_value=float(config.logit_scale_init_value),
        initializer_factor=float(config.initializer_factor),
    )


# Options that locate a checkpoint, for reading its configuration.
CHECKPOINT_OPTIONS = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download", "proxies")


def load_clip(name_or_path: str, **kwargs: Any) -> CLIPModel:
    """Loads a complete CLIPModel from safetensors.

    Raises:
        ValueError: the checkpoint has another architecture, or tensors are missing or left over.
    """
    found = AutoConfig.from_pretrained(name_or_path, **{k: v for k, v in kwargs.items() if k in CHECKPOINT_OPTIONS})
    if not isinstance(found, CLIPConfig):
        raise ValueError(
            f"{name_or_path} is a checkpoint of type {found.model_type!r}; from_clip takes CLIPModel checkpoints, "
            'whose config.json says "model_type": "clip".'
        )
    return load_whole(CLIPModel, name_or_path, found, **kwargs)


def load_whole(model_class: type[ModelT], name_or_path: str, config: PreTrainedConfig, **kwargs: Any) -> ModelT:
    """Loads a model of exactly the tensors in a checkpoint's safetensors.

    Raises:
        ValueError: tensors are missing or left over.
    """
    loaded: Any = model_class.from_pretrained(
        name_or_path, config=config, use_safetensors=True, output_loading_info=True, **kwargs
    )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    # Old checkpoints store the row numbers 0, 1, 2 ... as well.
    surplus = sorted(name for name in report["unexpected_keys"] if not name.endswith("position_ids"))
    if missing or surplus:
        whole = f"a complete {model_class.__name__}"
        raise ValueError(f"{name_or_path} is not {whole}: missing {missing}, left over {surplus}.")
    return model


def renamed(tensors: Mapping[str, torch.Tensor], pairs: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Returns tensors under names in which the first text of each pair is replaced by the second."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = tensor
    return found


def flip_tensors(clip: CLIPModel) -> dict[str, torch.Tensor]:
    """Returns a CLIPModel's tensors under the names, and in the shapes, that a FlipModel has."""
    tensors = renamed(clip.state_dict(), _RENAMED)
    return {**tensors, "logit_scale": tensors["logit_scale"].reshape(1)}


def make_clip(config: FlipConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> CLIPModel:
    """Makes a CLIPModel of a FlipModel's tensors, which are copied.

    Raises:
        ValueError: CLIPModel does not have this architecture; the message names the switches in the way.
    """
    clip = CLIPModel._from_config(
        clip_config_from_flip(config), dtype=dtype, attn_implementation=config._attn_implementation
    )
    theirs = renamed(tensors, [(ours, theirs) for theirs, ours in _RENAMED])
    clip.load_state_dict({**theirs, "logit_scale": theirs["logit_scale"].reshape(())})
    return clip
