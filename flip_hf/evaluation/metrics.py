"""The metrics of CLIP's and FLIP's tables as modules of `evaluate`, under the names that data sets use.

They are classes of this package: `METRICS["accuracy"]().compute(predictions=scores, references=labels)` needs no
`evaluate.load` and no network. `scoring.py` defines what they compute, including ties.
"""

import inspect
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy.typing import ArrayLike

from flip_hf.evaluation.scoring import (
    map_11_points,
    mean_average_precision,
    mean_per_class_accuracy,
    mean_precision_at,
    recall_at,
    retrieval_ranks,
    roc_auc,
    top_k_accuracy,
)

ROWS = List(Value("float64"))
CLASS = Value("int64")
CLASSES = List(Value("int64"))


class ArrayMetric(evaluate.Metric):
    """Base class of `evaluate` metrics whose inputs stay arrays.

    `evaluate` itself writes all inputs to an Arrow file and reads them back as Python lists: some 40 times the time,
    and gigabytes, for ImageNet's 50,000 x 1,000 scores. `compute(predictions=..., references=...)` avoids that; what
    `add` and `add_batch` collect still goes that way, through `cache_dir`.
    """

    inputs: Features

    def _info(self) -> evaluate.MetricInfo:
        description = inspect.getdoc(type(self)) or ""
        return evaluate.MetricInfo(description=description, citation="", features=self.inputs)

    def compute(
        self, *, predictions: ArrayLike | None = None, references: ArrayLike | None = None, **kwargs: Any
    ) -> dict[str, float] | None:
        """Computes the metric, in [0, 1].

        Args:
            predictions, references: arrays or array-likes; see each metric. None for what was added before.
            kwargs: further inputs of the metric.
        """
        if predictions is None or references is None or len(self):
            return super().compute(predictions=predictions, references=references, **kwargs)
        return self._compute(predictions=predictions, references=references, **kwargs)

    def _compute(
        self, *, predictions: ArrayLike | None = None, references: ArrayLike | None = None, **kwargs: Any
    ) -> dict[str, float]:
        return self.measure(np.asarray(predictions), np.asarray(references), **kwargs)

    def measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """Computes the metric of arrays."""
        raise NotImplementedError


class Accuracy(ArrayMetric):
    """Top-1 and top-5 accuracy, `top1` and `top5`, of scores (N, C) and labels (N,)."""

    inputs = Features(predictions=ROWS, references=CLASS)

    def measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {f"top{k}": top_k_accuracy(predictions, references, k) for k in (1, 5)}


class MeanTop1Top5(ArrayMetric):
    """The mean of top-1 and top-5 accuracy, `mean_top1_top5`, of scores (N, C) and labels (N,), as for Kinetics700."""

    inputs = Features(predictions=ROWS, references=CLASS)

    def measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"mean_top1_top5": sum(top_k_accuracy(predictions, references, k) for k in (1, 5)) / 2}


class MeanPerClassAccuracy(ArrayMetric):
    """Top-1 accuracy averaged over classes, `mean_per_class`, of scores (N, C) and labels (N,)."""

    inputs = Features(predictions=ROWS, references=CLASS)

    def measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"mean_per_class": mean_per_class_accuracy(predictions, references)}


class Map11Points(ArrayMetric):
    """VOC 2007's 11-point mean average precision, `map_11_points`, of scores (N, C) and labels (N, C) of 1, 0, -1."""

    inputs = Features(predictions=ROWS, references=CLASSES)

    def measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"map_11_points": map_11_points(predictions, references)}


class MeanAveragePrecision(ArrayMetric):
    """Retrieval by class, `mean_average_precision` and `precision@10`, of scores (N, C) and labels (N,).

    Each class ranks all samples by its scores, and the classes that have samples are averaged.
    """

    inputs = Features(predictions=ROWS, references=CLASS)

    def measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {
            "mean_average_precision": mean_average_precision(predictions, references),
            "precision@10": mean_precision_at(predictions, references, 10),
        }


class RocAuc(ArrayMetric):
    """The area under the ROC curve, `roc_auc`, of two classes' scores (N, 2) and labels (N,) of 0 and 1."""

    inputs = Features(predictions=ROWS, references=CLASS)

    def measure(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"roc_auc": roc_auc(predictions, references)}


class Recall(ArrayMetric):
    """Retrieval recall at 1, 5 and 10.

    `compute(predictions=text_embeds, references=image_of_text, image_embeds=image_embeds)` takes texts (T, E), the
    index of each one's image (T,), and images (I, E). `text_retrieval_recall@k` is the share of images with one of
    their texts among the first k, `image_retrieval_recall@k` that of texts with their image there.
    """

    inputs = Features(predictions=ROWS, references=CLASS)

    def measure(
        self, predictions: np.ndarray, references: np.ndarray, image_embeds: np.ndarray | None = None
    ) -> dict[str, float]:
        if image_embeds is None:
            raise ValueError("Retrieval needs image_embeds=(I, E) beside the texts.")
        of_images, of_texts = retrieval_ranks(np.asarray(image_embeds), predictions, references)
        return {
            f"{what}_retrieval_recall@{k}": recall_at(ranks, k)
            for what, ranks in (("text", of_images), ("image", of_texts))
            for k in (1, 5, 10)
        }


METRICS: dict[str, type[ArrayMetric]] = {
    "accuracy": Accuracy,
    "mean_per_class": MeanPerClassAccuracy,
    "mean_top1_top5": MeanTop1Top5,
    "map_11_points": Map11Points,
    "mean_average_precision": MeanAveragePrecision,
    "roc_auc": RocAuc,
    "recall": Recall,
}
