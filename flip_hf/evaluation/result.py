"""What a task found."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """What came out of a task on a data set.

    Attributes:
        data_set: its name.
        title: its name for people.
        task: one of `TASKS`.
        metric: the data set's own, a key of `metrics`.
        metrics: all figures, in [0, 1].
        samples: that were measured on.
        refused: samples that could not be used, by reason.
        details: what else belongs into the report; JSON-able.
        material: for pictures; not in the report.
        split: of the data set, that was measured on.
    """

    data_set: str
    title: str
    task: str
    metric: str
    metrics: dict[str, float]
    samples: int
    refused: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)
    material: dict[str, Any] = field(default_factory=dict)
    split: str = "test"

    @property
    def value(self) -> float:
        """The data set's own metric."""
        return self.metrics[self.metric]
