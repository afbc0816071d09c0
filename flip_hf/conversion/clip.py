"""Transformers' CLIPModel to FlipModel.

The names differ in one module (CLIP's `pre_layrnorm`), the shapes in one parameter (`logit_scale`); everything else is
a matter of configuration.
"""

from typing import Any

from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from flip_hf.modeling import FlipConfig, FlipModel

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
_RENAMED = {"vision_model.pre_layrnorm.": "vision_model.pre_layernorm."}
# CLIPTextModel takes this id to mean an old checkpoint, whose end token is the highest id.
_LEGACY_EOS = 2


def _fields(config: CLIPTextConfig | CLIPVisionConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def flip_config_from_clip(config: CLIPConfig, mask_ratio: float = 0.5) -> FlipConfig:
    """The FlipConfig that computes exactly what a CLIPConfig describes, plus a mask ratio for training."""
    text, vision = config.text_config, config.vision_config
    assert isinstance(text, CLIPTextConfig) and isinstance(vision, CLIPVisionConfig)
    special_tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    return FlipConfig(
        text_config={
            **_fields(text, (*_SHARED, "vocab_size", "max_position_embeddings", *special_tokens)),
            "causal": True,
            "pooling_type": "argmax" if text.eos_token_id == _LEGACY_EOS else "eos",
        },
        vision_config={
            **_fields(vision, (*_SHARED, "num_channels", "image_size", "patch_size")),
            "mask_ratio": mask_ratio,
            "pooling_type": "cls",
            "position_embedding_type": "learned",
            "use_pre_layernorm": True,
            "patch_embedding_bias": False,
        },
        projection_dim=config.projection_dim or 512,
        logit_scale_init_value=config.logit_scale_init_value or 0.0,
        max_logit_scale=None,
    )


def clip_to_flip(clip: CLIPModel, mask_ratio: float = 0.5) -> FlipModel:
    """A FlipModel with a CLIPModel's weights: the same numbers on whole images, and masked training.

    Args:
        clip: the model; its weights are copied.
        mask_ratio: fraction of the patches dropped in training.

    Returns:
        The model in evaluation mode.
    """
    flip = FlipModel._from_config(flip_config_from_clip(clip.config, mask_ratio), dtype=clip.dtype)
    tensors = {}
    for name, tensor in clip.state_dict().items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        tensors[name] = tensor.reshape(1) if name == "logit_scale" else tensor
    flip.load_state_dict(tensors)
    return flip.eval()
