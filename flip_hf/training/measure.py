"""Measurements of a run: the numbers of a step, and where the time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from flip_hf.training.gradient_cache import StepLoss


@dataclass(frozen=True)
class StepResult:
    """The numbers of one optimizer step.

    Attributes:
        loss: the losses of this process's part of the batch, on the device.
        logit_scale: the factor on cosine similarities (1,), on the device; None where nothing is contrasted.
        learning_rate: the learning rate of this step.
        grad_norm: over all parameters and processes, before clipping; not finite where the step was skipped.
        kept_patches: patches encoded per image.
        text_tokens: tokens encoded per text, padding included.
    """

    loss: StepLoss
    logit_scale: torch.Tensor | None
    learning_rate: float
    grad_norm: float
    kept_patches: int
    text_tokens: int

    def values(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the values for a log line; losses are averaged over the processes, each of which must call it."""
        losses = self.loss.named()
        means: Any = accelerator.reduce(torch.stack(list(losses.values())), "mean")
        scale = {} if self.logit_scale is None else {"logit_scale": self.logit_scale.item()}
        return {
            **dict(zip(losses, means.tolist(), strict=True)),
            **scale,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "kept_patches": self.kept_patches,
            "text_tokens": self.text_tokens,
        }


class Window:
    """The time between two log lines.

    Args:
        samples, steps: counts when it begins.
    """

    def __init__(self, samples: int, steps: int):
        self._begin(samples, steps)

    def _begin(self, samples: int, steps: int) -> None:
        self._start = time.perf_counter()
        self._samples = samples
        self._steps = steps
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside: evaluation is not training."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def close(self, samples: int, steps: int) -> dict[str, float]:
        """Ends the window and begins the next.

        Returns:
            Its `seconds`; `samples_per_second` over all processes; `step_seconds`, the mean per step; `data_wait`, the
            share of the time, from 0 to 1, that this process waited for data, including the start of its workers.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        values = {
            "seconds": seconds,
            "samples_per_second": (samples - self._samples) / seconds,
            "step_seconds": seconds / max(1, steps - self._steps),
            "data_wait": self._waited / seconds,
        }
        self._begin(samples, steps)
        return values
