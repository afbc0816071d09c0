"""What a fine-tuned model keeps of the one that the run started from, so that nobody learns too late what it forgot."""

import logging
import math
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from flip_hf.console.json_types import JsonObject
from flip_hf.redaction import shown
from flip_hf.training.arguments import Arguments
from flip_hf.training.checkpoint import TrainState
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.validation import Validator, in_words

logger = logging.getLogger(__name__)

OWN = "own"
RETAINED = "retained"
# The metrics that a model is compared by before and after, the first that is present; higher is better in all.
NAMES = {"mean_recall": "mean R@1/5/10", "top1": "zero-shot top-1"}


@dataclass(frozen=True)
class Change:
    """A metric before a run and at its latest evaluation, in [0, 1].

    Attributes:
        metric: one of `NAMES`.
        before: its value for the model that the run started from; None if that was not measured on the same data.
        after: its latest value; None if it was not measured.
    """

    metric: str
    before: float | None
    after: float | None

    @property
    def fall(self) -> float:
        """The fall as a share of the value before; 0 where it rose, or where one of the two is not known."""
        if not self.before or self.after is None:
            return 0.0
        return max(0.0, 1 - self.after / self.before)

    def in_words(self) -> str:
        """Says both values."""
        before = "not measured before the run" if self.before is None else f"{self.before:.1%} before the run"
        after = "not measured after it" if self.after is None else f"{self.after:.1%} after it"
        return f"{NAMES[self.metric]} {before}, {after}"


class Retention:
    """Measures the retained data, and compares its and the run's own metric with those before the run.

    The values before are kept in [`TrainState`], with what they were measured on: a resumed run with other data has
    nothing to compare with.

    Args:
        arguments: the run's arguments.
        validator: of the retained data.
        own_key: identifies the run's own evaluation data.
    """

    def __init__(self, arguments: Arguments, validator: Validator, own_key: str):
        self.options = arguments.retention
        self.model = shown(arguments.model.model_name_or_path or "")
        self.output_dir = arguments.run.output_dir
        self.name = shown(self.options.retain_data or "")
        self.validator = validator
        self.keys = {OWN: own_key, RETAINED: validator.evaluation.key}
        self._metrics: dict[str, float] = {}
        self._has_warned = False

    def measure(self, encoder: PairEncoder) -> dict[str, float]:
        """Evaluates a model on the retained data; every process must call it. Returns what [`Validator`] does."""
        self._metrics = self.validator(encoder)
        return self._metrics

    def remember(self, own: dict[str, float], state: TrainState) -> None:
        """Records the own metrics, and the retained ones measured last, as those before the run."""
        measured = {OWN: _deciding(own), RETAINED: _deciding(self._metrics)}
        state.before = {
            which: {"data": self.keys[which], "metric": found[0], "value": found[1]}
            for which, found in measured.items()
            if found is not None
        }

    def check_resumed(self, state: TrainState) -> None:
        """Warns, on the main process, where a resumed run has no value to compare the retained data with."""
        record = state.before.get(RETAINED)
        is_comparable = record is not None and record["data"] == self.keys[RETAINED]
        if self.validator.accelerator.is_main_process and not is_comparable:
            logger.warning(
                "--retain_data %s was not measured in this way before the run's first step, so a fall cannot be "
                "noticed. To compare, measure the model that the run started from: flip-hf evaluate %s.",
                self.name,
                self.model,
            )

    def in_words(self) -> str:
        """Describes the latest measurement in a line of the log, without a full stop."""
        return f"retained, {self.name}: {in_words(self._metrics, self.validator.evaluation.class_names)}"

    def warn_of_fall(self, state: TrainState) -> None:
        """Warns once, until the metric recovers, of a fall by more than the given share; on the main process."""
        change = self._change(RETAINED, self._metrics, state)
        if change is None or change.fall <= self.options.retain_warning:
            self._has_warned = False
        elif self.validator.accelerator.is_main_process and not self._has_warned:
            self._has_warned = True
            logger.warning("%s", self._warning(change, state.samples))

    def results(self, own: dict[str, float], state: TrainState) -> JsonObject:
        """Returns the entry of `results.json`: `data`, the changes `own` and `retained` (or None), and `warned`."""
        changes = {OWN: self._change(OWN, own, state), RETAINED: self._change(RETAINED, self._metrics, state)}
        known = {which: None if change is None else asdict(change) for which, change in changes.items()}
        retained = changes[RETAINED]
        return {
            "data": self.name,
            **known,
            "warned": retained is not None and retained.fall > self.options.retain_warning,
        }

    def _change(self, which: str, metrics: dict[str, float], state: TrainState) -> Change | None:
        """Compares the latest metrics with those before the run; None where neither is known."""
        record = state.before.get(which)
        is_comparable = record is not None and record["data"] == self.keys[which]
        found = _deciding(metrics)
        if not is_comparable or record is None:
            return None if found is None else Change(found[0], None, found[1])
        after = metrics.get(record["metric"], math.nan)
        return Change(record["metric"], record["value"], after if math.isfinite(after) else None)

    def _warning(self, change: Change, samples: int) -> str:
        ends = shlex.join([str(self.model), str(self.output_dir)])
        return (
            f"After {samples:,} samples, {NAMES[change.metric]} on the retained data {self.name} has fallen from "
            f"{change.before:.1%} before the run to {change.after:.1%}, by {change.fall:.0%} of its value (warned of "
            f"above {self.options.retain_warning:.0%}, --retain_warning): the model is losing what it could do. Lower "
            "--base_lr or --mask_ratio, keep a part of it with --freeze, or mix the result with the model that it "
            f"started from: flip-hf interpolate {ends} --alpha 0.5 --output_dir FOLDER"
        )


def _deciding(metrics: dict[str, float]) -> tuple[str, float] | None:
    """Returns the metric that models are compared by, and its value; None where nothing finite was measured."""
    name = next((name for name in NAMES if name in metrics), None)
    return (name, metrics[name]) if name is not None and math.isfinite(metrics[name]) else None


def changes_in_words(results: dict[str, Any]) -> dict[str, str]:
    """Describes an entry of [`Retention.results`]: the changes of the own and of the retained metric, where known."""
    known = {which: Change(**results[which]).in_words() for which in (OWN, RETAINED) if results[which] is not None}
    if RETAINED in known:
        lost = f", a fall by {Change(**results[RETAINED]).fall:.0%} of its value" if results["warned"] else ""
        known[RETAINED] += f", on {results['data']}{lost}"
    return known
