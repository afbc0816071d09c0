"""A card's model-index: results as the Hub reads them. It imports nothing that only evaluation needs."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flip_hf.console.json_types import JsonObject
from flip_hf.evaluation.registry import DataSet, all_data_sets, data_set
from flip_hf.evaluation.result import Result

# Names of the Hub's task index.
HUB_TASKS = {"zero-shot": "zero-shot-image-classification", "masked": "zero-shot-image-classification"}
HUB_TASKS |= dict.fromkeys(("retrieval", "class-retrieval"), "image-text-retrieval")
HUB_TASKS |= dict.fromkeys(("linear-probe", "few-shot", "fine-tune"), "image-classification")
CARD_METRICS = ("top1", "top5", "mean_per_class", "map_11_points", "roc_auc", "precision@10")


def task_name(result: Result) -> str:
    """Returns the task's name, with the recipe where there are several."""
    return f"{result.task} ({result.details['probe']})" if "probe" in result.details else result.task


def eval_results(results: list[Result], data_sets: list[DataSet]) -> list[EvalResult]:
    """Makes the entries of a model-index, with the metrics that tables usually have."""
    described = {data_set.name: data_set for data_set in data_sets}
    entries = []
    for result in results:
        known = described.get(result.data_set)
        for metric, value in result.metrics.items():
            if metric not in (result.metric, *CARD_METRICS) and "recall@" not in metric:
                continue
            entries.append(
                EvalResult(
                    task_type=HUB_TASKS[result.task],
                    task_name=task_name(result),
                    # The path of a user's own data means nothing to others.
                    dataset_type=known.path if known and known.path and known.sources else result.data_set,
                    dataset_name=result.title,
                    dataset_config=known.config if known else None,
                    dataset_split=known.splits["test"] if known else None,
                    metric_type=metric,
                    metric_name=f"{task_name(result)}, {metric}",
                    metric_value=round(100 * value, 2),
                )
            )
    return entries


def read_eval_results(report: JsonObject) -> list[EvalResult]:
    """Makes the entries of a model-index from a written report; unregistered data sets lack their split."""
    results = [Result(**each) for each in report["results"]]
    names = {result.data_set for result in results} & set(all_data_sets())
    return eval_results(results, [data_set(name) for name in names])


def write_eval_results(folder: Path, entries: list[EvalResult]) -> None:
    """Writes entries into the card of a model folder, replacing older ones of the same metrics and no others."""
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
