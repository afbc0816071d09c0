"""The ways to fine-tune a model, compared: the accuracy where it is tuned, the accuracy that it keeps, and the time.

A base model is trained with the recipe and three quarters of the patches dropped. Each choice starts from it, sees
equally many pairs of other data, and is measured on the evaluation data of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flip_hf.reproduction.figures import DPI, mean_in_words
from flip_hf.reproduction.plan import MASKS, Experiment, Scale, lengths
from flip_hf.reproduction.running import Point
from flip_hf.training.recipes import parse_arguments

BASE = "base"
BASE_LENGTH = 4  # times the pairs of the longest unmasked run, at a quarter of the patches: about its time
WARM_UP = 0.1
# The recipe's optimizer is chosen for training from scratch; people fine-tune with AdamW.
OPTIMIZER = {"optimizer": "adamw", "weight_decay": 0.1}


@dataclass(frozen=True)
class TunedData:
    """The data of a comparison.

    Attributes:
        train: `--train_data` of the tuned runs.
        evaluation: their `--eval_data`.
        retained: labelled data that the base was trained for.
    """

    train: tuple[str, ...]
    evaluation: str
    retained: str


@dataclass(frozen=True)
class Choice:
    """A way to fine-tune.

    Attributes:
        name: name of its run.
        words: the choice in words.
        mask: percent of the patches dropped.
        base_lr: learning rate for 256 samples, chosen on held-out pictures; see docs/finetuning.md.
        unmasked: share of the pairs that are seen whole, at the end.
        options: further options of `flip-hf pretrain`.
    """

    name: str
    words: str
    mask: int
    base_lr: float
    unmasked: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


LORA = ("image:8", "text:8")
# Rates: of 1e-4, 4e-4, 1.6e-3, 3.2e-3 and 6.4e-3 (not each of them for each choice), the best on held-out pictures.
CHOICES = (
    Choice("whole", "whole images", 0, 1.6e-3),
    Choice("mask50", "50 % masked", 50, 1.6e-3),
    Choice("mask75", "75 % masked", 75, 1.6e-3),
    Choice("mask50-tuned", "50 % masked, the last fifth on whole images", 50, 1.6e-3, 0.2),
    Choice("text-frozen", "50 % masked, the text tower frozen", 50, 1.6e-3, options={"freeze": "text"}),
    Choice("image-frozen", "whole images, the image tower frozen", 0, 6.4e-3, options={"freeze": "image"}),
    Choice("lora", "50 % masked, LoRA of rank 8 in both towers", 50, 6.4e-3, options={"lora": LORA}),
)
INTERPOLATED = "mask50"  # the tuned model whose weights are interpolated with the base's
BETWEEN = {f"{INTERPOLATED}-alpha{percent}": percent / 100 for percent in (30, 50, 70)}


def finetuning_runs(scale: Scale, data: TunedData) -> list[Experiment]:
    """Lists the base model, every choice, and the interpolation, those that others start from first."""
    base = _options(round(BASE_LENGTH * scale.samples / scale.batch), scale.batch, 75, 1 / 16)
    runs = [Experiment(BASE, base), *(_tuned(choice, scale, data) for choice in CHOICES)]
    both = {"data": data.evaluation, "retain_data": data.retained}
    between = [
        Experiment(name, {"alpha": alpha, **both}, INTERPOLATED, "interpolation") for name, alpha in BETWEEN.items()
    ]
    return [*runs, *between]


def check_data(recipe: str, data: TunedData) -> None:
    """Opens the data to fine-tune on and to measure on, before the base is trained.

    Raises:
        ValueError: they cannot be used with the recipe; the message names them.
        OSError: they cannot be read.
    """
    from flip_hf.training.evaluation_data import open_evaluation_data
    from flip_hf.training.inputs import label_column, open_training_data

    for evaluation in (data.evaluation, data.retained):
        words = [recipe, "--train_data", *data.train, "--eval_data", evaluation]
        arguments = parse_arguments(words).data
        sources = open_training_data(arguments)
        open_evaluation_data(arguments, likely=label_column(sources))


def _options(steps: int, batch: int, mask: int, warm_up: float) -> dict[str, Any]:
    return {"mask_ratio": MASKS[mask], "batch_size": batch, **lengths(steps, batch, warm_up)}


def _tuned(choice: Choice, scale: Scale, data: TunedData) -> Experiment:
    steps = round(scale.samples / scale.batch)
    unmasked = round(choice.unmasked * steps)
    options = {
        **_options(steps - unmasked, scale.batch, choice.mask, WARM_UP),
        **OPTIMIZER,
        "base_lr": choice.base_lr,
        "train_data": data.train,
        "eval_data": data.evaluation,
        "retain_data": data.retained,
        "retain_warning": 1,
        **choice.options,
    }
    if unmasked:
        tuning = {"unmasked_samples": unmasked * scale.batch, "unmasked_base_lr": 0.3 * choice.base_lr}
        options |= {**tuning, "unmasked_warmup_samples": max(1, unmasked // 5) * scale.batch}
    return Experiment(choice.name, options, start=BASE)


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The results of a choice over the seeds.

    Attributes:
        words: the choice in words.
        tuned, retained: accuracies in percent, by seed, on the data that it was tuned on and on those of the base.
        seconds: seconds of training steps, by seed.
    """

    words: str
    tuned: tuple[float, ...]
    retained: tuple[float, ...]
    seconds: tuple[float, ...]


def rows(points: Sequence[Point]) -> list[Row]:
    """Collects the rows of the table: the base, the choices, and the interpolations, of those that have points."""
    names = {choice.name: choice.words for choice in CHOICES}
    names |= {name: f"{names[INTERPOLATED]}, then {alpha:.0%} of the way to it" for name, alpha in BETWEEN.items()}
    before = [point.before for point in points if point.name == CHOICES[0].name and point.before is not None]
    found = [_row("the base", before, [])]
    for name, words in names.items():
        of_name = [point for point in points if point.name == name]
        accuracies = [(point.top1, point.retained) for point in of_name if point.retained is not None]
        found.append(_row(words, accuracies, [point.seconds for point in of_name if point.seconds]))
    return [row for row in found if row.tuned]


def _row(words: str, accuracies: Sequence[tuple[float, float]], seconds: Sequence[float]) -> Row:
    tuned = tuple(100 * each for each, _ in accuracies)
    retained = tuple(100 * each for _, each in accuracies)
    return Row(words, tuned, retained, tuple(seconds))


def choices_table(points: Sequence[Point]) -> str:
    """Makes a Markdown table of the choices: both accuracies, and the training time relative to whole images."""
    whole = float(np.mean([point.seconds for point in points if point.name == CHOICES[0].name] or [np.nan]))
    lines = [
        "| choice | tuned-on data, % | the base's data, % | training, s | / whole images |",
        "|---|---|---|---|---|",
    ]
    for row in rows(points):
        relative = f"{np.mean(row.seconds) / whole:.2f}" if row.seconds and np.isfinite(whole) else "-"
        cells = [row.words, *map(mean_in_words, (row.tuned, row.retained, row.seconds)), relative]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_choices(points: Sequence[Point], path: Path) -> Figure:
    """Draws each choice by the accuracy that it keeps and the accuracy that it reaches; up and right is better."""
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for row, marker in zip(rows(points), "sov^D<>*pPX", strict=False):
        spread = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in (row.retained, row.tuned)]
        where = [float(np.mean(values)) for values in (row.retained, row.tuned)]
        axes.errorbar(*where, xerr=spread[0], yerr=spread[1], fmt=marker, capsize=2, label=row.words)
    axes.set_xlabel("accuracy that is kept on the base's data, %")
    axes.set_ylabel("accuracy on the tuned-on data, %")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)
    return figure


def write_choices(points: Sequence[Point], folder: Path, about: str) -> None:
    """Writes the figure and `README.md` of a comparison of choices."""
    draw_choices(points, folder / "choices.png")
    parts = [
        "# Ways to fine-tune, compared\n",
        about,
        choices_table(points),
        "\n![Accuracy kept and accuracy reached by each choice](choices.png)",
    ]
    (folder / "README.md").write_text("\n".join(parts) + "\n", encoding="utf-8")
