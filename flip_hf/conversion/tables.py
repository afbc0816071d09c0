"""What every format's converter shares: a table of names, and strict accounts.

A format is a list of [`Entry`]: its name of a tensor, our name (or names, where it stacks several), and how the values
lie. Every tensor of the source is used once and every tensor of the target is filled; otherwise nothing is made, and
the error lists what is missing and what is left over.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

SHOWN = 8


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class Layout:
    """How a tensor of the other format holds ours.

    Attributes:
        to_ours: one tensor of theirs to ours (several, where theirs stacks them).
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
        theirs: its name there.
        ours: our name, or the names of those that it stacks.
        layout: how the values lie.
    """

    theirs: str
    ours: str | tuple[str, ...]
    layout: Layout = SAME

    @property
    def targets(self) -> tuple[str, ...]:
        """Our names."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def blocks(entries: Iterable[Entry], theirs: str, ours: str, count: int) -> list[Entry]:
    """The entries of one Transformer block, repeated for `count` blocks.

    Args:
        entries: names within a block.
        theirs, ours: prefixes with `{}` for the block's number.
        count: blocks.
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
    """Checks that two sets of names are the same.

    Raises:
        ConversionError: they are not; the message lists both differences.
    """
    expected, found = set(expected), set(found)
    if expected != found:
        raise ConversionError(
            f"{what} does not have the tensors of this format. Missing: {_some(expected - found)}. "
            f"Left over: {_some(found - expected)}."
        )


def shapes_of(model_class: Any, config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of a model's saved tensors, without allocating them."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_class._from_config(config).state_dict().items()}


def to_ours(
    entries: Iterable[Entry],
    source: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    *,
    what: str,
) -> dict[str, Tensor]:
    """Reads a checkpoint of another format into tensors of ours.

    Args:
        entries: the format's table.
        source: the checkpoint; a tensor is read when it is asked for.
        shapes: the target's, from [`shapes_of`].
        what: the checkpoint's name in messages.

    Raises:
        ConversionError: a tensor is missing, left over, or of another shape.
    """
    entries = list(entries)
    check_names((e.theirs for e in entries), source.keys(), what)
    check_names((name for e in entries for name in e.targets), shapes.keys(), "The table of names")
    # The largest first: later, a transposed copy beside its source does not add to the peak of memory.
    entries.sort(key=lambda e: -shapes[e.targets[0]].numel())
    tensors: dict[str, Tensor] = {}
    for entry in tqdm(entries, desc="tensors", unit="", disable=None, leave=False):
        parts = entry.layout.to_ours(source[entry.theirs])
        for name, part in zip(entry.targets, parts, strict=True):
            if part.shape != shapes[name]:
                raise ConversionError(
                    f"{what}: {entry.theirs} has the shape {tuple(part.shape)} as {name}, expected "
                    f"{tuple(shapes[name])}. It belongs to another architecture, or the given sizes do not fit it."
                )
            # A copy also where nothing moved: parts of one stacked tensor would share its memory.
            tensors[name] = part.clone(memory_format=torch.contiguous_format) if len(parts) > 1 else part.contiguous()
    return tensors


def to_theirs(entries: Iterable[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes our tensors under another format's names; the inverse of [`to_ours`].

    Raises:
        ConversionError: the table does not fit the tensors.
    """
    entries = list(entries)
    check_names((name for e in entries for name in e.targets), tensors.keys(), "The model")
    return {e.theirs: e.layout.to_theirs(*(tensors[name] for name in e.targets)).contiguous() for e in entries}


def load(model_class: Any, config: PreTrainedConfig, tensors: dict[str, Tensor]) -> Any:
    """A model in evaluation mode with exactly these tensors, not copied, in their dtype (float32 if they differ).

    Raises:
        ConversionError: a tensor is missing or left over.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # of mixed ones, the one that holds all
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ConversionError(f"The tensors do not fill a {model_class.__name__}: {report}.")
    return model.eval()
