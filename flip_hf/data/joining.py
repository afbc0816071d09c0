"""Joins the tensors of a batch on their way between processes, where each costs a file descriptor and a connection."""

import math
from typing import Any

import torch


def join(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Joins tensors of any shapes, by name, into a flat one for each dtype.

    Returns:
        A message for [`split`]: `joined`, the flat tensors; `parts`, the names and shapes of what is in each; and
        `order`, the names in their order. A tensor that is alone of its dtype is not copied if it is contiguous.
    """
    names: dict[torch.dtype, list[str]] = {}
    for name, tensor in batch.items():
        names.setdefault(tensor.dtype, []).append(name)
    flat = [[batch[name].flatten() for name in group] for group in names.values()]
    return {
        "joined": [torch.cat(group) if len(group) > 1 else group[0] for group in flat],
        "parts": [[(name, tuple(batch[name].shape)) for name in group] for group in names.values()],
        "order": list(batch),
    }


def split(message: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Takes what [`join`] made apart again, into views of the joined tensors."""
    found: dict[str, torch.Tensor] = {}
    for flat, parts in zip(message["joined"], message["parts"], strict=True):
        pieces = flat.split([math.prod(shape) for _, shape in parts])
        found |= {name: piece.view(shape) for (name, shape), piece in zip(parts, pieces, strict=True)}
    return {name: found[name] for name in message["order"]}
