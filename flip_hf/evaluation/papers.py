"""What papers report, to lay beside a model's own figures."""

from functools import cache
from importlib import resources

import yaml


@cache
def _rows() -> list[dict]:
    return yaml.safe_load((resources.files("flip_hf.evaluation") / "papers.yaml").read_text(encoding="utf-8"))


def published(task: str = "zero_shot") -> dict[str, dict[str, float]]:
    """Published figures of a task: `{model: {data set: figure}}`, in [0, 1].

    Args:
        task: `zero_shot`, `text_retrieval` or `image_retrieval` (recall at 1), `linear_probe`, `fine_tuning`.

    Raises:
        ValueError: there is no such task in `papers.yaml`, which also says the source of every figure.
    """
    figures: dict[str, dict[str, float]] = {}
    for row in _rows():
        if row["task"] == task:
            values = {name: percent / 100 for name, percent in row["values"].items()}
            figures.setdefault(row["model"], {}).update(values)
    if not figures:
        raise ValueError(f"No figures of {task!r}; there are {', '.join(sorted({row['task'] for row in _rows()}))}.")
    return figures
