"""The pictures that belong to results; `plots.py` draws them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flip_hf.evaluation.papers import published
from flip_hf.evaluation.plots import (
    Cell,
    Sweep,
    plot_confusion_matrix,
    plot_probe_curves,
    plot_retrieval_grid,
    plot_zero_shot_bars,
)
from flip_hf.evaluation.result import Result


def draw(results: Iterable[Result], folder: Path, model: str) -> list[Path]:
    """Draws the pictures of results, and returns the files.

    Args:
        results: results of one model.
        folder: existing folder for the pictures.
        model: the model's name.
    """
    results = list(results)
    files = []
    zero_shot = {result.data_set: result for result in results if result.task == "zero-shot"}
    if zero_shot:
        files.append(folder / "zero_shot.png")
        values = {name: result.value for name, result in zero_shot.items()}
        chance = {
            name: 1 / r.details["classes"] for name, r in zero_shot.items() if r.metric in ("top1", "mean_per_class")
        }
        plot_zero_shot_bars(values, published("zero_shot"), files[-1], chance, model)
    for name, result in zero_shot.items():
        if "confusion" in result.material:
            files.append(folder / f"confusion_{name}.png")
            plot_confusion_matrix(result.material["confusion"], result.material["class_names"], files[-1])
    for name in dict.fromkeys(result.data_set for result in results):
        probes = {r.task: r.material for r in results if r.data_set == name}
        if any("searched" in material or "few_shot" in material for material in probes.values()):
            files.append(folder / f"probes_{name}.png")
            _draw_probes([result for result in results if result.data_set == name], files[-1])
    for result in results:
        if result.task == "retrieval":
            for what, (queries, answers) in _retrieved(result.material).items():
                files.append(folder / f"retrieval_{what}_{result.data_set}.png")
                plot_retrieval_grid(queries, answers, files[-1])
        if result.task == "class-retrieval":
            files.append(folder / f"retrieval_images_of_classes_{result.data_set}.png")
            plot_retrieval_grid(*_retrieved_by_class(result.material), files[-1])
    return files


def _draw_probes(results: list[Result], path: Path) -> None:
    """Draws the probes of one data set, naming for each value the split and the number of samples."""
    by_task = {result.task: result for result in results}
    linear, few, zero_shot = (by_task.get(task) for task in ("linear-probe", "few-shot", "zero-shot"))
    sweep = None
    if linear is not None and "searched" in linear.material:
        on = linear.material.get("searched_on", {"split": "validation", "samples": 0})
        sweep = Sweep(
            linear.material["searched"],
            f"{on['split']}, n = {on['samples']:,}",
            linear.value,
            f"{linear.split}, n = {linear.samples:,}",
        )
    shots = few.material.get("few_shot") if few is not None else None
    shots_on = f"{few.split}, n = {few.samples:,}" if few is not None else ""
    plot_probe_curves(sweep, shots, zero_shot.value if zero_shot is not None else None, path, shots_on)


def _retrieved(material: dict[str, Any]) -> dict[str, tuple[list[Cell], list[list[tuple[Cell, bool]]]]]:
    """Collects queries of each kind and their best answers, evenly from the whole data set."""
    pictures = material["pictures"]
    captions = material["captions"]
    image_of_text = material["image_of_text"]
    by_text = material["best_images"]
    by_image = material["best_texts"]
    of_texts = [[(pictures[i], i == image_of_text[text]) for i in best] for text, best in by_text.items()]
    of_images = [[(captions[t], image_of_text[t] == image) for t in best] for image, best in by_image.items()]
    return {
        "images_of_texts": ([captions[text] for text in by_text], of_texts),
        "texts_of_images": ([pictures[image] for image in by_image], of_images),
    }


def _retrieved_by_class(material: dict[str, Any]) -> tuple[list[Cell], list[list[tuple[Cell, bool]]]]:
    """Collects a few classes and the images that each ranks first."""
    pictures = material["pictures"]
    by_class = material["best_images"]
    answers = [[(pictures[i], material["labels"][i] == label) for i in best] for label, best in by_class.items()]
    return [material["captions"][label] for label in by_class], answers
