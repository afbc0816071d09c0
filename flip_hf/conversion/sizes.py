"""Checks the numbers that describe a model against their ranges, before memory of that size is allocated."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.errors import ConversionError, reason

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)

# Largest values, several times those of the largest vision-language models. Decoders have the same fields with the
# prefix `decoder_`.
SIZES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 512,
    "num_attention_heads": 2**12,
    "projection_dim": 2**16,
    "vocab_size": 2**22,
    "max_position_embeddings": 2**17,
    "num_channels": 2**10,
    "image_size": 2**13,
    "patch_size": 2**12,
}
# Smallest and largest values of fields that need not be whole numbers.
NUMBERS = {
    "layer_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "initializer_factor": (0.0, 1e3),
    "attention_dropout": (0.0, 1.0),
    "logit_scale_init_value": (-1e3, 1e3),
    "logit_bias_init_value": (-1e3, 1e3),
}
# Token ids; older configurations use -1 for none.
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Fields of a configuration that make Transformers load code, other files or other kinds of weights.
_DTYPES = (None, "auto", "float32", "float16", "bfloat16", "float64")
_OTHER_WEIGHTS = ("quantization_config", "fusion_config", "kernel_config", "transformers_weights", "compression_config")
_NOT_OF_THE_MODEL = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation")


def whole_number(name: str, value: object, most: int, *, least: int = 1) -> int:
    """Checks and returns a whole number in a range.

    Raises:
        ConversionError: the value is anything else; the message begins with `name`.
    """
    if type(value) is not int or not least <= value <= most:
        raise ConversionError(f"{name} must be a whole number from {least} to {most:,}, got {value!r:.80}.")
    return value


def number(name: str, value: Any, least: float, most: float) -> float:
    """Checks and returns a finite number in a range.

    Raises:
        ConversionError: the value is anything else; the message begins with `name`.
    """
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise ConversionError(f"{name} must be a number from {least:g} to {most:g}, got {value!r:.80}.")
    return value


def check_mask_ratio(value: Any) -> None:
    """Checks the fraction of patches to drop in training.

    Raises:
        ConversionError: it is not in [0, 1).
    """
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ConversionError(
            f"--mask_ratio {value!r:.40} is not in [0, 1): it is the fraction of the patches that training drops, 0.5 "
            "or 0.75 in the paper."
        )


def check_fields(fields: JsonObject, what: str, remainder: bool = False) -> None:
    """Checks the numbers in a configuration and in those of its towers.

    Args:
        fields: names and values, as in a `config.json`.
        what: the configuration's name for messages.
        remainder: patches need not divide an image, as in a SigLIP.

    Raises:
        ConversionError: a number is out of range, heads do not divide a width, or patches do not divide an image that
            must not have a remainder.
    """
    remainder = remainder or fields.get("model_type") == "siglip"
    for name, value in fields.items():
        plain = name.removeprefix("decoder_")
        if value is None:
            continue
        if plain in SIZES:
            whole_number(f"{what}: {name}", value, SIZES[plain])
        elif plain in NUMBERS:
            number(f"{what}: {name}", value, *NUMBERS[plain])
        elif name in IDS:
            whole_number(f"{what}: {name}", value, SIZES["vocab_size"], least=-1)
        elif isinstance(value, dict):
            check_fields(value, f"{what}: {name}", remainder)
    for prefix in ("", "decoder_"):
        width, heads = (fields.get(f"{prefix}{name}") for name in ("hidden_size", "num_attention_heads"))
        if width and heads and width % heads:
            raise ConversionError(f"{what}: {heads} attention heads do not divide the width, {width}.")
    image, patch = (fields.get(name) for name in ("image_size", "patch_size"))
    if image and patch and image % patch and not (remainder or fields.get("ignore_remainder") is True):
        raise ConversionError(f"{what}: patches of {patch} pixels do not divide an image of {image}.")


@contextmanager
def configuring(what: str) -> Iterator[None]:
    """Turns the errors of a configuration's constructor into one that names the source.

    Raises:
        ConversionError: a field has a value that the model cannot have.
    """
    try:
        yield
    except (StrictDataclassError, TypeError) as error:
        raise ConversionError(f"{what} cannot be a FLIP model: {reason(error)}.") from error


def make_config(config_class: type[ConfigT], fields: JsonObject, what: str) -> ConfigT:
    """Makes a configuration of checked fields.

    Raises:
        ConversionError: a field has a wrong type or value, or asks for code or other weights.
    """
    fields = _of_the_model(fields, what)
    check_fields(fields, what)
    try:
        return config_class.from_dict(fields)
    except Exception as error:  # strict dataclasses, and Transformers on unusual values, raise many types
        raise ConversionError(f"{what} does not describe a {config_class.__name__}: {reason(error)}.") from error


def _of_the_model(fields: JsonObject, what: str) -> JsonObject:
    """Returns the fields, also of the towers, without those that name code or a way to compute."""
    others = [name for name in _OTHER_WEIGHTS if fields.get(name)]
    if others:
        raise ConversionError(f"{what} has {others[0]}, but only plain weights are read.")
    for name in ("dtype", "torch_dtype"):
        if fields.get(name) not in _DTYPES:
            raise ConversionError(f"{what}: {name} must be one of {', '.join(_DTYPES[2:])}, got {fields[name]!r:.40}.")
    return {
        name: _of_the_model(value, f"{what}: {name}") if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in _NOT_OF_THE_MODEL
    }
