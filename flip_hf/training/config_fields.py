"""Fields of a model's configuration that are given as JSON: `--vision_config`, `--text_config`, `--decoder_config`."""

import dataclasses
import json
from typing import Any

from flip_hf.console.fields import OptionError, require
from flip_hf.console.parsers import nearest

# Fields of a tower that are set for the whole model.
_ELSEWHERE = {
    "mask_ratio": "--mask_ratio",
    "mask_strategy": "--mask_strategy",
    "projection_dim": "--projection_dim",
    "projection_bias": "FlipConfig",
}


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"one of {', '.join(fields)} is given twice")
    return fields


def _own_fields(config_class: str) -> list[str]:
    """Lists the fields of a `flip_hf.modeling` configuration that not every model has."""
    # Imported here because it imports torch, which parsing options without such fields does not need.
    from transformers import PreTrainedConfig

    import flip_hf.modeling as modeling

    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}  # pyright: ignore[reportArgumentType]
    return [each.name for each in dataclasses.fields(getattr(modeling, config_class)) if each.name not in inherited]


def config_fields(text: str | None, name: str, config_class: str) -> dict[str, Any]:
    """Parses fields of a configuration that are given as JSON.

    Raises:
        OptionError: it is not a JSON object, or has a key that is not a field or that another option sets.
    """
    try:
        value = json.loads(text or "{}", object_pairs_hook=_refuse_twice)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"--{name} must be JSON such as '{{\"hidden_size\": 512}}': {error}.") from error
    require(isinstance(value, dict), f"--{name} must be a JSON object, got {text}.")
    known = _own_fields(config_class) if value else []
    for key in value:
        require(key in known, f"--{name} has no field {key!r}.{nearest(key, known)}")
        require(key not in _ELSEWHERE, f"--{name}: {key} is set by {_ELSEWHERE.get(key)}, for the whole model.")
    return value
