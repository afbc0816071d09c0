"""Accuracy along an interpolation between two models' weights, as a table, JSON and a picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flip_hf.console.json_types import JsonObject
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.evaluate import check_tasks, evaluate
from flip_hf.evaluation.options import EvaluationOptions
from flip_hf.evaluation.plots import plot_interpolation
from flip_hf.evaluation.result import Result
from flip_hf.redaction import redacted

# By data set, then by alpha.
Curves = dict[str, dict[float, Result]]


def measure_alphas(
    set_alpha: Callable[[float], Any],
    processor: Any,
    alphas: Sequence[float],
    data: Mapping[str, EvaluationOptions],
    accelerator: Accelerator,
) -> Curves:
    """Classifies data sets zero-shot at each alpha.

    Args:
        set_alpha: makes the model at an alpha.
        processor: its processor.
        alphas: the shares of the second model.
        data: the options of each data set, which name it alone, by the option that named it.
        accelerator: the process layer.

    Raises:
        ValueError: the model has no processor or no texts, or a data set cannot be measured.
    """
    curves: Curves = {option: {} for option in data}
    for alpha in alphas:
        encoder = Encoder(set_alpha(alpha).to(accelerator.device), processor, "the second model")
        check_tasks(encoder, ["zero-shot"])
        for option, options in data.items():
            results, skipped = evaluate(encoder, options.data_sets(), options, accelerator)
            if not results:
                raise ValueError(f"--{option} {options.data} cannot be measured: {next(iter(skipped.values()))}")
            curves[option][alpha] = results[0]
    return curves


def _about(curve: Mapping[float, Result]) -> Result:
    """Returns a result of a curve, for what is the same in all of them."""
    return next(iter(curve.values()))


def curve_table(curves: Curves) -> str:
    """Renders a Markdown table with a row per alpha, in percent."""
    heads = [f"{_about(curve).title} ({option}), {_about(curve).metric}" for option, curve in curves.items()]
    lines = [f"| alpha | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for alpha in next(iter(curves.values())):
        cells = [f"{100 * curve[alpha].value:.1f}" for curve in curves.values()]
        lines.append(f"| {alpha:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_curve(folder: Path, names: Sequence[str], curves: Curves, command: str) -> None:
    """Writes `interpolation.json` and `interpolation.png`, without credentials from the command line or URLs.

    Args:
        folder: an existing folder.
        names: folders or Hub ids of the models at 0 and 1.
        curves: the results.
        command: the command that measured them, as a shell takes it.
    """
    report: JsonObject = {
        "models": list(names),
        "command": command,
        "curves": {
            option: {
                **{name: getattr(_about(curve), name) for name in ("title", "split", "metric", "samples", "refused")},
                "points": [{"alpha": alpha, **result.metrics} for alpha, result in curve.items()],
            }
            for option, curve in curves.items()
        },
    }
    (folder / "interpolation.json").write_text(json.dumps(redacted(report), indent=2) + "\n", encoding="utf-8")
    values = {
        f"{_about(curve).title} ({option})": {alpha: found.value for alpha, found in curve.items()}
        for option, curve in curves.items()
    }
    plot_interpolation(values, folder / "interpolation.png")
