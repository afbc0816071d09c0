"""The result of an evaluation task."""

from dataclasses import dataclass, field
from typing import Any

from flip_hf.console.json_types import JsonObject


@dataclass
class Result:
    """The result of a task on a data set.

    Attributes:
        data_set: the data set's name.
        title: its name for display.
        task: one of `TASKS`.
        metric: the data set's own metric, a key of `metrics`.
        metrics: all metrics, in [0, 1].
        samples: number of samples measured.
        refused: unusable samples, by reason.
        details: further entries of the report, JSON-serialisable.
        material: data for pictures; not in the report.
        split: the split that was measured.
    """

    data_set: str
    title: str
    task: str
    metric: str
    metrics: dict[str, float]
    samples: int
    refused: dict[str, int]
    details: JsonObject = field(default_factory=dict)
    material: dict[str, Any] = field(default_factory=dict)
    split: str = "test"

    @property
    def value(self) -> float:
        """The value of the data set's own metric."""
        return self.metrics[self.metric]
