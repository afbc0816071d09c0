"""Results for people and for programs: a table, JSON, Markdown, and a card's model-index."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flip_hf.evaluation.options import EvaluationOptions
from flip_hf.evaluation.registry import DataSet, all_data_sets, data_set
from flip_hf.evaluation.result import Result

# Names of the Hub's task index.
HUB_TASKS = {"zero-shot": "zero-shot-image-classification", "masked": "zero-shot-image-classification"}
HUB_TASKS |= {"retrieval": "image-text-retrieval"}
HUB_TASKS |= dict.fromkeys(("linear-probe", "few-shot", "fine-tune"), "image-classification")
CARD_METRICS = ("top1", "top5", "mean_per_class", "map_11_points", "roc_auc")


def to_json(model: str, options: EvaluationOptions, results: list[Result], skipped: dict[str, str]) -> dict[str, Any]:
    """The whole report.

    Args:
        model: its name or folder.
        options: of the evaluation.
        results: what was measured.
        skipped: what was not, `data set, task` to the reason.
    """
    keep = ("data_set", "title", "task", "metric", "metrics", "samples", "refused", "details")
    return {
        "model": model,
        "command": "scripts/evaluate.py " + " ".join(sys.argv[1:]),
        "options": {name: value for name, value in vars(options).items() if value not in (None, [])},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": [{name: getattr(result, name) for name in keep} for result in results],
        "skipped": skipped,
    }


def _task_name(result: Result) -> str:
    """The task, and by whose recipe where there are several."""
    return f"{result.task} ({result.details['probe']})" if "probe" in result.details else result.task


def table(results: list[Result], skipped: dict[str, str]) -> str:
    """A Markdown table, a row a task and data set; figures in percent."""
    lines = ["| data set | task | metric | % | other figures, % | samples | skipped |", "|---|---|---|---|---|---|---|"]
    for result in results:
        others = ", ".join(f"{k} {100 * v:.1f}" for k, v in result.metrics.items() if k != result.metric)
        refused = ", ".join(f"{count} x {reason}" for reason, count in result.refused.items())
        lines.append(
            f"| {result.title} | {_task_name(result)} | {result.metric} | {100 * result.value:.1f} | {others} "
            f"| {result.samples:,} | {refused or 'none'} |"
        )
    for name, why in skipped.items():
        title, task = name.rsplit(", ", 1)
        lines.append(f"| {title} | {task} | not measured | | | | {why} |")
    return "\n".join(lines) + "\n"


def eval_results(results: list[Result], data_sets: list[DataSet]) -> list[EvalResult]:
    """Entries of a model-index: of each result the figures that tables usually have."""
    described = {data_set.name: data_set for data_set in data_sets}
    entries = []
    for result in results:
        known = described.get(result.data_set)
        for metric, value in result.metrics.items():
            if metric != result.metric and metric not in CARD_METRICS and "recall@" not in metric:
                continue
            entries.append(
                EvalResult(
                    task_type=HUB_TASKS[result.task],
                    task_name=_task_name(result),
                    # Of data of one's own the path says nothing to others.
                    dataset_type=known.path if known and known.path and known.sources else result.data_set,
                    dataset_name=result.title,
                    dataset_config=known.config if known else None,
                    dataset_split=known.splits["test"] if known else None,
                    metric_type=metric,
                    metric_name=f"{_task_name(result)}, {metric}",
                    metric_value=round(100 * value, 2),
                )
            )
    return entries


def read_eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """Entries of a model-index from a written report; of data sets that are not registered, without their split."""
    results = [Result(**each) for each in report["results"]]
    names = {result.data_set for result in results} & set(all_data_sets())
    return eval_results(results, [data_set(name) for name in names])


def write_card(folder: Path, entries: list[EvalResult]) -> None:
    """Puts entries into the card of a model folder, in place of older ones of the same figures; others stay."""
    path = folder / "README.md"
    card = (
        ModelCard.load(path)
        if path.exists()
        else ModelCard.from_template(
            ModelCardData(library_name="transformers"),
            template_str="---\n{{ card_data }}\n---\n\n# {{ name }}\n",
            name=folder.name,
        )
    )
    data: Any = card.data
    kept = [old for old in data.eval_results or [] if not any(_same(old, new) for new in entries)]
    data.model_name = data.model_name or folder.name
    data.eval_results = [*kept, *entries]
    card.save(path)


def _same(old: EvalResult, new: EvalResult) -> bool:
    return old.metric_name == new.metric_name and old.unique_identifier == new.unique_identifier


def write_report(folder: Path, report: dict[str, Any], markdown: str) -> None:
    """Writes `results.json` and `results.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    lines = [f"# {report['model']}", "", markdown, f"`{report['command']}`", ""]
    (folder / "results.md").write_text("\n".join(lines), encoding="utf-8")
