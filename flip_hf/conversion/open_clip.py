"""Convert open_clip's native ViT models to FlipModel and back (checked against open_clip 3.3).

A folder of open_clip holds `open_clip_config.json` and the weights; a training checkpoint is a single file, and the
model's configuration must be given with it.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.clip import load_flip
from flip_hf.conversion.errors import ConversionError, reason
from flip_hf.conversion.files import read_json, regular_file
from flip_hf.conversion.folder import Converted, card_data, writing
from flip_hf.conversion.open_clip_config import config_from_open_clip, config_to_open_clip
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
from flip_hf.modeling import FlipConfig, FlipModel

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
# Not weights, though in checkpoints: the causal mask, and the sizes in OpenAI's own files.
NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


# -- weights ----------------------------------------------------------------------------------------------------------


def entries_of(config: FlipConfig) -> list[Entry]:
    """Returns the table for a FlipConfig that open_clip can express."""
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
        # Prefixes of wrappers (DDP, torch.compile), and of open_clip's models with a separate text module.
        for prefix in ("module.", "_orig_mod.", "text."):
            name = str(name).removeprefix(prefix)
        if name in NO_WEIGHTS:
            continue
        if name in state_dict:
            raise ConversionError(f"{path} has two tensors called {name} without their prefixes.")
        state_dict[name] = check_plain(name, value, path)
    return state_dict


def open_clip_to_flip(state_dict: dict[str, Tensor], model_cfg: JsonObject, mask_ratio: float = 0.5) -> FlipModel:
    """Converts an open_clip model to a FlipModel with its weights.

    Args:
        state_dict: from [`read_state_dict`], or a model's `state_dict()`.
        model_cfg: the model's configuration, as in open_clip's `model_configs`.
        mask_ratio: fraction of the patches dropped in training.

    Raises:
        ConversionError: the model does not consist of standard ViT towers, or its weights do not match the
            configuration.
    """
    config = config_from_open_clip(model_cfg, mask_ratio)
    tensors = to_ours(entries_of(config), state_dict, shapes_of(FlipModel, config), what="The open_clip checkpoint")
    return load(FlipModel, config, tensors)


def flip_to_open_clip(flip: FlipModel) -> tuple[dict[str, Tensor], JsonObject]:
    """Converts a FlipModel to the state dict and the configuration of an open_clip model.

    Raises:
        ConversionError: open_clip has no such model; the message names the options in the way.
    """
    model_cfg = config_to_open_clip(flip.config)
    tensors = {**flip.state_dict(), "logit_scale": flip.clipped_logit_scale()}
    return to_theirs(entries_of(flip.config), tensors), model_cfg


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


def convert_from_open_clip(
    source: str, *, model_config: str | None = None, tokenizer: str | None = None, mask_ratio: float = 0.5
) -> Converted:
    """Converts an open_clip model to a complete Flip folder.

    Args:
        source: a folder or Hub id with `open_clip_config.json`, or a weights file.
        model_config: JSON file with the model's configuration, if `source` is a file.
        tokenizer: folder or Hub id of the tokenizer, if the source has none (CLIP's own:
            `openai/clip-vit-base-patch32`).
        mask_ratio: fraction of the patches dropped in training.

    Raises:
        ConversionError: a file is missing, damaged or leads out of the folder; the model does not consist of standard
            ViT towers; or the weights do not match the configuration or are not finite.
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
    return Converted(
        model=flip,
        processor=join(image_processor, found),
        title="A CLIP from open_clip, as a FlipModel",
        about="Converted from open_clip with `flip-hf convert`. The licence is that of the source.",
        data=card_data(source),
    )


def write_open_clip(source: str, folder: Path) -> None:
    """Writes a Flip folder's model as a folder of open_clip, for `create_model_and_transforms("local-dir:FOLDER")`.

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
    if tokenizer is not None and "CLIPTokenizer" not in type(tokenizer).__name__:
        tokenizer.save_pretrained(folder)
        model_cfg["text_cfg"]["hf_tokenizer_name"] = "."  # the folder itself, when open_clip loads it as local-dir
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with writing(folder):
        save_file(state_dict, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
