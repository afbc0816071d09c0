"""Digests of models and their processors, by content: two have the same one only if they give the same features."""

import hashlib
import json
from collections.abc import Collection, Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig

from flip_hf.evaluation.zero_shot import TextInputs

# What a configuration says of where it came from and of how it was loaded. The dtype is that of the weights.
_OF_LOADING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
# What it says of training: features are those of whole images and of a model that drops nothing.
_OF_TRAINING = (
    *("attention_dropout", "dropout", "initializer_range", "initializer_factor", "mask_ratio", "mask_strategy"),
    *("logit_scale_init_value", "max_logit_scale", "logit_bias_init_value", "auto_map"),
)
# A tokenizer's settings of the last call, which change with every call.
_OF_CALLS = ("truncation", "padding")
_VISION = ("vision_", "visual_", "logit_")


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Returns the SHA-256 of named tensors: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings_digest(*settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _config_of(model: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    config = getattr(model, "config", None)
    fields = {} if config is None else config.to_dict()
    return {name: value for name, value in fields.items() if name not in (*_OF_LOADING, *without)}


def _architecture(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration, and those in it, without what is of no consequence for features.

    That is what is said of loading, of training, and, but for the kind of model, what every configuration has, such as
    the names of labels and the form of outputs, which Transformers changes from version to version.
    """
    usual = PreTrainedConfig().to_dict().keys() - {"model_type"}
    left_out = {*usual, *_OF_LOADING, *_OF_TRAINING}
    return {
        name: _architecture(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in left_out and not name.startswith("_")
    }


def _tokenizer_settings(tokenizer: Any, config: Any) -> list[Any]:
    """Returns everything that decides which ids a text gets."""
    inputs = TextInputs(tokenizer, config)
    if getattr(tokenizer, "is_fast", False):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        known: Any = {name: value for name, value in backend.items() if name not in _OF_CALLS}
    else:
        known = [type(tokenizer).__name__, tokenizer.get_vocab()]
    special = [tokenizer.pad_token_id, getattr(tokenizer, "padding_side", None)]
    return [known, special, inputs.max_length, inputs.padding]


def text_fingerprint(model: Any, tokenizer: Any) -> str:
    """Returns a digest of all that turns texts into embeddings: weights but the vision tower's, settings, tokenizer."""
    weights = ((name, tensor) for name, tensor in model.state_dict().items() if not name.startswith(_VISION))
    config = _config_of(model, without=("vision_config",))
    return _settings_digest(
        tensors_digest(weights), config, _tokenizer_settings(tokenizer, getattr(model, "config", None))
    )


def model_fingerprint(model: Any, processor: Any, earlier: Collection[str] = ()) -> dict[str, str]:
    """Returns digests of a model of images and texts and its processor, one for each part that may differ.

    Args:
        model: the model.
        processor: its processor.
        earlier: names of digests that these are compared with. If `config` is among them, which was once of the whole
            configuration, it takes the place of `architecture`.

    Returns:
        `weights`, `architecture`, `image_processor` and `tokenizer`.
    """
    image_processor = processor.image_processor.to_dict()
    if "config" in earlier:
        config = {"config": _settings_digest(_config_of(model))}
    else:
        config = {"architecture": _settings_digest(_architecture(model.config.to_dict()))}
    return {
        "weights": tensors_digest(model.state_dict().items()),
        **config,
        "image_processor": _settings_digest(_without_origin(image_processor)),
        "tokenizer": _settings_digest(_tokenizer_settings(processor.tokenizer, model.config)),
    }


def _without_origin(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith("_")}
