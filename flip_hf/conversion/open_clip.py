"""open_clip's native ViT models to FlipModel and back (checked against open_clip 3.3).

A folder of open_clip holds `open_clip_config.json` and the weights; a training checkpoint is one file, and the model's
configuration must be given beside it.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flip_hf.conversion.folder import Converted, card_data
from flip_hf.conversion.open_clip_config import config_from_open_clip, config_to_open_clip
from flip_hf.conversion.processors import (
    find_image_processor,
    find_tokenizer,
    image_processor_from_open_clip,
    image_processor_to_open_clip,
    join,
)
from flip_hf.conversion.tables import (
    SCALAR,
    STACKED,
    TRANSPOSED,
    ConversionError,
    Entry,
    blocks,
    load,
    shapes_of,
    to_ours,
    to_theirs,
)
from flip_hf.modeling import FlipModel

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_LINEAR = ("weight", "bias")
BLOCK = [
    *(Entry(f"ln_{i}.{kind}", f"layer_norm{i}.{kind}") for i in (1, 2) for kind in _LINEAR),
    *(
        Entry(f"attn.in_proj_{kind}", tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv"), STACKED)
        for kind in _LINEAR
    ),
    *(
        Entry(f"{theirs}.{kind}", f"{ours}.{kind}")
        for theirs, ours in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        )
        for kind in _LINEAR
    ),
]
VISION = [
    Entry("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    Entry("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Entry("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Entry("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    Entry("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
    Entry("visual.proj", "visual_projection.weight", TRANSPOSED),
]
PRE_LAYERNORM = [Entry(f"visual.ln_pre.{kind}", f"vision_model.pre_layernorm.{kind}") for kind in _LINEAR]
TEXT = [
    Entry("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Entry("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Entry("ln_final.weight", "text_model.final_layer_norm.weight"),
    Entry("ln_final.bias", "text_model.final_layer_norm.bias"),
    Entry("text_projection", "text_projection.weight", TRANSPOSED),
    Entry("logit_scale", "logit_scale", SCALAR),
]
# In checkpoints, but no weights: the causal mask, and the sizes that OpenAI's own files carry.
NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


# -- weights ----------------------------------------------------------------------------------------------------------


def entries_of(config: Any) -> list[Entry]:
    """The table for a FlipConfig that open_clip can express."""
    return [
        *VISION,
        *(PRE_LAYERNORM if config.vision_config.use_pre_layernorm else []),
        *blocks(
            BLOCK,
            "visual.transformer.resblocks.{}.",
            "vision_model.encoder.layers.{}.",
            config.vision_config.num_hidden_layers,
        ),
        *TEXT,
        *blocks(
            BLOCK, "transformer.resblocks.{}.", "text_model.encoder.layers.{}.", config.text_config.num_hidden_layers
        ),
    ]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights of an open_clip checkpoint: safetensors, or a file of `torch.save` that holds tensors only.

    Raises:
        ConversionError: the file is damaged, or there is more than data in it.
    """
    try:
        if path.suffix == ".safetensors":
            checkpoint: Any = load_file(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConversionError(
            f"{path} cannot be read as weights. It is damaged, or it holds objects other than tensors (a TorchScript "
            "archive, or pickled code, which is never run); load it with a tool you trust and save its state_dict as "
            f"safetensors. The reason given: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict):
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, dict):
        raise ConversionError(f"{path} holds a {type(checkpoint).__name__}, not a dict of weights.")
    state_dict = {}
    for name, value in checkpoint.items():
        # Prefixes of wrappers (DDP, torch.compile), and of open_clip's models with a separate text module.
        for prefix in ("module.", "_orig_mod.", "text."):
            name = str(name).removeprefix(prefix)
        if name not in NO_WEIGHTS:
            if not isinstance(value, Tensor):
                raise ConversionError(f"{path}: {name} is a {type(value).__name__}, not a tensor.")
            state_dict[name] = value
    return state_dict


def open_clip_to_flip(state_dict: dict[str, Tensor], model_cfg: dict[str, Any], mask_ratio: float = 0.5) -> FlipModel:
    """A FlipModel with an open_clip model's weights.

    Args:
        state_dict: from [`read_state_dict`], or a model's `state_dict()`.
        model_cfg: its configuration, as in open_clip's `model_configs`.
        mask_ratio: fraction of the patches dropped in training.

    Raises:
        ConversionError: the model is not made of standard ViT towers, or the weights do not fit the configuration.
    """
    config = config_from_open_clip(model_cfg, mask_ratio)
    tensors = to_ours(entries_of(config), state_dict, shapes_of(FlipModel, config), what="The open_clip checkpoint")
    return load(FlipModel, config, tensors)


def flip_to_open_clip(flip: FlipModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the configuration of an open_clip model with a FlipModel's weights.

    Raises:
        ConversionError: open_clip has no such model; the message names the switches in the way.
    """
    model_cfg = config_to_open_clip(flip.config)
    tensors = {**flip.state_dict(), "logit_scale": flip.clipped_logit_scale()}
    return to_theirs(entries_of(flip.config), tensors), model_cfg


# -- folders ----------------------------------------------------------------------------------------------------------


def _find_files(source: str, model_config: str | None) -> tuple[Path, Path]:
    """The weights and the configuration of a folder, a file or a Hub id."""
    path = Path(source)
    if path.is_file():
        if model_config is None:
            raise ConversionError(
                f"{source} is a file of weights; give --model_config with the model's JSON (open_clip's model_configs, "
                f"or an {CONFIG_FILE})."
            )
        return path, Path(model_config)
    if path.is_dir():
        weights = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not weights or not (path / CONFIG_FILE).is_file():
            raise ConversionError(f"{source} has no {CONFIG_FILE} with {' or '.join(WEIGHT_FILES)} beside it.")
        return weights[0], path / CONFIG_FILE
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, WEIGHT_FILES[0])), Path(hf_hub_download(source, CONFIG_FILE))
    except Exception as error:  # no such repository, no such file, no network: many types, one answer
        raise ConversionError(
            f"{source} is neither a file, nor a folder, nor a Hub repository with {CONFIG_FILE} and {WEIGHT_FILES[0]} "
            f"({error})."
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} is no configuration of an open_clip model.")
    return config if "model_cfg" in config else {"model_cfg": config}


def convert_from_open_clip(
    source: str, *, model_config: str | None = None, tokenizer: str | None = None, mask_ratio: float = 0.5
) -> Converted:
    """An open_clip model as a complete Flip folder.

    Args:
        source: a folder or Hub id with `open_clip_config.json`, or a file of weights.
        model_config: JSON of the model's configuration, where `source` is a file.
        tokenizer: folder or Hub id of the tokenizer, where the source has none (CLIP's own:
            `openai/clip-vit-base-patch32`).
        mask_ratio: fraction of the patches dropped in training.
    """
    weights, config_file = _find_files(source, model_config)
    config = _read_config(config_file)
    flip = open_clip_to_flip(read_state_dict(weights), config["model_cfg"], mask_ratio)
    text: Any = flip.config.text_config
    vision: Any = flip.config.vision_config
    image_processor = image_processor_from_open_clip(config.get("preprocess_cfg", {}), vision.image_size)
    return Converted(
        model=flip,
        processor=join(image_processor, find_tokenizer(tokenizer or source, text.max_position_embeddings)),
        title="A CLIP from open_clip, as a FlipModel",
        about="Converted from open_clip with `scripts/convert.py` of flip_hf. The licence is that of the source.",
        data=card_data(source),
    )


def write_open_clip(source: str, folder: Path) -> None:
    """Writes a Flip folder's model as a folder of open_clip, for `create_model_and_transforms("local-dir:FOLDER")`.

    Raises:
        ConversionError: open_clip has no such model or preprocessing.
    """
    flip = FlipModel.from_pretrained(source)
    state_dict, model_cfg = flip_to_open_clip(flip)
    config: dict[str, Any] = {"model_cfg": model_cfg}
    image_processor = find_image_processor(source)
    if image_processor is not None:
        size = flip.config.vision_config.image_size  # pyright: ignore
        config["preprocess_cfg"] = image_processor_to_open_clip(image_processor, size)
    tokenizer = find_tokenizer(source, flip.config.get_text_config().max_position_embeddings)
    if tokenizer is not None and "CLIPTokenizer" not in type(tokenizer).__name__:
        tokenizer.save_pretrained(folder)
        model_cfg["text_cfg"]["hf_tokenizer_name"] = "."  # the folder itself, where open_clip loads it as local-dir
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(state_dict, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
