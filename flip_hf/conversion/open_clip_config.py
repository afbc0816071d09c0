"""Convert open_clip's model configuration to FlipConfig and back."""

from typing import Any

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.sizes import check_fields, configuring, number, whole_number
from flip_hf.modeling import FlipConfig

# Fields of open_clip's configuration that become ours, and those without effect here, which may have any value. All
# others change the model, and must have a value that means "off".
_READ = {
    "vision_cfg": {
        *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre", "pos_embed_type"),
        *("act_kwargs", "norm_kwargs", "patch_dropout", "output_tokens"),
        *("attn_pooler_queries", "attn_pooler_heads", "timm_pool", "timm_proj", "timm_drop"),
    },
    "text_cfg": {
        *("layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size", "no_causal_mask", "pool_type"),
        *("act_kwargs", "norm_kwargs", "pad_id", "eos_id", "output_tokens"),
        *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained", "hf_proj_type"),
        *("hf_pooler_type",),
    },
    "model_cfg": {
        *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "custom_text"),
        *("nonscalar_logit_scale", "output_dict", "cast_dtype"),
    },
}
_OFF = {"pool_type": "tok", "block_type": "default", "proj_type": "linear"}
_ACTIVATIONS = {"quick_gelu": {"quick_gelu": True}, "gelu": {}, "gelu_pytorch_tanh": {"approximate": "tanh"}}
# Whole numbers in a tower's configuration with their largest values; other sizes follow from them.
_SIZES = {
    **{"layers": 512, "width": 2**16, "head_width": 2**16, "patch_size": 2**12, "image_size": 2**13},
    **{"heads": 2**12, "context_length": 2**17, "vocab_size": 2**22},
}
_IDS = ("pad_id", "eos_id")
_SWITCHES = ("quick_gelu", "no_ln_pre", "no_causal_mask")
_OBJECTS = ("act_kwargs", "norm_kwargs")
MAX_MLP_RATIO = 64


def _check_tower(part: str, fields: JsonObject) -> None:
    """Checks types and ranges of the fields of a tower that are read."""
    for name, value in fields.items():
        where = f"This open_clip model's {part}.{name}"
        if name in _SIZES:
            whole_number(where, value, _SIZES[name])
        elif name in _IDS and value is not None:
            whole_number(where, value, _SIZES["vocab_size"], least=-1)
        elif name in _SWITCHES and value is not None and type(value) is not bool:
            raise ConversionError(f"{where} must be true or false, got {value!r:.80}.")
        elif name == "mlp_ratio":
            number(where, value, 0.0, MAX_MLP_RATIO)
        elif name in _OBJECTS and not isinstance(value or {}, dict):
            raise ConversionError(f"{where} must be an object, got {value!r:.80}.")


def _refuse_unknown(part: str, fields: JsonObject) -> None:
    for name, value in fields.items():
        if name not in _READ[part] and value and value != _OFF.get(name):
            raise ConversionError(
                f"This open_clip model has {part}.{name} = {value!r}, which FLIP does not support. Only native "
                "ViT towers with standard blocks can be converted."
            )


def _activation(quick_gelu: bool, fields: JsonObject) -> str:
    approximate = (fields.get("act_kwargs") or {}).get("approximate", "none")
    return "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if approximate == "tanh" else "gelu"


def _tower(fields: JsonObject, *, width: int, layers: int, quick_gelu: bool) -> JsonObject:
    width = fields.get("width", width)
    layers = fields.get("layers", layers)
    return {
        "hidden_size": width,
        "intermediate_size": int(width * fields.get("mlp_ratio", 4.0)),
        "num_hidden_layers": layers,
        "hidden_act": _activation(quick_gelu, fields),
        "layer_norm_eps": (fields.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def config_from_open_clip(model_cfg: JsonObject, mask_ratio: float = 0.5) -> FlipConfig:
    """Converts an open_clip model configuration to a FlipConfig; absent fields have open_clip's defaults.

    Raises:
        ConversionError: the model does not consist of standard ViT towers; the message names the field.
    """
    vision = model_cfg.get("vision_cfg")
    text = model_cfg.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict) or "embed_dim" not in model_cfg:
        raise ConversionError(
            "This is not a configuration of an open_clip model: it lacks embed_dim, vision_cfg or text_cfg."
        )
    for part, fields in (("model_cfg", model_cfg), ("vision_cfg", vision), ("text_cfg", text)):
        _refuse_unknown(part, fields)
    if not all(isinstance(vision.get(name, 0), int) for name in ("layers", "image_size", "patch_size")):
        raise ConversionError("This open_clip model's image tower is a ResNet or takes images that are not square.")
    for part, fields in (("model_cfg", model_cfg), ("vision_cfg", vision), ("text_cfg", text)):
        _check_tower(part, fields)
    quick_gelu = bool(model_cfg.get("quick_gelu", False))
    pool_type = text.get("pool_type", "argmax")
    bidirectional = bool(text.get("no_causal_mask", False))
    if pool_type not in ("first", "argmax", "eos"):
        raise ConversionError(f"This open_clip model has text_cfg.pool_type = {pool_type!r}, which FLIP lacks.")
    vision_tower = _tower(vision, width=768, layers=12, quick_gelu=quick_gelu)
    fields = {
        "text_config": {
            **_tower(text, width=512, layers=12, quick_gelu=quick_gelu),
            "num_attention_heads": text.get("heads", 8),
            "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77),
            "causal": not bidirectional,
            "attend_to_padding": bidirectional,
            "pooling_type": pool_type,
            "pad_token_id": text.get("pad_id", 0),
            "eos_token_id": text.get("eos_id", 2) if pool_type == "eos" else None,
        },
        "vision_config": {
            **vision_tower,
            "num_attention_heads": vision_tower["hidden_size"] // vision.get("head_width", 64),
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
            "mask_ratio": mask_ratio,
            "pooling_type": "cls",
            "position_embedding_type": "sincos2d" if vision.get("pos_embed_type") == "sin_cos_2d" else "learned",
            "use_pre_layernorm": not vision.get("no_ln_pre", False),
            "patch_embedding_bias": False,
        },
        "projection_dim": model_cfg["embed_dim"],
        "logit_scale_init_value": model_cfg.get("init_logit_scale", FlipConfig().logit_scale_init_value),
        "max_logit_scale": None,
    }
    check_fields(fields, "This open_clip model")
    with configuring("This open_clip model"):
        return FlipConfig(**fields)


def _tower_cfg(tower: Any) -> JsonObject:
    cfg = {
        "layers": tower.num_hidden_layers,
        "width": tower.hidden_size,
        "mlp_ratio": tower.intermediate_size / tower.hidden_size,
    }
    if tower.layer_norm_eps != 1e-5:
        cfg["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    if tower.hidden_act == "gelu_pytorch_tanh":
        cfg["act_kwargs"] = {"approximate": "tanh"}
    return cfg


def config_to_open_clip(config: FlipConfig) -> JsonObject:
    """Returns the open_clip model configuration of the same computation.

    Raises:
        ConversionError: open_clip has no such model; the message names the options in the way.
    """
    text = config.text_config
    vision = config.vision_config
    ratios = [int(t.hidden_size * (t.intermediate_size / t.hidden_size)) == t.intermediate_size for t in (text, vision)]
    conditions = {
        "vision_config.pooling_type must be 'cls'": vision.pooling_type == "cls",
        "vision_config.patch_embedding_bias must be False": not vision.patch_embedding_bias,
        "vision_config.num_channels must be 3": vision.num_channels == 3,
        "text_config.pooling_type must be 'first', 'argmax' or 'eos'": text.pooling_type != "mean",
        "text_config.causal or text_config.attend_to_padding must be True": text.causal or text.attend_to_padding,
        "projection_bias must be False": not config.projection_bias,
        "logit_bias_init_value must be None": config.logit_bias_init_value is None,
        "hidden_act must be one of quick_gelu, gelu, gelu_pytorch_tanh": {text.hidden_act, vision.hidden_act}
        <= _ACTIVATIONS.keys(),
        "quick_gelu must be in both towers or in none": "quick_gelu" not in {text.hidden_act, vision.hidden_act}
        or text.hidden_act == vision.hidden_act,
        "intermediate_size must be a multiple of hidden_size": all(ratios),
    }
    in_the_way = [condition for condition, holds in conditions.items() if not holds]
    if in_the_way:
        raise ConversionError(
            f"open_clip has no model that computes what this FlipModel does: {'; '.join(in_the_way)}."
        )
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            **_tower_cfg(vision),
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "no_ln_pre": not vision.use_pre_layernorm,
            "pos_embed_type": "sin_cos_2d" if vision.position_embedding_type == "sincos2d" else "learnable",
        },
        "text_cfg": {
            **_tower_cfg(text),
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "no_causal_mask": not text.causal,
            "pool_type": text.pooling_type,
            "pad_id": text.pad_token_id or 0,
            **({"eos_id": text.eos_token_id} if text.pooling_type == "eos" else {}),
        },
    }
