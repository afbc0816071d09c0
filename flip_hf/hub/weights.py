"""Checks that weights may be published: complete, readable, finite, and without secrets in their headers."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flip_hf.redaction import redact

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_NAMED = 5  # tensors named in a message
_CHUNK = 2**24  # numbers checked at once


def weight_files(index: bytes | None) -> dict[str, set[str]]:
    """Returns the weights files and the names of the tensors in each, as far as known.

    Args:
        index: the content of `model.safetensors.index.json`, or None if there is none.

    Raises:
        ValueError: the index is invalid, or names files other than shards.
    """
    if index is None:
        return {SINGLE: set()}
    try:
        found = json.loads(index)["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{INDEX} is damaged: it has no weight_map.") from error
    files: dict[str, set[str]] = {}
    for tensor, name in found:
        if not isinstance(name, str) or not (name == SINGLE or _SHARD.fullmatch(name)):
            raise ValueError(f"{INDEX} names {name!r}, which is not the name of a weights file.")
        files.setdefault(name, set()).add(tensor)
    return files or {SINGLE: set()}


def check_weights(path: Path, tensors: set[str]) -> None:
    """Checks a weights file tensor by tensor, and never holds more than one of them.

    Args:
        path: a safetensors file.
        tensors: names of its tensors according to the index; empty without an index.

    Raises:
        ValueError: it is damaged, a tensor is missing or not finite, or its header contains something like a secret;
            the message names the tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            header = json.dumps([file.metadata() or {}, names])
            missing = sorted(tensors.difference(names))
            spoilt = [name for name in names if not _is_finite(file.get_tensor(name))]
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged or not in safetensors ({error}). Save the model again.") from error
    if missing:
        raise ValueError(f"{path.name} lacks tensors that {INDEX} names: {_few(missing)}.")
    if redact(header) != header:
        raise ValueError(
            f"The header of {path.name} contains something like a token or a password. Save the model again with "
            "`save_pretrained`, which writes none."
        )
    if spoilt:
        raise ValueError(
            f"{path.name} has numbers that are not finite (NaN or infinite), which make a model useless: "
            f"{_few(spoilt)}. Nothing was published. Go back to an earlier checkpoint."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    chunks = tensor.reshape(-1).split(_CHUNK)
    # Eight-bit floats do not support `isfinite`.
    return all(bool((chunk.float() if chunk.element_size() == 1 else chunk).isfinite().all()) for chunk in chunks)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
