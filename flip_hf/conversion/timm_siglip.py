"""Describes SigLIP's image towers as timm has them: open_clip's configurations name one and leave its sizes to timm.

The table is that of timm 1.0.31. SigLIP (Zhai et al., 2023, arXiv 2303.15343), its i18n models and SigLIP 2 share these
architectures; of the activations, timm has the exact GELU in some and its tanh approximation in others.
"""

from dataclasses import dataclass

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.errors import ConversionError
from flip_hf.modeling import FlipVisionConfig


@dataclass(frozen=True)
class Size:
    """The sizes of a tower: width, number of blocks, attention heads, and width of the MLP's hidden layer."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


SIZES = {
    "base": Size(768, 12, 12, 3072),
    "large": Size(1024, 24, 16, 4096),
    "so400m": Size(1152, 27, 16, 4304),
    "giantopt": Size(1536, 40, 16, 6144),
}
# By size, side of a patch and side of the image, both in pixels: the activation.
TOWERS = {
    ("base", 16, 224): "gelu",
    ("base", 16, 256): "gelu",
    ("base", 16, 384): "gelu",
    ("base", 16, 512): "gelu",
    ("base", 32, 256): "gelu_pytorch_tanh",
    ("large", 16, 256): "gelu",
    ("large", 16, 384): "gelu",
    ("large", 16, 512): "gelu_pytorch_tanh",
    ("so400m", 14, 224): "gelu",
    ("so400m", 14, 378): "gelu",
    ("so400m", 14, 384): "gelu",
    ("so400m", 16, 256): "gelu_pytorch_tanh",
    ("so400m", 16, 384): "gelu_pytorch_tanh",
    ("so400m", 16, 512): "gelu_pytorch_tanh",
    ("giantopt", 16, 256): "gelu_pytorch_tanh",
    ("giantopt", 16, 384): "gelu_pytorch_tanh",
}
# What every one of them has, as fields of a FlipVisionConfig.
ALL_HAVE = {
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "pooling_type": "attention",
    "use_class_token": False,
    "use_projection": False,
    "use_pre_layernorm": False,
    "patch_embedding_bias": True,
    "position_embedding_type": "learned",
}
# Fields of open_clip that must have one value: pooling by attention, and no projection after it.
_FIXED = {"timm_pool": "map", "timm_proj": "none"}


def timm_name(size: str, patch_size: int, image_size: int) -> str:
    """Returns the name of a tower in timm."""
    return f"vit_{size}_patch{patch_size}_siglip_{image_size}"


NAMES = {timm_name(*tower): tower for tower in TOWERS}


def vision_fields(vision_cfg: JsonObject, embed_dim: object) -> JsonObject:
    """Returns a FlipVisionConfig's fields for a `vision_cfg` that names a tower of timm.

    Args:
        vision_cfg: open_clip's configuration of the image tower.
        embed_dim: length of the model's embeddings.

    Raises:
        ConversionError: it is not one of SigLIP's towers, or the configuration's other fields do not fit it.
    """
    name = vision_cfg["timm_model_name"]
    if not isinstance(name, str) or name not in NAMES:
        raise ConversionError(
            f"This open_clip model has vision_cfg.timm_model_name = {name!r:.80}, which FLIP does not support. Of "
            "timm's image towers only SigLIP's can be converted, such as vit_base_patch16_siglip_224."
        )
    for field, value in _FIXED.items():
        if vision_cfg.get(field) != value:
            raise ConversionError(
                f"This open_clip model has vision_cfg.{field} = {vision_cfg.get(field)!r:.80}, which FLIP does not "
                f"support. Towers such as {name} can be converted with {value!r} alone."
            )
    size, patch_size, image_size = NAMES[name]
    if vision_cfg.get("image_size", 224) != image_size:
        raise ConversionError(
            f"This open_clip model has vision_cfg.image_size = {vision_cfg.get('image_size', 224)!r:.80}, but "
            f"{name} takes images of {image_size} pixels. Give the name of the tower that the weights belong to."
        )
    if embed_dim != SIZES[size].hidden_size:
        raise ConversionError(
            f"This open_clip model has embed_dim = {embed_dim!r:.80}, but {name} has no projection: its features have "
            f"{SIZES[size].hidden_size} numbers."
        )
    return {
        **vars(SIZES[size]),
        **ALL_HAVE,
        "hidden_act": TOWERS[size, patch_size, image_size],
        "image_size": image_size,
        "patch_size": patch_size,
        "ignore_remainder": image_size % patch_size != 0,
    }


def vision_cfg_of(config: FlipVisionConfig) -> JsonObject:
    """Returns open_clip's configuration of an image tower of SigLIP's.

    Raises:
        ConversionError: timm has no such tower; the message names the options in the way.
    """
    in_the_way = [f"{name} must be {value!r}" for name, value in ALL_HAVE.items() if getattr(config, name) != value]
    fitting = [
        tower
        for tower in TOWERS
        if all(getattr(config, name) == value for name, value in vars(SIZES[tower[0]]).items())
        and tower[1:] == (config.patch_size, config.image_size)
    ]
    if not fitting:
        in_the_way.append(f"the sizes must be those of one of timm's towers ({', '.join(NAMES)})")
    elif config.hidden_act != TOWERS[fitting[0]]:
        in_the_way.append(f"hidden_act must be {TOWERS[fitting[0]]!r}, as in {timm_name(*fitting[0])}")
    if in_the_way:
        raise ConversionError(
            f"timm has no SigLIP image tower that computes what this one does: in vision_config, "
            f"{'; '.join(in_the_way)}."
        )
    return {"image_size": config.image_size, "timm_model_name": timm_name(*fitting[0]), **_FIXED}
