"""Figures and tables, made from the points alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from flip_hf.reproduction.findings import findings
from flip_hf.reproduction.plan import BEST_STRATEGY, SETS
from flip_hf.reproduction.running import Point
from flip_hf.reproduction.speedup import (
    BASELINES,
    CURVES,
    SpeedUp,
    best_recipe,
    lineage,
    names_of,
    speed_ups,
    summary,
    with_waits,
)

DPI = 130
PAPER_SPEED_UP = 3.7
# Readable in greyscale: marker and line differ too.
LOOKS: dict[str, dict[str, Any]] = {
    "mask0": {"label": "0 % masked", "color": "0.45", "marker": "s", "linestyle": "--"},
    "mask50": {"label": "50 %", "color": "tab:blue", "marker": "o"},
    "mask75": {"label": "75 %", "color": "tab:red", "marker": "^"},
    f"mask75-{BEST_STRATEGY}": {"label": f"75 %, a {BEST_STRATEGY}", "color": "tab:green", "marker": "D"},
}
TUNED = {"markerfacecolor": "white", "alpha": 0.6, "linestyle": ":"}
Curve = tuple[list[float], list[float], list[float]]  # x, mean accuracy, its standard deviation


def _curve(points: Sequence[Point], recipe: str, over: str) -> Curve:
    """Computes mean and spread over seeds for each of a recipe's lengths, over `seconds` or `samples`."""
    xs = []
    means = []
    spreads = []
    for name in names_of(recipe):
        lines = [_lineage(point, points) for point in points if point.name == name]
        lines = [line for line in lines if line]
        if not lines:
            continue
        values = [100 * line[0].top1 for line in lines]
        xs.append(float(np.mean([sum(getattr(each, over) for each in line) for line in lines])))
        means.append(float(np.mean(values)))
        spreads.append(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
    order = np.argsort(xs)
    return [xs[i] for i in order], [means[i] for i in order], [spreads[i] for i in order]


def _lineage(point: Point, points: Sequence[Point]) -> list[Point]:
    return lineage(point, {each.name: each for each in points if each.seed == point.seed})


def _panel(axes: Axes, points: Sequence[Point], over: str) -> None:
    for recipe, look in LOOKS.items():
        for tuned in ("", "-tuned"):
            x, mean, spread = _curve(points, recipe + tuned, over)
            if not x:
                continue
            style = {**look, **TUNED, "label": f"{look['label']}, then tuned on whole images"} if tuned else look
            axes.errorbar(x, mean, spread, capsize=2, linewidth=1.6, markersize=6, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel({"seconds": "training time, s", "samples": "pairs seen"}[over])
    axes.grid(alpha=0.25)


def _arrow(axes: Axes, points: Sequence[Point]) -> None:
    """Draws an arrow from the unmasked model's end to where the best masked recipe is as good."""
    recipe = best_recipe(points)
    baseline = [point for point in points if point.name == BASELINES[-1]]
    if recipe is None:
        return
    factor, bound = summary(speed_ups(points)[recipe])
    end = float(np.mean([point.seconds for point in baseline]))
    goal = float(np.mean([100 * point.top1 for point in baseline]))
    axes.annotate("", (end / factor, goal), (end, goal), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.4})
    # In the upper left, which curves that rise to the right leave free; beside the arrow they would cross it.
    axes.annotate(
        f"{bound}{factor:.1f} times sooner\n(the paper: {PAPER_SPEED_UP})",
        (end / factor, goal),
        (0.28, 0.82),
        textcoords="axes fraction",
        ha="center",
        fontsize=9,
        arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.8, "shrinkA": 2, "shrinkB": 4},
    )


def draw_over_time(points: Sequence[Point], path: Path) -> Figure:
    """Draws accuracy over training time and over samples seen, for each mask ratio: the paper's Figure 1."""
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, points, "seconds")
    _panel(right, points, "samples")
    _arrow(left, points)
    left.set_ylabel("zero-shot accuracy, % (higher is better)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)
    return figure


def draw_findings(points: Sequence[Point], path: Path, which: str = SETS[0]) -> Figure:
    """Draws the difference of every claim of a set here, with its spread, beside the paper's."""
    found = [each for each in findings(points, which) if each.first and each.second]
    figure = Figure(figsize=(8.5, 0.34 * len(found) + 1.4), layout="constrained")
    axes = figure.subplots()
    rows = range(len(found))
    axes.axvline(0, color="0.7", linewidth=1)
    axes.errorbar(
        [each.difference for each in found], rows, xerr=[each.standard_error or 0.0 for each in found],
        fmt="o", color="black", capsize=2, label="here: difference of means, its standard error",
    )  # fmt: skip
    axes.plot([each.claim.paper for each in found], rows, "D", color="tab:orange", label="paper", markersize=5)
    axes.set_yticks(rows, [f"{each.claim.table}  {each.claim.text}" for each in found], fontsize=8)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlabel("points of accuracy; right of 0: more accurate than what it is compared with")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def mean_in_words(values: Sequence[float], digits: int = 1) -> str:
    """Returns the mean and standard deviation of values over seeds; a dash if there are none."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if values else "-"


def findings_table(points: Sequence[Point], which: str = SETS[0]) -> str:
    """Makes a Markdown table of each claim of a set, the paper's difference, ours, and the verdict."""
    lines = ["| table | claim | paper | here | accuracies here, % | p | |", "|---|---|---|---|---|---|---|"]
    for each in findings(points, which):
        claim = each.claim
        paper = f"{claim.paper:+.1f}"
        if not each.first or not each.second:
            lines.append(f"| {claim.table} | {claim.text} | {paper} | - | - | - | {each.verdict} |")
            continue
        lines.append(
            f"| {claim.table} | {claim.text} | {paper} | {each.difference:+.1f} | {mean_in_words(each.first)} against "
            f"{mean_in_words(each.second)} | {each.p_value:.2g} | **{each.verdict}** |"
        )
    return "\n".join(lines)


def speed_table(points: Sequence[Point]) -> str:
    """Makes a Markdown table of each recipe's speed-up over unmasked runs, without and with waits for data."""
    columns = {f"as good as {name}": speed_ups(points, name) for name in BASELINES}
    if any(point.data_wait for point in points):
        columns["the same, waits for data counted"] = speed_ups(with_waits(points))
    lines = [f"| recipe | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for recipe in dict.fromkeys(recipe for found in columns.values() for recipe in found):
        cells = [_speed_cell(found.get(recipe, [])) for found in columns.values()]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| the paper | | {PAPER_SPEED_UP}x |{' |' * (len(columns) - 2)}"])


def _speed_cell(many: Sequence[SpeedUp]) -> str:
    if not many:
        return "-"
    factor, bound = summary(many)
    return f"**{bound}{factor:.2f}x** ({', '.join(map(str, many))})"


def time_table(points: Sequence[Point]) -> str:
    """Makes a Markdown table of every run's samples, training time relative to the unmasked one, and accuracy."""
    lines = ["| run | pairs | training, s | time a pair / unmasked | accuracy, % |", "|---|---|---|---|---|"]
    unmasked = [point.seconds / point.samples for point in points if point.name in names_of("mask0")]
    for name in dict.fromkeys(point.name for point in points):
        of_name = [point for point in points if point.name == name]
        if not of_name[0].samples:
            continue
        seconds = [point.seconds for point in of_name]
        relative = float(np.mean([p.seconds / p.samples for p in of_name]) / np.mean(unmasked)) if unmasked else None
        cells = [
            name,
            f"{of_name[0].samples:,}",
            mean_in_words(seconds),
            "-" if relative is None else f"{relative:.2f}",
            mean_in_words([100 * point.top1 for point in of_name]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(points: Sequence[Point], folder: Path, about: str, which: str = SETS[0]) -> None:
    """Writes the figures and `README.md` of a reproduction."""
    draw_over_time(points, folder / "accuracy_over_time.png")
    draw_findings(points, folder / "findings.png", which)
    parts = [
        "# The paper's claims at a small scale\n", about,
        "![Accuracy over training time and pairs seen](accuracy_over_time.png)\n",
        "## How much sooner\n", speed_table(points), "\n## Finding by finding\n", findings_table(points, which),
        "\n![Differences here and in the paper](findings.png)\n", "## All runs\n", time_table(points),
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


assert tuple(LOOKS) == CURVES
