"""The best model of a run by its evaluations, kept in a folder, and early stopping when nothing better comes."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from flip_hf.console.json_types import JsonObject
from flip_hf.data.processes import from_main
from flip_hf.training.checkpoint import SET_ASIDE, TrainState, free_name

BEST = "best"
ABOUT = "best.json"
# The metrics that evaluations are compared by, the first that is present, and whether higher is better.
METRICS = {"mean_recall": True, "top1": True, "reconstruction_error": False}


@dataclass(frozen=True)
class _Verdict:
    """The main process's judgement of an evaluation.

    Attributes:
        metric: the metric it was judged by; None where nothing was measured.
        value: the metric's value.
        beats_kept: whether it is better than the model in the folder.
    """

    metric: str | None
    value: float
    beats_kept: bool


class Best:
    """Judges evaluations and keeps the model of the best one.

    Two records keep this right in a resumed run. Patience is counted in [`TrainState`], so that a run that goes back
    to a checkpoint counts again as before. The folder is compared with its own record: its model is only ever replaced
    by a better one, whenever that was found.

    Args:
        accelerator: the processes, all of which judge alike.
        output_dir: the run's folder.
        compared_on: the data of the evaluations; evaluations on other data are not compared.
        patience: evaluations in a row without improvement that end the run; None never ends it.
        keeps: keep the best model in a folder.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, compared_on: str, patience: int | None, keeps: bool):
        self.accelerator = accelerator
        self.folder = output_dir / BEST
        self.compared_on = compared_on
        self.patience = patience
        self.keeps = keeps

    def begin(self, state: TrainState) -> None:
        """Prepares folder and state for a run that starts from `state`, dropping what cannot be compared.

        The main process moves another run's folder to `set-aside`; every process must call it.
        """
        if state.compared_on != self.compared_on:
            state.compared_on = self.compared_on
            state.best_value = None
            state.evaluations_since_best = 0
        old = self._old()
        if self.accelerator.is_main_process and old.exists() and not self.folder.exists():
            old.rename(self.folder)  # the process was killed while replacing it
        self.accelerator.wait_for_everyone()
        kept = self.kept()
        comparable = kept is not None and kept["compared_on"] == self.compared_on and state.samples > 0
        if self.accelerator.is_main_process and self.folder.exists() and not comparable:
            aside = free_name(self.folder.parent / SET_ASIDE / BEST)
            aside.parent.mkdir(exist_ok=True)
            self.folder.rename(aside)
        self.accelerator.wait_for_everyone()

    def judge(self, metrics: dict[str, float], state: TrainState, saver: Callable[[], Callable[[Path], None]]) -> None:
        """Compares an evaluation with the best one so far, and keeps the model where it is better.

        Args:
            metrics: of the evaluation.
            state: the run's state, which records the best value and the evaluations since.
            saver: gathers the weights; every process calls it, the main one writes.
        """
        verdict = from_main(self.accelerator, lambda: self._verdict(metrics))
        better = verdict.metric is not None and _is_better(verdict.metric, verdict.value, state.best_value)
        state.evaluations_since_best = 0 if better else state.evaluations_since_best + 1
        if better:
            state.best_value = verdict.value
            state.best_samples = state.samples
        if self.keeps and verdict.beats_kept:
            save = saver()
            if self.accelerator.is_main_process:
                self._write(save, verdict, state.samples)
            self.accelerator.wait_for_everyone()

    def is_over(self, state: TrainState) -> bool:
        """Returns whether the run ends because patience has run out."""
        return self.patience is not None and state.evaluations_since_best >= self.patience

    def reason(self, state: TrainState) -> str | None:
        """Returns why the run ended early; None where it did not."""
        if not self.is_over(state):
            return None
        since = f"since {state.best_samples:,} samples" if state.best_value is not None else "at all"
        return (
            f"nothing better was found in {state.evaluations_since_best} evaluations, {since} "
            f"(--early_stopping_patience {self.patience})"
        )

    def kept(self) -> JsonObject | None:
        """Reads the folder's record: `metric`, `value`, `samples` and `compared_on`; None without one."""
        try:
            found = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
            return found if isinstance(found["value"], float) and found["metric"] in METRICS else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _old(self) -> Path:
        return self.folder.with_name(f"partial-old-{BEST}")

    def _verdict(self, metrics: dict[str, float]) -> _Verdict:
        metric = next((name for name in METRICS if name in metrics), None)
        if metric is None or not math.isfinite(metrics[metric]):
            return _Verdict(None, math.nan, False)
        value = float(metrics[metric])
        kept = self.kept()
        beats = kept is None or kept["metric"] != metric or _is_better(metric, value, kept["value"])
        return _Verdict(metric, value, beats)

    def _write(self, save: Callable[[Path], None], verdict: _Verdict, samples: int) -> None:
        """Writes the folder beside the old one, then swaps them."""
        written = self.folder.with_name(f"partial-{BEST}")
        old = self._old()
        for path in (written, old):
            shutil.rmtree(path, ignore_errors=True)
        save(written)
        about = {
            "metric": verdict.metric,
            "value": verdict.value,
            "samples": samples,
            "compared_on": self.compared_on,
        }
        (written / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if self.folder.exists():
            self.folder.rename(old)
        written.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


def _is_better(metric: str, value: float, best: float | None) -> bool:
    if best is None:
        return True
    return value > best if METRICS[metric] else value < best
