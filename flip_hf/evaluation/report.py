"""Reports of results: a table, JSON, Markdown."""

import json
from pathlib import Path

import torch
import transformers

from flip_hf.console.json_types import JsonObject
from flip_hf.evaluation.model_index import task_name
from flip_hf.evaluation.options import EvaluationOptions
from flip_hf.evaluation.result import Result
from flip_hf.redaction import redact, redacted


def to_json(
    model: str, options: EvaluationOptions, results: list[Result], skipped: dict[str, str], command: str
) -> JsonObject:
    """Builds the whole report.

    Args:
        model: the model's name or folder.
        options: options of the evaluation.
        results: the results.
        skipped: reason for each `data set, task` that was not measured.
        command: the command that measured it, as a shell takes it.
    """
    keep = ("data_set", "title", "split", "task", "metric", "metrics", "samples", "refused", "details")
    return {
        "model": model,
        "command": command,
        "options": {name: value for name, value in vars(options).items() if value not in (None, [])},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": [{name: getattr(result, name) for name in keep} for result in results],
        "skipped": skipped,
    }


def table(results: list[Result], skipped: dict[str, str]) -> str:
    """Renders a Markdown table with a row per task and data set, in percent."""
    lines = [
        "| data set | split | task | metric | % | other figures, % | samples | skipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        others = ", ".join(f"{k} {100 * v:.1f}" for k, v in result.metrics.items() if k != result.metric)
        refused = ", ".join(f"{count} x {reason}" for reason, count in result.refused.items())
        lines.append(
            f"| {result.title} | {result.split} | {task_name(result)} | {result.metric} | {100 * result.value:.1f} "
            f"| {others} | {result.samples:,} | {refused or 'none'} |"
        )
    for name, why in skipped.items():
        title, task = name.rsplit(", ", 1)
        lines.append(f"| {title} | | {task} | not measured | | | | {why} |")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, report: JsonObject, markdown: str) -> None:
    """Writes `results.json` and `results.md`, without credentials from the command line or URLs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(redacted(report), indent=2) + "\n", encoding="utf-8")
    lines = [f"# {report['model']}", "", markdown, f"`{report['command']}`", ""]
    (folder / "results.md").write_text(redact("\n".join(lines)), encoding="utf-8")
