"""Measures what a fine-tuned model keeps of the one that the run started from, while there is time to change course."""

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
    """Compares the metrics of a run that starts from a trained model with those of that model.

    These are the run's own metric and, where there are retained data, theirs. The values before are kept in
    [`TrainState`], with what they were measured on: a resumed run with other data has nothing to compare with.

    Args:
        arguments: the run's arguments.
        own_key: identifies the run's own evaluation data.
        validator: of the retained data; None where there are none, and the run's own metric is watched.
    """

    def __init__(self, arguments: Arguments, own_key: str, validator: Validator | None):
        self.options = arguments.retention
        self.model = shown(arguments.model.model_name_or_path or "")
        self.output_dir = arguments.run.output_dir
        self.name = None if self.options.retain_data is None else shown(self.options.retain_data)
        self.validator = validator
        self.watched = OWN if validator is None else RETAINED
        self.keys = {OWN: own_key, RETAINED: "" if validator is None else validator.evaluation.key}
        self._metrics: dict[str, float] = {}
        self._has_warned = False

    def measure(self, encoder: PairEncoder) -> dict[str, float]:
        """Evaluates a model on the retained data; every process must call it. Returns what [`Validator`] does."""
        assert self.validator is not None
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
        if self.validator is None or not self.validator.accelerator.is_main_process:
            return
        record = state.before.get(RETAINED)
        if record is None or record["data"] != self.keys[RETAINED]:
            logger.warning(
                "--retain_data %s was not measured in this way before the run's first step, so a fall cannot be "
                "noticed. To compare, measure the model that the run started from: flip-hf evaluate %s.",
                self.name,
                self.model,
            )

    def in_words(self) -> str | None:
        """Describes the latest measurement of the retained data in a line of the log; None where there are none."""
        if self.validator is None:
            return None
        return f"retained, {self.name}: {in_words(self._metrics, self.validator.evaluation.class_names)}"

    def warn_of_fall(self, own: dict[str, float], state: TrainState) -> None:
        """Warns once, until the metric recovers, of a fall by more than the given share; call it on one process."""
        change = self._change(self.watched, own if self.watched == OWN else self._metrics, state)
        if change is None or change.fall <= self.options.retain_warning:
            self._has_warned = False
        elif not self._has_warned:
            self._has_warned = True
            logger.warning("%s", self._warning(change, state.samples))

    def results(self, own: dict[str, float], state: TrainState) -> JsonObject:
        """Returns the entry of `results.json`: `data` (or None), the changes `own` and `retained` (or None), `warned`.

        `warned` says whether the watched metric is now lower than before the run by more than the given share.
        """
        changes = {OWN: self._change(OWN, own, state), RETAINED: self._change(RETAINED, self._metrics, state)}
        known = {which: None if change is None else asdict(change) for which, change in changes.items()}
        watched = changes[self.watched]
        return {
            "data": self.name,
            **known,
            "warned": watched is not None and watched.fall > self.options.retain_warning,
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
        data = "the run's own evaluation data" if self.name is None else f"the retained data {self.name}"
        return (
            f"After {samples:,} samples, {NAMES[change.metric]} on {data} has fallen from "
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
        known[RETAINED] += f", on {results['data']}"
    watched = RETAINED if results["data"] is not None else OWN
    if results["warned"]:
        known[watched] += f", a fall by {Change(**results[watched]).fall:.0%} of its value"
    return known
