"""Conversion from SiglipModel to FlipModel and back, tensor by tensor.

SigLIP (Zhai et al., 2023, arXiv 2303.15343) and the checkpoints of SigLIP 2 with a fixed resolution have no class
token, pool an image by attention and a text at the last position of its context, padding included, and are compared by
a sigmoid with a bias. A FlipModel made from one computes the same numbers on whole images, can be trained on masked
ones, and converts back to a stock SiglipModel.
"""

# No `from __future__ import annotations` here, as in the other published files.
from typing import Any

import torch
from transformers import AutoConfig, SiglipConfig, SiglipModel

from .clip_flip import CHECKPOINT_OPTIONS, in_the_way, load_whole, read_fields, renamed
from .configuration_flip import FlipConfig

_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
_TEXT = (*_SHARED, "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
_VISION = (*_SHARED, "num_channels", "image_size", "patch_size")
# Module names, SiglipModel's and FlipModel's; all others are the same.
_RENAMED = (("text_model.head.", "text_projection."),)
# The type of SigLIP 2's other checkpoints, and why they are refused.
NAFLEX = "siglip2"
NAFLEX_REFUSED = (
    "{} is a NaFlex checkpoint of SigLIP 2, which encodes images of any shape as sequences of patches. FlipModel takes "
    "square images: use the checkpoint of the same size with a fixed resolution, such as "
    "google/siglip2-base-patch16-256."
)
# What a SiglipModel always does; see clip_flip.py for what need not be listed.
_SIGLIP_HAS = {
    "text_config.causal": (False,),
    "text_config.pooling_type": ("last",),
    "vision_config.pooling_type": ("attention",),
    "vision_config.use_class_token": (False,),
    "vision_config.use_pre_layernorm": (False,),
    "vision_config.patch_embedding_bias": (True,),
    "vision_config.use_projection": (False,),
    "projection_bias": (True,),
}


def _check(config: SiglipConfig) -> None:
    """Checks that FlipModel can compute what this SiglipModel does.

    Raises:
        ValueError: it cannot; the message says why.
    """
    vision: Any = config.vision_config  # a dict or None before it is built
    text: Any = config.text_config
    if not getattr(vision, "vision_use_head", True):  # Transformers 5.17 has no such field
        raise ValueError("This SiglipModel has no attention pooling (vision_use_head=False), so it embeds no images.")
    if text.projection_size != vision.hidden_size:
        raise ValueError(
            f"Texts are embedded in {text.projection_size} numbers and images in {vision.hidden_size}: this is not the "
            "configuration of a complete SiglipModel."
        )
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise ValueError("FlipModel takes square images and patches; this SiglipModel's are not.")


def flip_config_from_siglip(config: SiglipConfig, mask_ratio: float = 0.5) -> FlipConfig:
    """Makes the FlipConfig of exactly the computation of a `SiglipConfig`, plus a mask ratio for training.

    Raises:
        ValueError: FlipModel cannot compute it; the message says why.
    """
    _check(config)
    vision: Any = config.vision_config  # a dict or None before it is built
    text = read_fields(config.text_config, _TEXT)
    return FlipConfig(
        text_config={**text, "causal": False, "pooling_type": "last", "attend_to_padding": True},
        vision_config={
            **read_fields(vision, _VISION),
            "mask_ratio": mask_ratio,
            "pooling_type": "attention",
            "use_class_token": False,
            "position_embedding_type": "learned",
            "ignore_remainder": vision.image_size % vision.patch_size != 0,
            "patch_embedding_bias": True,
            "use_projection": False,
        },
        projection_dim=vision.hidden_size,
        projection_bias=True,
        initializer_factor=config.initializer_factor,
        logit_bias_init_value=-10.0,
        max_logit_scale=None,
    )


def siglip_config_from_flip(config: FlipConfig) -> SiglipConfig:
    """Makes the SiglipConfig of the same computation.

    Raises:
        ValueError: SiglipModel cannot compute it; the message names the switches in the way.
    """
    obstacles = in_the_way(config, _SIGLIP_HAS, "SigLIP's")
    if config.logit_bias_init_value is None:
        obstacles.append("logit_bias_init_value is None, SigLIP's models have a bias")
    if obstacles:
        raise ValueError(
            f"A SiglipModel cannot compute what this FlipModel does: {'; '.join(obstacles)}. Models that start as "
            "SigLIP (FlipModel.from_siglip) or are configured like it can be exported; this one is used as a FlipModel."
        )
    return SiglipConfig(
        text_config={**read_fields(config.text_config, _TEXT), "projection_size": config.projection_dim},
        vision_config=read_fields(config.vision_config, _VISION),
        initializer_factor=float(config.initializer_factor),
    )


def load_siglip(name_or_path: str, **kwargs: Any) -> SiglipModel:
    """Loads a complete SiglipModel from safetensors.

    Raises:
        ValueError: the checkpoint has another architecture, or tensors are missing or left over.
    """
    found = AutoConfig.from_pretrained(name_or_path, **{k: v for k, v in kwargs.items() if k in CHECKPOINT_OPTIONS})
    if found.model_type == NAFLEX:
        raise ValueError(NAFLEX_REFUSED.format(name_or_path))
    if not isinstance(found, SiglipConfig):
        raise ValueError(
            f"{name_or_path} is a checkpoint of type {found.model_type!r}; from_siglip takes SiglipModel checkpoints, "
            'whose config.json says "model_type": "siglip".'
        )
    return load_whole(SiglipModel, name_or_path, found, **kwargs)


def flip_tensors_of_siglip(siglip: SiglipModel) -> dict[str, torch.Tensor]:
    """Returns a SiglipModel's tensors under the names that a FlipModel has."""
    return renamed(siglip.state_dict(), _RENAMED)


def make_siglip(config: FlipConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> SiglipModel:
    """Makes a SiglipModel of a FlipModel's tensors, which are copied.

    Raises:
        ValueError: SiglipModel does not have this architecture; the message names the switches in the way.
    """
    siglip = SiglipModel._from_config(
        siglip_config_from_flip(config), dtype=dtype, attn_implementation=config._attn_implementation
    )
    siglip.load_state_dict(renamed(tensors, [(ours, theirs) for theirs, ours in _RENAMED]))
    return siglip
