"""Converts open_clip's model configuration to FlipConfig and back."""

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.sizes import check_fields, configuring, number, whole_number
from flip_hf.conversion.timm_siglip import vision_cfg_of, vision_fields
from flip_hf.modeling import FlipConfig, FlipTextConfig, FlipVisionConfig

# Fields of open_clip's configuration that become ours, and those without effect here, which may have any value. All
# others change the model, and must have a value that means "off".
_READ = {
    "vision_cfg": {
        *("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre", "pos_embed_type"),
        *("act_kwargs", "norm_kwargs", "patch_dropout", "output_tokens"),
        *("attn_pooler_queries", "attn_pooler_heads", "pool_type", "final_ln_after_pool"),
        *("timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_drop"),
    },
    "text_cfg": {
        *("layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size", "no_causal_mask", "pool_type"),
        *("act_kwargs", "norm_kwargs", "pad_id", "eos_id", "output_tokens"),
        *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained", "hf_proj_type"),
        *("hf_pooler_type", "proj_bias"),
    },
    "model_cfg": {
        *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"),
        *("custom_text", "nonscalar_logit_scale", "output_dict", "cast_dtype"),
    },
}
_OFF = {"block_type": "default", "proj_type": "linear"}
_ACTIVATIONS = {"quick_gelu": {"quick_gelu": True}, "gelu": {}, "gelu_pytorch_tanh": {"approximate": "tanh"}}
# Whole numbers in a tower's configuration with their largest values; other sizes follow from them.
_SIZES = {
    **{"layers": 512, "width": 2**16, "head_width": 2**16, "patch_size": 2**12, "image_size": 2**13},
    **{"heads": 2**12, "context_length": 2**17, "vocab_size": 2**22},
}
_IDS = ("pad_id", "eos_id")
_SWITCHES = ("quick_gelu", "no_ln_pre", "no_causal_mask", "final_ln_after_pool", "proj_bias", "custom_text")
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
                "ViT towers with standard blocks and SigLIP's image towers can be converted."
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


def _text_fields(text: JsonObject, quick_gelu: bool) -> JsonObject:
    """Returns a FlipTextConfig's fields.

    Raises:
        ConversionError: FLIP does not pool texts in this way.
    """
    pool_type = text.get("pool_type", "argmax")
    bidirectional = bool(text.get("no_causal_mask", False))
    if pool_type not in ("first", "argmax", "eos", "last"):
        raise ConversionError(f"This open_clip model has text_cfg.pool_type = {pool_type!r:.80}, which FLIP lacks.")
    if pool_type == "last" and not bidirectional:
        raise ConversionError(
            "This open_clip model has text_cfg.pool_type = 'last' with causal attention; FLIP has it with "
            "no_causal_mask alone."
        )
    return {
        **_tower(text, width=512, layers=12, quick_gelu=quick_gelu),
        "num_attention_heads": text.get("heads", 8),
        "vocab_size": text.get("vocab_size", 49408),
        "max_position_embeddings": text.get("context_length", 77),
        "causal": not bidirectional,
        "attend_to_padding": bidirectional,
        "pooling_type": pool_type,
        "pad_token_id": text.get("pad_id", 0),
        "eos_token_id": text.get("eos_id", 2) if pool_type == "eos" else None,
    }


def _native_vision_fields(vision: JsonObject, quick_gelu: bool) -> JsonObject:
    """Returns a FlipVisionConfig's fields for open_clip's own ViT.

    Raises:
        ConversionError: FLIP does not pool images in this way.
    """
    pool_type = vision.get("pool_type", "tok")
    # The class token alone is the same before and after the LayerNorm; a mean is not.
    if pool_type != "tok" and not (pool_type == "avg" and vision.get("final_ln_after_pool")):
        raise ConversionError(
            f"This open_clip model has vision_cfg.pool_type = {pool_type!r:.80} and final_ln_after_pool = "
            f"{vision.get('final_ln_after_pool', False)!r:.80}, which FLIP lacks: it has 'tok', and 'avg' with the "
            "LayerNorm after the pooling."
        )
    tower = _tower(vision, width=768, layers=12, quick_gelu=quick_gelu)
    return {
        **tower,
        "num_attention_heads": tower["hidden_size"] // vision.get("head_width", 64),
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 16),
        "pooling_type": "cls" if pool_type == "tok" else "patch_mean",
        "position_embedding_type": "sincos2d" if vision.get("pos_embed_type") == "sin_cos_2d" else "learned",
        "use_pre_layernorm": not vision.get("no_ln_pre", False),
        "patch_embedding_bias": False,
    }


def _check(model_cfg: JsonObject) -> None:
    """Checks the fields of a configuration before any is used.

    Raises:
        ConversionError: one is not supported or has an invalid value; the message names the field.
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
    if text.get("proj_bias") and not vision.get("timm_model_name"):
        raise ConversionError(
            "This open_clip model has text_cfg.proj_bias = True beside an image projection without a bias; FLIP has "
            "both with a bias or none."
        )


def config_from_open_clip(model_cfg: JsonObject, mask_ratio: float = 0.5) -> FlipConfig:
    """Converts an open_clip model configuration to a FlipConfig; absent fields have open_clip's defaults.

    Raises:
        ConversionError: the model does not consist of standard ViT towers or SigLIP's; the message names the field.
    """
    _check(model_cfg)
    vision = model_cfg["vision_cfg"]
    text = model_cfg["text_cfg"]
    quick_gelu = bool(model_cfg.get("quick_gelu", False))
    if vision.get("timm_model_name"):
        image_tower = vision_fields(vision, model_cfg["embed_dim"])
    else:
        image_tower = _native_vision_fields(vision, quick_gelu)
    fields = {
        "text_config": _text_fields(text, quick_gelu),
        "vision_config": {**image_tower, "mask_ratio": mask_ratio},
        "projection_dim": model_cfg["embed_dim"],
        "projection_bias": bool(text.get("proj_bias", False)),
        "logit_scale_init_value": model_cfg.get("init_logit_scale", FlipConfig().logit_scale_init_value),
        "logit_bias_init_value": model_cfg.get("init_logit_bias"),
        "max_logit_scale": None,
    }
    check_fields(fields, "This open_clip model")
    with configuring("This open_clip model"):
        return FlipConfig(**fields)


def _has_ratio(tower: FlipTextConfig | FlipVisionConfig) -> bool:
    """Returns whether open_clip, which multiplies the width by a ratio, gets the MLP's hidden width back."""
    return int(tower.hidden_size * (tower.intermediate_size / tower.hidden_size)) == tower.intermediate_size


def _tower_cfg(tower: FlipTextConfig | FlipVisionConfig) -> JsonObject:
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


def _native_vision_cfg(vision: FlipVisionConfig) -> JsonObject:
    return {
        **_tower_cfg(vision),
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "no_ln_pre": not vision.use_pre_layernorm,
        "pos_embed_type": "sin_cos_2d" if vision.position_embedding_type == "sincos2d" else "learnable",
        **({"pool_type": "avg", "final_ln_after_pool": True} if vision.pooling_type == "patch_mean" else {}),
    }


def _native_conditions(config: FlipConfig) -> dict[str, bool]:
    """Returns what open_clip's own ViT requires, in words, and whether it holds."""
    text = config.text_config
    vision = config.vision_config
    return {
        "vision_config.pooling_type must be 'cls', 'patch_mean' or 'attention'": vision.pooling_type != "mean",
        "vision_config.patch_embedding_bias must be False": not vision.patch_embedding_bias,
        "vision_config.num_channels must be 3": vision.num_channels == 3,
        "vision_config.use_class_token must be True": vision.use_class_token,
        "vision_config.use_projection must be True": vision.use_projection,
        "vision_config.image_size must be a multiple of patch_size": vision.image_size % vision.patch_size == 0,
        "projection_bias must be False": not config.projection_bias,
        "vision_config.hidden_act must be one of quick_gelu, gelu, gelu_pytorch_tanh": vision.hidden_act
        in _ACTIVATIONS,
        "quick_gelu must be in both towers or in none": "quick_gelu" not in {text.hidden_act, vision.hidden_act}
        or text.hidden_act == vision.hidden_act,
        "vision_config.intermediate_size must be a multiple of hidden_size": _has_ratio(vision),
    }


def _text_conditions(text: FlipTextConfig) -> dict[str, bool]:
    """Returns what open_clip's text tower requires, in words, and whether it holds."""
    return {
        "text_config.pooling_type must be 'first', 'argmax', 'eos' or 'last'": text.pooling_type != "mean",
        "text_config.causal or text_config.attend_to_padding must be True": text.causal or text.attend_to_padding,
        "text_config.hidden_act must be one of quick_gelu, gelu, gelu_pytorch_tanh": text.hidden_act in _ACTIVATIONS,
        "text_config.intermediate_size must be a multiple of hidden_size": _has_ratio(text),
    }


def config_to_open_clip(config: FlipConfig) -> JsonObject:
    """Returns the open_clip model configuration of the same computation.

    A model that pools images by attention has an image tower of timm's there, and others open_clip's own ViT.

    Raises:
        ConversionError: open_clip has no such model; the message names the options in the way.
    """
    text = config.text_config
    vision = config.vision_config
    is_siglip = vision.pooling_type == "attention"
    conditions = {**({} if is_siglip else _native_conditions(config)), **_text_conditions(text)}
    in_the_way = [condition for condition, holds in conditions.items() if not holds]
    if in_the_way:
        raise ConversionError(
            f"open_clip has no model that computes what this FlipModel does: {'; '.join(in_the_way)}."
        )
    bias = config.logit_bias_init_value
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        **({} if bias is None else {"init_logit_bias": bias}),
        # As in open_clip's own configurations of SigLIP: the text tower is a module of its own.
        **({"custom_text": True} if is_siglip else {}),
        "vision_cfg": vision_cfg_of(vision) if is_siglip else _native_vision_cfg(vision),
        "text_cfg": {
            **_tower_cfg(text),
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "no_causal_mask": not text.causal,
            "pool_type": text.pooling_type,
            "pad_id": text.pad_token_id or 0,
            **({"proj_bias": True} if config.projection_bias else {}),
            **({"eos_id": text.eos_token_id} if text.pooling_type == "eos" else {}),
        },
    }
