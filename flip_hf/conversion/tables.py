"""Converts tensors by a table of names, with strict accounting; shared by the converters of all formats.

A format is a list of [`Entry`]: its name of a tensor, our name (or names, if it stacks several), and the layout of the
values. Every tensor of the source is used once and every tensor of the target is filled; otherwise the conversion
fails, and the error lists what is missing and what is left over.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from flip_hf.conversion.errors import ConversionError, reason

__all__ = ["ConversionError", "Entry", "Layout", "blocks", "check_names", "load", "shapes_of", "to_ours", "to_theirs"]

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

SHOWN = 8


# Dtypes of weights. Integers, 8-bit floats and quantized numbers need scales that no table here has.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Layout:
    """The layout of our values in a tensor of the other format.

    Attributes:
        to_ours: maps one of their tensors to ours (to several, if theirs stacks them).
        to_theirs: the exact inverse.
    """

    to_ours: Callable[[Tensor], tuple[Tensor, ...]]
    to_theirs: Callable[..., Tensor]


SAME = Layout(lambda t: (t,), lambda t: t)
TRANSPOSED = Layout(lambda t: (t.T,), lambda t: t.T)  # a kernel (in, out) and a weight (out, in)
STACKED = Layout(lambda t: t.chunk(3), lambda *parts: torch.cat(parts))  # query, key and value in one
HWIO = Layout(lambda t: (t.permute(3, 2, 0, 1),), lambda t: t.permute(2, 3, 1, 0))  # and OIHW
FLAT = Layout(lambda t: (t.flatten(),), lambda t: t.reshape(1, 1, -1))  # (1, 1, D) and (D)
ROWS = Layout(lambda t: (t.squeeze(0),), lambda t: t.unsqueeze(0))  # (1, T, D) and (T, D)
SCALAR = Layout(lambda t: (t.reshape(1),), lambda t: t.reshape(()))  # () and (1,)


@dataclass(frozen=True)
class Entry:
    """One tensor of the other format.

    Attributes:
        theirs: its name in that format.
        ours: our name, or the names of the tensors that it stacks.
        layout: the layout of the values.
    """

    theirs: str
    ours: str | tuple[str, ...]
    layout: Layout = SAME

    @property
    def targets(self) -> tuple[str, ...]:
        """All of our names."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def blocks(entries: Iterable[Entry], theirs: str, ours: str, count: int) -> list[Entry]:
    """Repeats the entries of one Transformer block for `count` blocks.

    Args:
        entries: entries with names relative to a block.
        theirs, ours: prefixes with `{}` for the block's number.
        count: number of blocks.
    """
    return [
        Entry(theirs.format(i) + e.theirs, tuple(ours.format(i) + name for name in e.targets), e.layout)
        for i in range(count)
        for e in entries
    ]


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:SHOWN])
    return f"{len(names)} ({shown}{', ...' if len(names) > SHOWN else ''})" if names else "none"


def check_names(expected: Iterable[str], found: Iterable[str], what: str) -> None:
    """Checks that two sets of names are equal.

    Raises:
        ConversionError: they differ; the message lists both differences.
    """
    expected = set(expected)
    found = set(found)
    if expected != found:
        raise ConversionError(
            f"{what} does not have the tensors of this format. Missing: {_some(expected - found)}. "
            f"Left over: {_some(found - expected)}."
        )


def shapes_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Returns names and shapes of a model's saved tensors without allocating them.

    Raises:
        ConversionError: the configuration is invalid.
    """
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in model_class._from_config(config).state_dict().items()}
    except Exception as error:  # of many types
        raise ConversionError(f"The configuration is not valid for {model_class.__name__}: {reason(error)}.") from error


def check_dtypes(dtypes: Mapping[str, torch.dtype], what: str) -> None:
    """Checks that all tensors hold floating-point numbers.

    Raises:
        ConversionError: some do not; the message names them.
    """
    others = {name: dtype for name, dtype in dtypes.items() if dtype not in FLOATS}
    if others:
        kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in others.values()}))
        raise ConversionError(
            f"{what} has tensors of {kinds}, which are not plain weights: {_some(others)}. Convert the model that it "
            "was quantized from, or save it in float32, float16 or bfloat16 first."
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Checks that all weights are finite; integers always are.

    Raises:
        ConversionError: some are not finite; the message names the tensors.
    """
    refuse_spoilt([name for name, tensor in tensors if not tensor.isfinite().all()], what)


def refuse_spoilt(names: Sequence[str], what: str) -> None:
    """Refuses a checkpoint with tensors that are not finite.

    Raises:
        ConversionError: there are such tensors.
    """
    if names:
        raise ConversionError(
            f"{what} has infinite numbers or NaN in its weights: {_some(names)}. The training diverged, or the file is "
            "damaged; convert an earlier checkpoint, or fetch it again."
        )


def _parts(entry: Entry, tensor: Tensor, shapes: Mapping[str, torch.Size], what: str) -> tuple[Tensor, ...]:
    """Extracts our tensors from one of theirs, and checks their shapes."""
    try:
        parts = entry.layout.to_ours(tensor)
    except (RuntimeError, IndexError):  # the layout needs another number of dimensions
        parts = (tensor,)
    found = [tuple(part.shape) for part in parts]
    expected = [tuple(shapes[name]) for name in entry.targets]
    if found != expected:
        at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), 0)
        raise ConversionError(
            f"{what}: {entry.theirs} has the shape {found[at]} as {entry.targets[at]}, expected {expected[at]}. It "
            "belongs to another architecture, or the given sizes do not match it."
        )
    return parts


def _check_source(
    entries: Iterable[Entry], source: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], what: str
) -> None:
    """Checks the dtype and shape of every tensor before any is read."""
    empty = getattr(source, "empty", lambda name: torch.empty_like(source[name], device="meta"))
    dtypes = {}
    for entry in entries:
        tensor = empty(entry.theirs)
        dtypes[entry.theirs] = tensor.dtype
        _parts(entry, tensor, shapes, what)
    check_dtypes(dtypes, what)


def to_ours(
    entries: Iterable[Entry],
    source: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    *,
    what: str,
) -> dict[str, Tensor]:
    """Reads a checkpoint of another format into our tensors.

    Args:
        entries: the format's table.
        source: the checkpoint; a tensor is read on access. Its method `empty`, if it has one, returns a tensor without
            its values.
        shapes: the target's shapes, from [`shapes_of`].
        what: the checkpoint's name for messages.

    Raises:
        ConversionError: a tensor is missing, left over, of another shape, not of floating-point numbers, or not finite.
    """
    entries = list(entries)
    check_names((e.theirs for e in entries), source.keys(), what)
    check_names((name for e in entries for name in e.targets), shapes.keys(), "The table of names")
    _check_source(entries, source, shapes, what)
    # The largest first, so that later a transposed copy beside its source does not raise the peak of memory.
    entries.sort(key=lambda e: -shapes[e.targets[0]].numel())
    tensors: dict[str, Tensor] = {}
    spoilt = []
    for entry in tqdm(entries, desc="tensors", unit="", disable=None, leave=False):
        tensor = source[entry.theirs]
        if not tensor.isfinite().all():
            spoilt.append(entry.theirs)
        parts = _parts(entry, tensor, shapes, what)
        for name, part in zip(entry.targets, parts, strict=True):
            # Copy even contiguous parts, because parts of one stacked tensor would share its memory.
            tensors[name] = part.clone(memory_format=torch.contiguous_format) if len(parts) > 1 else part.contiguous()
    refuse_spoilt(spoilt, what)
    return tensors


def to_theirs(entries: Iterable[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes our tensors under another format's names; the inverse of [`to_ours`].

    Raises:
        ConversionError: the table does not match the tensors.
    """
    entries = list(entries)
    check_names((name for e in entries for name in e.targets), tensors.keys(), "The model")
    return {e.theirs: e.layout.to_theirs(*(tensors[name] for name in e.targets)).contiguous() for e in entries}


def load(model_class: type[ModelT], config: PreTrainedConfig, tensors: dict[str, Tensor]) -> ModelT:
    """Makes a model in evaluation mode of exactly these tensors, not copied, in the dtype that holds all of theirs.

    Raises:
        ConversionError: a tensor is missing or left over.
    """
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    loaded: Any = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ConversionError(f"The tensors do not match a {model_class.__name__}: {report}.")
    return model.eval()
