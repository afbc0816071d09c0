"""Plots of results; all of them are readable in greyscale.

Every function writes a file, in the format of the path's suffix, and returns the figure. Shares and accuracies are in
[0, 1] and shown in percent.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from PIL import Image

from flip_hf.console.files import try_file

KeyT = TypeVar("KeyT")
# What a cell of a grid shows: a text or an image, PIL's or an array (H, W, 3).
Cell = str | Image.Image | np.ndarray

DPI = 120
MARKERS = "osD^vP*X"
# Above this many classes a confusion matrix has no numbers in its cells.
MAX_NUMBERED_CLASSES = 20
# Inches: the largest side of a confusion matrix, and the space for a label.
MAX_MATRIX = 9.0
LABEL = 0.115
# Letters shown of a class's name.
MAX_NAME = 24


def try_picture(path: str | Path, option: str) -> None:
    """Checks that a picture can be written to a file, by its name and its folder.

    Raises:
        ValueError: it cannot be written; the message names the option.
    """
    formats = FigureCanvasBase.get_supported_filetypes()
    suffix = Path(path).suffix.lower()[1:]
    if suffix and suffix not in formats:  # without one, Matplotlib writes a PNG
        raise ValueError(f"{option} {path}: pictures are written as {', '.join(sorted(formats))}, not {suffix}.")
    try_file(path, option)


def _percent(what: str, values: Mapping[KeyT, float]) -> dict[KeyT, float]:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{what} are shares in [0, 1]; {name} has {value}.")
    return {name: 100 * value for name, value in values.items()}


def _save(figure: Figure, path: str | Path) -> Figure:
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.1)  # so that no label is cut off
    return figure


def plot_zero_shot_bars(
    results: Mapping[str, float],
    papers: Mapping[str, Mapping[str, float]],
    path: str | Path,
    chance: Mapping[str, float] | None = None,
    label: str = "this model",
) -> Figure:
    """Draws one bar per data set, with papers' results as markers.

    Args:
        results: a model's result on each data set, from top to bottom.
        papers: other models' results, see [`papers.published`]; data sets without a result are left out.
        path: the file to write.
        chance: chance level on each data set.
        label: the model's name in the legend.
    """
    if not results:
        raise ValueError("Give the result of at least one data set.")
    shown = _percent("Results", results)
    others = {model: {d: v for d, v in _percent(model, row).items() if d in shown} for model, row in papers.items()}
    others = {model: row for model, row in others.items() if row}
    places = {name: place for place, name in enumerate(shown)}
    figure = Figure(figsize=(8, 1.6 + 0.16 * len(others) + 0.36 * len(shown)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(shown)), list(shown.values()), height=0.78, color="0.82", edgecolor="0.45")
    for place, value in enumerate(shown.values()):
        axes.annotate(f"{value:.1f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    _draw_papers(axes, others, places)
    if chance:
        known = {name: value for name, value in _percent("Chance levels", chance).items() if name in places}
        middles = np.array([places[name] for name in known])
        axes.vlines(list(known.values()), middles - 0.39, middles + 0.39, "black", ":", linewidth=1.6, label="chance")
    axes.set(
        xlim=(0, 100),
        ylim=(len(shown) - 0.4, -0.6),
        xlabel="accuracy, or the data set's own metric (%); higher is better",
    )
    axes.set_yticks(range(len(shown)), list(shown), parse_math=False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    lines, names = axes.get_legend_handles_labels()
    names = [f"{label} (figures on the right)", *names]
    legend = figure.legend([bars[0], *lines], names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _save(figure, path)


def _draw_papers(axes: Axes, papers: Mapping[str, Mapping[str, float]], places: Mapping[str, int]) -> None:
    """Draws markers on the bars at `places`, each paper in its own lane so that close values stay apart."""
    lanes = np.linspace(-0.27, 0.27, len(papers))
    for number, (lane, (model, row)) in enumerate(zip(lanes, papers.items(), strict=True)):
        filled = (number + number // len(MARKERS)) % 2 == 0  # inverted the second time round
        axes.plot(
            list(row.values()),
            [places[name] + lane for name in row],
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            color="black",
            markerfacecolor="black" if filled else "white",
            clip_on=False,
            zorder=3,
            label=model,
        )


def plot_confusion_matrix(counts: np.ndarray, class_names: Sequence[str], path: str | Path) -> Figure:
    """Draws a confusion matrix; with many classes it stays one page and names only every few.

    Args:
        counts: (C, C), samples of a class (row) that were predicted as a class (column).
        class_names: C names.
        path: the picture's file.
    """
    if counts.shape != (len(class_names), len(class_names)):
        raise ValueError(f"Expected counts (C, C) of {len(class_names)} classes, got {counts.shape}.")
    num_classes = len(class_names)
    total = counts.sum()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (C, C)
    side = min(MAX_MATRIX, max(3.5, 0.5 * num_classes))
    figure = Figure(figsize=(side + 2.4, side + 1.6), layout="constrained")
    axes = figure.subplots()
    # The root makes an error of one in a hundred visible beside a diagonal near one.
    image = axes.imshow(shares, cmap="Greys", norm=PowerNorm(0.5, vmin=0, vmax=1))
    ticks = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=30, ticks=ticks)
    bar.ax.set_yticklabels([f"{100 * tick:g}" for tick in ticks])
    bar.set_label("of the class's samples (%)")
    step = max(1, int(np.ceil(num_classes * LABEL / side)))
    named = range(0, num_classes, step)
    names = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…" for name in class_names[::step]]
    size = 9 if num_classes <= MAX_NUMBERED_CLASSES else 7
    axes.set_xticks(named, names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(named, names, fontsize=size, parse_math=False)
    every = "" if step == 1 else f" (one in {step} is named)"
    axes.set(xlabel="predicted class" + every, ylabel="true class" + every)
    axes.set_title(f"{100 * np.trace(counts) / max(total, 1):.1f} % of {total:,} samples right", fontsize=10)
    if num_classes <= MAX_NUMBERED_CLASSES:
        _number_cells(axes, shares)
    return _save(figure, path)


def _number_cells(axes: Axes, shares: np.ndarray) -> None:
    for row, column in np.argwhere(shares > 0):
        share = shares[row, column]
        text = f"{100 * share:.0f}" if share >= 0.01 else "<1"
        colour = "white" if share > 0.3 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


def _draw_cell(axes: Axes, content: Cell, right: bool | None) -> None:
    """Draws an image or a text in a square frame: none for a query (None), thick with a tick for a right answer."""
    axes.set_axis_off()
    if isinstance(content, str):
        lines = textwrap.wrap(content, 22, max_lines=8, placeholder=" …")
        axes.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=7.5, parse_math=False)
    else:
        pixels = np.asarray(content.convert("RGB") if isinstance(content, Image.Image) else content)
        height, width = (
            0.46 * np.array(pixels.shape[:2]) / max(pixels.shape[:2])
        )  # a white rim makes frames visible on black
        axes.imshow(pixels, cmap="gray", extent=(0.5 - width, 0.5 + width, 0.5 - height, 0.5 + height))
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    if right is None:
        return
    width, colour = (3.5, "black") if right else (0.8, "0.6")
    axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, linewidth=width, edgecolor=colour, clip_on=False))
    if right:
        box = {"boxstyle": "square,pad=0.15", "facecolor": "black", "edgecolor": "white"}
        axes.text(0.04, 0.96, "✓", ha="left", va="top", color="white", fontsize=10, bbox=box)


def plot_retrieval_grid(
    queries: Sequence[Cell], results: Sequence[Sequence[tuple[Cell, bool | None]]], path: str | Path
) -> Figure:
    """Draws queries and their answers, one row per query; right answers have a thick frame and a tick.

    Args:
        queries: texts, or images: PIL images or arrays (H, W, 3).
        results: the best answers of each query, for example five, best first: a text or an image, and whether it is
            right, or None where that is unknown.
        path: the picture's file.
    """
    if len(queries) != len(results) or not queries:
        raise ValueError(
            f"Expected one list of results per query, got {len(queries)} queries and {len(results)} lists."
        )
    columns = max(len(row) for row in results)
    figure = Figure(figsize=(1.55 * (columns + 1), 0.35 + 1.55 * len(queries)), layout="constrained")
    grid = figure.subplots(len(queries), columns + 1, squeeze=False)
    for row, query, answers in zip(grid, queries, results, strict=True):
        _draw_cell(row[0], query, None)
        for axes in row[1 + len(answers) :]:
            axes.set_axis_off()
        for axes, (content, right) in zip(row[1:], answers, strict=False):
            _draw_cell(axes, content, right)
    for axes, title in zip(grid[0], ["query", *(str(place) for place in range(1, columns + 1))], strict=True):
        axes.set_title(title, fontsize=10)
    return _save(figure, path)


@dataclass(frozen=True)
class Sweep:
    """The search for a linear probe's regularisation, and its result.

    Attributes:
        accuracies: accuracy by strength λ of the L2 penalty.
        searched_on: the split that they were measured on and its size, in words.
        tested: the accuracy of the classifier with the best strength.
        tested_on: the split that it was measured on and its size, in words.
    """

    accuracies: Mapping[float, float]
    searched_on: str
    tested: float
    tested_on: str


def plot_probe_curves(
    linear: Sweep | None,
    few_shot: Mapping[int, Sequence[float]] | None,
    zero_shot: float | None,
    path: str | Path,
    few_shot_on: str = "test",
) -> Figure:
    """Draws a linear probe's accuracy over its regularisation, and over examples per class.

    Args:
        linear: the search for its regularisation, and its test.
        few_shot: accuracies of several draws of examples, by examples per class.
        zero_shot: the same model's zero-shot accuracy, beside the few-shot ones.
        path: the picture's file.
        few_shot_on: the split that few-shot and zero-shot accuracies were measured on and its size, in words.
    """
    if not linear and not few_shot:
        raise ValueError("Give linear, few_shot or both: there is nothing to draw.")
    count = bool(linear) + bool(few_shot)
    figure = Figure(figsize=(5.4 * count, 3.8), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    if linear:
        _draw_sweep(panels[0], linear)
    if few_shot:
        _draw_shots(panels[-1], few_shot, zero_shot)
        panels[-1].set_ylabel(f"accuracy (%), higher is better\n{few_shot_on}")
    for panel in panels:
        panel.grid(color="0.9")
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)  # covers no point
    return _save(figure, path)


def _draw_sweep(panel: Axes, linear: Sweep) -> None:
    points = sorted(_percent("Accuracies", linear.accuracies).items())
    if points[0][0] <= 0:
        raise ValueError(f"λ is drawn on a logarithmic axis and must be above 0, got {points[0][0]}.")
    best = max(points, key=lambda point: point[1])
    panel.plot(*zip(*points, strict=True), color="black", marker="o", markersize=3.5, linewidth=1.2)
    about = f"best on {linear.searched_on}: {best[1]:.1f} at λ = {best[0]:.3g}"
    panel.plot(*best, "o", markersize=11, markerfacecolor="none", color="black", label=about)
    panel.set_xscale("log")
    tested = 100 * linear.tested
    about = f"with that λ on {linear.tested_on}: {tested:.1f}"
    panel.axhline(tested, color="0.3", linestyle="--", linewidth=1.2, label=about)
    panel.set(xlabel="L2 penalty λ", title="linear probe")
    panel.set_ylabel(f"accuracy (%), higher is better\ncurve: {linear.searched_on}")


def _draw_shots(panel: Axes, few_shot: Mapping[int, Sequence[float]], zero_shot: float | None) -> None:
    shots = sorted(few_shot)
    draws = [100 * np.array(few_shot[n]) for n in shots]
    low = [d.min() for d in draws]
    high = [d.max() for d in draws]
    panel.fill_between(shots, low, high, color="0.85", label="lowest to highest draw")
    mean = [d.mean() for d in draws]
    panel.plot(shots, mean, color="black", marker="o", markersize=4, linewidth=1.2, label="mean of draws")
    if zero_shot is not None:
        level = 100 * zero_shot
        panel.axhline(level, color="0.3", linestyle="--", linewidth=1.2, label=f"zero-shot: {level:.1f}")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(shots))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    panel.set(xlabel="examples a class", title="few-shot probe")


def plot_interpolation(curves: Mapping[str, Mapping[float, float]], path: str | Path) -> Figure:
    """Draws accuracies over the share of the second model; of two data sets also one against the other (WiSE-FT).

    Args:
        curves: accuracies by alpha, of one or two data sets, by name.
        path: the picture's file.
    """
    shown = {name: _percent("Accuracies", curve) for name, curve in curves.items()}
    figure = Figure(figsize=(5.4 * len(shown), 3.8), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for (name, curve), marker, line in zip(shown.items(), MARKERS, ("-", "--"), strict=False):
        panels[0].plot(list(curve), list(curve.values()), line, color="black", marker=marker, label=name)
    panels[0].set(xlabel="alpha, the share of the second model", ylabel="accuracy (%), higher is better")
    for text in (
        panels[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False).get_texts()
    ):
        text.set_parse_math(False)
    if len(shown) == 2:
        (tuned, retained) = shown.values()
        panels[1].plot(list(retained.values()), list(tuned.values()), color="black", marker=MARKERS[0])
        for alpha, value in tuned.items():
            panels[1].annotate(f"{alpha:g}", (retained[alpha], value), (4, 4), textcoords="offset points", fontsize=8)
        first, second = shown
        panels[1].set_xlabel(f"{second} (%)", parse_math=False)
        panels[1].set_ylabel(f"{first} (%)", parse_math=False)
        panels[1].set_title("numbers: alpha", fontsize=8)
    for panel in panels:
        panel.grid(color="0.9")
    return _save(figure, path)
