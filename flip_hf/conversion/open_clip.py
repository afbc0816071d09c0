"""Converts open_clip's native ViT models and its SigLIP to FlipModel and back (checked against open_clip 3.3).

The native models are CLIP's and CLIPA's; SigLIP and SigLIP 2 have an image tower of timm's.

A folder of open_clip holds `open_clip_config.json` and the weights; a training checkpoint is a single file, and the
model's configuration must be given with it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.clip import load_flip
from flip_hf.conversion.errors import ConversionError, reason
from flip_hf.conversion.files import read_json, regular_file
from flip_hf.conversion.folder import Converted, card_data, writing
from flip_hf.conversion.open_clip_config import config_from_open_clip, config_to_open_clip
from flip_hf.conversion.open_clip_tokenizer import read_as_open_clip
from flip_hf.conversion.pickled import check_plain, read_pickled
from flip_hf.conversion.pretrained import read_safetensors
from flip_hf.conversion.processors import (
    find_image_processor,
    find_tokenizer,
    image_processor_from_open_clip,
    image_processor_to_open_clip,
    join,
)
from flip_hf.conversion.sizes import check_mask_ratio
from flip_hf.conversion.tables import (
    ROWS,
    SCALAR,
    STACKED,
    TRANSPOSED,
    Entry,
    blocks,
    load,
    shapes_of,
    to_ours,
    to_theirs,
)
from flip_hf.modeling import FlipConfig, FlipModel, FlipTextConfig, FlipVisionConfig

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_LINEAR = ("weight", "bias")


def _block(norm: str, stacked: str, names: tuple[tuple[str, str], ...]) -> list[Entry]:
    """Returns the table of one Transformer block, from its names of the LayerNorms, the query-key-value and the rest.

    Args:
        norm: name of a LayerNorm, with `{}` for 1 or 2.
        stacked: name of query, key and value in one, with `{}` for `weight` or `bias`.
        names: other layers, their name and ours.
    """
    return [
        *(Entry(f"{norm.format(i)}.{kind}", f"layer_norm{i}.{kind}") for i in (1, 2) for kind in _LINEAR),
        *(
            Entry(stacked.format(kind), tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv"), STACKED)
            for kind in _LINEAR
        ),
        *(Entry(f"{theirs}.{kind}", f"{ours}.{kind}") for theirs, ours in names for kind in _LINEAR),
    ]


BLOCK = _block(
    "ln_{}",
    "attn.in_proj_{}",
    (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")),
)
TIMM_BLOCK = _block(
    "norm{}", "attn.qkv.{}", (("attn.proj", "self_attn.out_proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
)
VISION = [
    Entry("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    Entry("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Entry("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Entry("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    Entry("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
    Entry("visual.proj", "visual_projection.weight", TRANSPOSED),
]
PRE_LAYERNORM = [Entry(f"visual.ln_pre.{kind}", f"vision_model.pre_layernorm.{kind}") for kind in _LINEAR]
SIGLIP_VISION = [
    Entry("visual.trunk.pos_embed", "vision_model.embeddings.position_embedding.weight", ROWS),
    Entry("visual.trunk.attn_pool.latent", "vision_model.head.probe"),
    *(
        Entry(f"visual.trunk.attn_pool.in_proj_{kind}", f"vision_model.head.attention.in_proj_{kind}")
        for kind in _LINEAR
    ),
    *(
        Entry(f"visual.trunk.{theirs}.{kind}", f"vision_model.{ours}.{kind}")
        for theirs, ours in (
            ("patch_embed.proj", "embeddings.patch_embedding"),
            ("norm", "post_layernorm"),
            ("attn_pool.proj", "head.attention.out_proj"),
            ("attn_pool.norm", "head.layernorm"),
            ("attn_pool.mlp.fc1", "head.mlp.fc1"),
            ("attn_pool.mlp.fc2", "head.mlp.fc2"),
        )
        for kind in _LINEAR
    ),
]
# timm has the query of the pooling in one layer, and its key and value in another; ours has the three in one.
POOLING = {
    f"visual.trunk.attn_pool.in_proj_{kind}": (
        f"visual.trunk.attn_pool.q.{kind}",
        f"visual.trunk.attn_pool.kv.{kind}",
    )
    for kind in _LINEAR
}
TEXT = [
    Entry("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Entry("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Entry("ln_final.weight", "text_model.final_layer_norm.weight"),
    Entry("ln_final.bias", "text_model.final_layer_norm.bias"),
    Entry("logit_scale", "logit_scale", SCALAR),
]
TEXT_PROJECTION = [Entry("text_projection", "text_projection.weight", TRANSPOSED)]
TEXT_PROJECTION_WITH_BIAS = [Entry(f"text_projection.{kind}", f"text_projection.{kind}") for kind in _LINEAR]
LOGIT_BIAS = [Entry("logit_bias", "logit_bias", SCALAR)]
# Not weights, though in checkpoints: the causal mask, and the sizes in OpenAI's own files.
NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


# -- weights ----------------------------------------------------------------------------------------------------------


def _vision_entries(config: FlipVisionConfig) -> list[Entry]:
    """Returns the image tower's table: that of timm's where images are pooled by attention."""
    ours = "vision_model.encoder.layers.{}."
    if config.pooling_type == "attention":
        return [*SIGLIP_VISION, *blocks(TIMM_BLOCK, "visual.trunk.blocks.{}.", ours, config.num_hidden_layers)]
    return [
        *VISION,
        *(PRE_LAYERNORM if config.use_pre_layernorm else []),
        *blocks(BLOCK, "visual.transformer.resblocks.{}.", ours, config.num_hidden_layers),
    ]


def entries_of(config: FlipConfig) -> list[Entry]:
    """Returns the table for a FlipConfig that open_clip can express."""
    return [
        *_vision_entries(config.vision_config),
        *TEXT,
        *(TEXT_PROJECTION_WITH_BIAS if config.projection_bias else TEXT_PROJECTION),
        *([] if config.logit_bias_init_value is None else LOGIT_BIAS),
        *blocks(
            BLOCK, "transformer.resblocks.{}.", "text_model.encoder.layers.{}.", config.text_config.num_hidden_layers
        ),
    ]


def _join_pooling(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins the query of timm's pooling with its key and value; those of other shapes stay, to be refused by name."""
    joined = dict(state_dict)
    for name, parts in POOLING.items():
        query, key_value = (state_dict.get(part) for part in parts)
        if query is None or key_value is None or query.ndim == 0:
            continue
        if key_value.shape == (2 * query.shape[0], *query.shape[1:]) and key_value.dtype == query.dtype:
            joined[name] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _split_pooling(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits the query of timm's pooling from its key and value; the inverse of [`_join_pooling`]."""
    split = dict(state_dict)
    for name, parts in POOLING.items():
        if name in split:
            query, key, value = split.pop(name).chunk(3)
            split[parts[0]] = query.clone()
            split[parts[1]] = torch.cat([key, value])
    return split


def _plain_name(name: str) -> str:
    """Returns a tensor's name without the prefixes of wrappers (DDP, torch.compile) and of a separate text module."""
    for prefix in ("module.", "_orig_mod.", "text."):
        name = name.removeprefix(prefix)
    return name


def read_state_dict(path: Path, *, root: Path | None = None) -> dict[str, Tensor]:
    """Reads the weights of an open_clip checkpoint: safetensors, or a file of `torch.save` that holds only tensors.

    Args:
        path: the file.
        root: its folder, if links must not lead out of it.

    Raises:
        ConversionError: the file is damaged, or holds more than data.
    """
    regular_file(path, root=root)
    checkpoint: Any = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict):
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, dict):
        raise ConversionError(f"{path} holds a {type(checkpoint).__name__}, not a dict of weights.")
    state_dict = {}
    for name, value in checkpoint.items():
        name = _plain_name(str(name))
        if name in NO_WEIGHTS:
            continue
        if name in state_dict:
            raise ConversionError(f"{path} has two tensors called {name} without their prefixes.")
        state_dict[name] = check_plain(name, value, path)
    return state_dict


def open_clip_to_flip(state_dict: dict[str, Tensor], model_cfg: JsonObject, mask_ratio: float = 0.5) -> FlipModel:
    """Converts an open_clip model to a FlipModel with its weights.

    Args:
        state_dict: from [`read_state_dict`], or the `state_dict()` of a model of open_clip.
        model_cfg: the model's configuration, as in open_clip's `model_configs`.
        mask_ratio: fraction of the patches dropped in training.

    Raises:
        ConversionError: the model does not consist of standard ViT towers or SigLIP's, or its weights do not match the
            configuration.
    """
    config = config_from_open_clip(model_cfg, mask_ratio)
    source = _join_pooling({_plain_name(name): tensor for name, tensor in state_dict.items()})
    tensors = to_ours(entries_of(config), source, shapes_of(FlipModel, config), what="The open_clip checkpoint")
    return load(FlipModel, config, tensors)


def _is_shared(name: str) -> bool:
    """Returns whether a tensor is outside the text tower."""
    return name.startswith("visual.") or name in ("logit_scale", "logit_bias")


def flip_to_open_clip(flip: FlipModel) -> tuple[dict[str, Tensor], JsonObject]:
    """Converts a FlipModel to the state dict and the configuration of an open_clip model.

    Raises:
        ConversionError: open_clip has no such model; the message names the options in the way.
    """
    model_cfg = config_to_open_clip(flip.config)
    tensors = {**flip.state_dict(), "logit_scale": flip.clipped_logit_scale()}
    state_dict = _split_pooling(to_theirs(entries_of(flip.config), tensors))
    if model_cfg.get("custom_text"):
        state_dict = {name if _is_shared(name) else f"text.{name}": tensor for name, tensor in state_dict.items()}
    return state_dict, model_cfg


# -- folders ----------------------------------------------------------------------------------------------------------


def _find_files(source: str, model_config: str | None) -> tuple[Path, Path]:
    """Finds the weights and the configuration of a folder, a file or a Hub id."""
    path = Path(source)
    try:
        is_folder = path.is_dir()
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ConversionError(f"{source!r} cannot be opened: {reason(error)}.") from error
    if is_folder:
        there = {p.name for p in path.iterdir()}
        weights = [path / name for name in WEIGHT_FILES if name in there]
        if not weights or CONFIG_FILE not in there:
            raise ConversionError(f"{source} has no {CONFIG_FILE} with {' or '.join(WEIGHT_FILES)} beside it.")
        return weights[0], path / CONFIG_FILE
    if exists:
        regular_file(path)
        if model_config is None:
            raise ConversionError(
                f"{source} is a file of weights; give --model_config with the model's JSON (open_clip's model_configs, "
                f"or an {CONFIG_FILE})."
            )
        return path, Path(model_config)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, WEIGHT_FILES[0])), Path(hf_hub_download(source, CONFIG_FILE))
    except Exception as error:  # no such repository, no such file, no network: many types, one answer
        raise ConversionError(
            f"{source} is neither a file, nor a folder, nor a Hub repository with {CONFIG_FILE} and {WEIGHT_FILES[0]} "
            f"({reason(error)})."
        ) from error


def _read_config(path: Path, root: Path | None) -> JsonObject:
    config = read_json(path, root=root)
    config = config if "model_cfg" in config else {"model_cfg": config}
    for name in ("model_cfg", "preprocess_cfg"):
        if not isinstance(config.get(name, {}), dict):
            raise ConversionError(f"{path}: {name} is {config[name]!r:.80}, not an object of an open_clip model.")
    return config


def _pad_with(tokenizer: PreTrainedTokenizerBase, text: FlipTextConfig) -> None:
    """Sets the padding id to the tokenizer's in a model that attends to padding, as open_clip pads its texts with it.

    Its configurations have a pad_id that this does not use, and none for SigLIP, which is padded with 1. CLIP's own
    tokenizer pads with 0 there, whatever Transformers' has.
    """
    padding = tokenizer.pad_token_id
    if text.attend_to_padding and isinstance(padding, int) and not _is_clips(tokenizer):
        text.pad_token_id = padding


def _is_clips(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether it is CLIP's own tokenizer, which open_clip has itself."""
    return "CLIPTokenizer" in type(tokenizer).__name__


def convert_from_open_clip(
    source: str, *, model_config: str | None = None, tokenizer: str | None = None, mask_ratio: float = 0.5
) -> Converted:
    """Converts an open_clip model to a complete FLIP folder.

    Args:
        source: a folder or Hub id with `open_clip_config.json`, or a weights file.
        model_config: JSON file with the model's configuration, if `source` is a file.
        tokenizer: folder or Hub id of the tokenizer, if the source has none (CLIP's own:
            `openai/clip-vit-base-patch32`).
        mask_ratio: fraction of the patches dropped in training.

    Raises:
        ConversionError: a file is missing, damaged or leads out of the folder; the model does not consist of standard
            ViT towers or SigLIP's; or the weights do not match the configuration or are not finite.
    """
    check_mask_ratio(mask_ratio)
    weights, config_file = _find_files(source, model_config)
    # Links in a folder must not lead out of it, but a file that the user named may be a link.
    root = Path(source) if Path(source).is_dir() else None
    config = _read_config(config_file, root)
    flip = open_clip_to_flip(read_state_dict(weights, root=root), config["model_cfg"], mask_ratio)
    size = flip.config.vision_config.image_size
    image_processor = image_processor_from_open_clip(config.get("preprocess_cfg", {}), size)
    length = flip.config.text_config.max_position_embeddings
    found = find_tokenizer(source if tokenizer is None else tokenizer, length)
    if tokenizer is not None and found is None:
        raise ConversionError(f"--tokenizer {tokenizer} has no tokenizer.")
    if found is not None:
        found = read_as_open_clip(found, config["model_cfg"]["text_cfg"])
        _pad_with(found, flip.config.text_config)
    return Converted(
        model=flip,
        processor=join(image_processor, found),
        title="A CLIP from open_clip, as a FlipModel",
        about="Converted from open_clip with `flip-hf convert`. The licence is that of the source.",
        data=card_data(source),
    )


def write_open_clip(source: str, folder: Path) -> None:
    """Writes a FLIP folder's model as a folder of open_clip, for `create_model_and_transforms("local-dir:FOLDER")`.

    Raises:
        ConversionError: open_clip has no such model or preprocessing, or the source is not a complete FlipModel, see
            [`load_flip`][flip_hf.conversion.clip.load_flip].
        OSError: the folder cannot be written.
    """
    flip = load_flip(source)
    state_dict, model_cfg = flip_to_open_clip(flip)
    config: JsonObject = {"model_cfg": model_cfg}
    image_processor = find_image_processor(source)
    if image_processor is not None:
        size = flip.config.vision_config.image_size
        config["preprocess_cfg"] = image_processor_to_open_clip(image_processor, size)
    tokenizer = find_tokenizer(source, flip.config.text_config.max_position_embeddings)
    if tokenizer is not None and not _is_clips(tokenizer):
        tokenizer.save_pretrained(folder)
        model_cfg["text_cfg"]["hf_tokenizer_name"] = "."  # the folder itself, when open_clip loads it as local-dir
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with writing(folder):
        save_file(state_dict, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
