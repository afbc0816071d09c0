"""Features of a whole data set, computed by all processes and put back into its order."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from flip_hf.data.refusals import BadDataError
from flip_hf.data.waits import WaitEnded
from flip_hf.data.workers import open_batches


@dataclass(frozen=True)
class Features:
    """Features of N images, in the order of their data set, on every process.

    Attributes:
        values: (N, D), float32.
        targets: each image's class, classes or captions.
        places: (shard, row) of each.
        refused: unusable images, by reason.
    """

    values: np.ndarray
    targets: list[Any]
    places: list[tuple[int, int]]
    refused: Counter[str]


@torch.no_grad()
def extract(
    encode: Callable[[torch.Tensor, list[tuple[int, int]]], torch.Tensor],
    batches: Iterable[dict[str, Any]],
    accelerator: Accelerator,
    name: str,
) -> Features:
    """Encodes this process's part of a data set, and gathers all parts.

    Args:
        encode: turns images (B, ...) on the device and their places into features (B, D).
        batches: batches of this process's [`EvalStream`].
        accelerator: the processes; each must call this.
        name: shown on the progress bar.

    Raises:
        BadDataError: a process cannot read its part; raised on all, so that none waits for it.
        WaitEnded: a signal ended a process's wait for its part; raised on all likewise.
    """
    part = _Part()
    disabled = not accelerator.is_main_process
    with tqdm(desc=name, unit=" images", leave=False, disable=disabled) as bar, open_batches(batches) as opened:
        try:
            for batch in opened:
                part.refused.update(batch["refused"])
                if batch["targets"]:
                    images = batch["images"].to(accelerator.device, non_blocking=True)
                    part.add(encode(images, batch["places"]).float())
                    part.targets += batch["targets"]
                    part.places += map(tuple, batch["places"])  # a loader turns them into lists
                    bar.update(len(images) * accelerator.num_processes)
        except BadDataError as error:
            part.error = str(error)
        except WaitEnded:
            part.ended = True
    part.fetch()
    return _together(gather_object([part]))


@dataclass
class _Part:
    """One process's part of the features."""

    values: list[np.ndarray] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    error: str | None = None
    ended: bool = False
    _last: torch.Tensor | None = None

    def add(self, values: torch.Tensor) -> None:
        """Adds the features of a batch, which may still be computed, and fetches those of the batch before.

        The device then has the next batch to work on while the host waits for the last one.
        """
        self.fetch()
        self._last = values

    def fetch(self) -> None:
        """Waits for the features of the last batch."""
        if self._last is not None:
            self.values.append(self._last.cpu().numpy())
            self._last = None


def _together(parts: Sequence[_Part]) -> Features:
    for part in parts:
        if part.error is not None:
            raise BadDataError(part.error)
    if any(part.ended for part in parts):
        raise WaitEnded
    values = [value for part in parts for value in part.values]
    targets = [target for part in parts for target in part.targets]
    places = [place for part in parts for place in part.places]
    order = sorted(range(len(places)), key=places.__getitem__)
    stacked = np.concatenate(values)[order] if values else np.empty((0, 0), np.float32)
    refused = sum((part.refused for part in parts), Counter())
    return Features(stacked, [targets[i] for i in order], [places[i] for i in order], refused)


def extract_texts(
    encode: Callable[[list[str]], torch.Tensor], texts: Sequence[str], accelerator: Accelerator, batch_size: int
) -> np.ndarray:
    """Encodes N texts to (N, E), float32, in batches that are the same for any number of processes.

    Args:
        encode: turns texts into features (B, E).
        texts: N texts.
        accelerator: the processes; each must call this.
        batch_size: texts encoded at once.
    """
    batches = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    turns = range(accelerator.process_index, len(batches), accelerator.num_processes)
    bar = tqdm(turns, desc="texts", unit="batch", leave=False, disable=not accelerator.is_main_process)
    encoded = dict(gather_object([(turn, encode(batches[turn]).float().cpu().numpy()) for turn in bar]))
    return np.concatenate([encoded[turn] for turn in range(len(batches))])
