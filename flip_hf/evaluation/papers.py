"""Published results, to compare a model's own with."""

from functools import cache
from importlib import resources

import yaml


@cache
def _rows() -> list[dict]:
    return yaml.safe_load((resources.files("flip_hf.evaluation") / "papers.yaml").read_text(encoding="utf-8"))


def published(task: str = "zero_shot") -> dict[str, dict[str, float]]:
    """Returns the published results of a task, `{model: {data set: value}}`, in [0, 1].

    Args:
        task: `zero_shot`, `text_retrieval` or `image_retrieval` (recall at 1), `linear_probe`, `fine_tuning`.

    Raises:
        ValueError: there is no such task in `papers.yaml`, which also gives the source of every value.
    """
    figures: dict[str, dict[str, float]] = {}
    for row in _rows():
        if row["task"] == task:
            values = {name: percent / 100 for name, percent in row["values"].items()}
            figures.setdefault(row["model"], {}).update(values)
    if not figures:
        raise ValueError(f"No figures of {task!r}; there are {', '.join(sorted({row['task'] for row in _rows()}))}.")
    return figures
