"""Progress of a run: bar, log, trackers and training curves."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from tqdm import tqdm

from flip_hf.console.json_types import JsonObject
from flip_hf.training.checkpoint import SET_ASIDE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Progress:
    """Shows and records the run's progress, on the main process only.

    Args:
        accelerator: the process layer, with its trackers.
        output_dir: folder of `log.jsonl`, one record a line.
        total: samples of the whole run.
        done: samples seen before a resume.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, total: int, done: int):
        self.accelerator = accelerator
        self.log_path = output_dir / "log.jsonl"
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=" samples",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=0.5 if sys.stderr.isatty() else 20,  # few lines in a log file
            disable=not accelerator.is_main_process,
        )
        if accelerator.is_main_process:
            self._forget_after(done)

    def _forget_after(self, samples: int) -> None:
        """Sets aside records of samples that the run will see again, or that an earlier run in this folder saw.

        They are appended to `set-aside/log.jsonl`. If the run is killed here, a record may be in both files, but never
        in none.
        """
        kept: list[str] = []
        aside: list[str] = []
        for line in filter(None, _lines(self.log_path)):
            record = _record(line)
            (kept if samples and record is not None and record["samples"] <= samples else aside).append(line)
        if aside:
            older = self.log_path.parent / SET_ASIDE / self.log_path.name
            older.parent.mkdir(exist_ok=True)
            with older.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in aside)
        written = self.log_path.with_suffix(".partial")
        written.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        written.replace(self.log_path)

    def advance(self, samples: int) -> None:
        self._bar.update(samples)

    def rewind(self, samples: int) -> None:
        """Goes back to an earlier point of the run."""
        self._bar.reset()
        self._bar.update(samples)
        if self.accelerator.is_main_process:
            self._forget_after(samples)

    def log(self, samples: int, **values: float | str) -> None:
        """Records values at this many samples, in the log, the bar and the trackers."""
        if not self.accelerator.is_main_process:
            return
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"samples": samples, "time": time.time(), **values}) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=samples)

    def show(self, **values: float | str) -> None:
        """Shows values after the bar."""
        shown = {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in values.items()}
        self._bar.set_postfix(shown, refresh=False)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.accelerator.is_main_process:
            self._bar.write(text)

    def close(self) -> None:
        self._bar.close()

    def records(self) -> list[JsonObject]:
        """Returns all records of the run so far, skipping damaged lines."""
        return [record for line in _lines(self.log_path) if (record := _record(line)) is not None]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []


def _record(line: str) -> JsonObject | None:
    """Parses a line of the log; None where it is damaged, because the run was killed or the disk full mid-line."""
    try:
        record = json.loads(line)
        return record if isinstance(record["samples"], (int, float)) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


# A curve: its key in the records, label and style.
_LINE = {"color": "black"}
_GREY = {"color": "0.55"}
_POINTS = {"color": "black", "marker": "o", "markersize": 4}
_RETAINED = {**_POINTS, "marker": "s", "linestyle": ":"}
_PANELS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "loss (lower is better)": [
        ("loss", "trained on", _LINE),
        ("contrastive_loss", "contrastive", _GREY),
        ("reconstruction_loss", "reconstruction", {**_GREY, "linestyle": ":"}),
        ("validation_loss", "held-out pairs, unmasked", _POINTS),
    ],
    "accuracy (higher is better)": [
        ("accuracy", "in the training batch", _GREY),
        ("zero_shot_top1", "zero-shot top-1", _POINTS),
        ("retained_zero_shot_top1", "retained: zero-shot top-1", _RETAINED),
    ],
    "retrieval of held-out pairs (higher is better)": [
        ("text_retrieval_recall@1", "R@1, image to text", _POINTS),
        ("image_retrieval_recall@1", "R@1, text to image", {**_GREY, "marker": "o", "markersize": 4}),
        ("mean_recall", "mean of R@1, 5 and 10", {**_GREY, "linestyle": "--"}),
        ("retained_mean_recall", "retained: mean of R@1, 5 and 10", _RETAINED),
    ],
    "reconstruction error (lower is better)": [
        ("reconstruction_error", "reconstructed", _POINTS),
        ("patch_mean_error", "each patch's mean colours", {**_GREY, "linestyle": "--"}),
        ("nearest_patch_error", "the nearest visible patch", {**_GREY, "linestyle": ":"}),
    ],
    "logit scale (1 / temperature)": [("logit_scale", "logit scale", _LINE)],
    "logit bias": [("logit_bias", "logit bias", _LINE)],
}


def plot_curves(records: list[JsonObject], starts: dict[str, int], path: Path) -> "Figure":
    """Plots losses, accuracies, errors, temperature and bias, as recorded, over samples; returns the figure.

    Args:
        records: the output of [`Progress.records`].
        starts: samples at which each phase after the first begins, by its name, marked by lines.
        path: the file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    known = {key for record in records for key in record}
    curves = {label: [curve for curve in found if curve[0] in known] for label, found in _PANELS.items()}
    curves = {label: found for label, found in curves.items() if found} or {"loss (lower is better)": []}
    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained")
    for panel, (label, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for key, name, style in found:
            points = [(record["samples"], record[key]) for record in records if key in record]
            panel.plot([p[0] for p in points], [p[1] for p in points], linewidth=1.2, label=name, **style)
        if label.startswith(("accuracy", "retrieval")):
            panel.set_ylim(0, 1)
        panel.set_ylabel(label)
        panel.set_xlabel("samples seen")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter(EngFormatter(sep=" "))  # 200 k: long numbers would overlap
        panel.grid(color="0.9")
        _mark(panel, starts)
        if len(panel.lines) > 1:  # below the panel, which has little room
            panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    figure.savefig(path, dpi=120)
    return figure


def _mark(panel: Any, starts: dict[str, int]) -> None:
    """Marks where phases begin by lines; stages with their numbers above."""
    for number, (name, samples) in enumerate(starts.items()):
        is_stage = name.startswith("stage ")
        label = "a stage begins, its number above" if is_stage else "whole images from here"
        # A label that begins with `_` is not in the legend: one entry for all lines.
        line = {"color": "0.4", "linestyle": "--", "linewidth": 1, "label": f"{'_' if number else ''}{label}"}
        panel.axvline(samples, **line)
        if is_stage:
            above = panel.get_xaxis_transform()
            text = name.removeprefix("stage ")
            panel.text(samples, 1.01, text, transform=above, ha="center", va="bottom", fontsize=8, color="0.4")
