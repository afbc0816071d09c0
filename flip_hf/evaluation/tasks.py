"""The evaluation tasks, one function each, of a model on a data set."""

from collections.abc import Callable

import numpy as np

from flip_hf.console.json_types import JsonObject
from flip_hf.evaluation.labelled import Labelled
from flip_hf.evaluation.metrics import METRICS
from flip_hf.evaluation.nearest import nearest
from flip_hf.evaluation.probes.linear import few_shot, linear_probe
from flip_hf.evaluation.result import Result
from flip_hf.evaluation.subject import Subject, make_result
from flip_hf.modeling.masking_flip import num_kept

# -- with texts --------------------------------------------------------------------------------------------------------


def _main_metric(subject: Subject) -> str:
    metric = subject.data_set.metric
    return "top1" if metric == "accuracy" else metric


def _classified(subject: Subject, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes the data set's own metric, and accuracies where an image has one class."""
    names = [subject.data_set.metric]
    if labels.ndim == 1:
        names += [name for name in ("accuracy", "mean_per_class") if name not in names]
    return {
        key: value
        for name in names
        for key, value in (METRICS[name]().compute(predictions=scores, references=labels) or {}).items()
    }


def zero_shot(subject: Subject) -> Result:
    """Zero-shot classification by class names in prompts (CLIP, section 3.1)."""
    features = subject.features("test")
    scores = features.values @ subject.class_weights.T
    labels = subject.labels("test")
    names = subject.class_names
    details: JsonObject = {"classes": len(names), "templates": len(subject.templates)}
    material = {}
    if labels.ndim == 1:
        found = np.bincount(labels, minlength=len(names))
        details["empty_classes"] = [name for name, count in zip(names, found, strict=True) if not count]
        confusion = np.zeros((len(names), len(names)), np.int64)
        np.add.at(confusion, (labels, scores.argmax(axis=1)), 1)
        material = {"confusion": confusion, "class_names": names}
    metrics = _classified(subject, scores, labels)
    return make_result(
        subject, "zero-shot", metrics, _main_metric(subject), len(labels), details=details, material=material
    )


def masked(subject: Subject) -> Result:
    """Zero-shot classification of whole images, of one masked view, and of complementary views (FLIP, Table 1d)."""
    metric = _main_metric(subject)
    metrics = {}
    weights = subject.class_weights
    for kind, name in (("images", "whole"), ("view", "one view"), ("views", "ensemble")):
        features = subject.features("test", kind)
        scores = _classified(subject, features.values @ weights.T, subject.labels("test"))
        metrics |= {f"{name}, {key}": value for key, value in scores.items()}
    ratio = subject.options.mask_ratio
    num_patches = subject.encoder.num_patches
    details = {"mask_ratio": ratio, "views": num_patches // num_kept(num_patches, ratio)}
    samples = len(subject.labels("test"))
    return make_result(subject, "masked", metrics, f"ensemble, {metric}", samples, details=details)


def retrieval(subject: Subject) -> Result:
    """Retrieval of texts by images and of images by texts, among the whole test set."""
    features = subject.features("test")
    texts = [caption for captions in features.targets for caption in captions]
    image_of_text = np.repeat(np.arange(len(features.targets)), [len(captions) for captions in features.targets])
    template = subject.data_set.templates[0]
    text_values = subject.texts([template.replace("{}", text) for text in texts])
    metrics: dict[str, float] = METRICS["recall"]().compute(  # pyright: ignore[reportAssignmentType]
        predictions=text_values, references=image_of_text, image_embeds=features.values
    )
    main = "mean_recall@1"
    metrics[main] = (metrics["text_retrieval_recall@1"] + metrics["image_retrieval_recall@1"]) / 2
    best_images = best_answers(text_values, features.values)
    best_texts = best_answers(features.values, text_values)
    shown = {*best_texts, *(image for images in best_images.values() for image in images)}
    material = {
        **{"captions": texts, "image_of_text": image_of_text, "best_images": best_images, "best_texts": best_texts},
        "pictures": subject.pictures("test", shown),
    }
    details = {"captions": len(texts)}
    return make_result(subject, "retrieval", metrics, main, len(features.targets), details=details, material=material)


def class_retrieval(subject: Subject) -> Result:
    """Retrieval of images by classes: the prompts of each class rank the whole test set.

    Raises:
        ValueError: images show several classes.
    """
    features = subject.features("test")
    labels = subject.labels("test")
    if labels.ndim != 1:
        raise ValueError(
            f"Retrieval by class needs images of one class; those of {subject.data_set.title} show several."
        )
    class_weights = subject.class_weights
    metric = "mean_average_precision"
    metrics = METRICS[metric]().compute(predictions=features.values @ class_weights.T, references=labels) or {}
    best_images = best_answers(class_weights, features.values)
    captions = list(subject.class_names)
    material = {
        **{"captions": captions, "labels": labels, "best_images": best_images},
        "pictures": subject.pictures("test", {image for images in best_images.values() for image in images}),
    }
    details: JsonObject = {"classes": len(captions), "templates": len(subject.templates)}
    return make_result(subject, "class-retrieval", metrics, metric, len(labels), details=details, material=material)


# Numbers of queries of each kind and of answers to each, in a picture.
QUERIES = 4
ANSWERS = 5


def best_answers(queries: np.ndarray, answers: np.ndarray) -> dict[int, list[int]]:
    """Picks a few queries (Q, E), evenly spread, and ranks answers (A, E) by cosine similarity of unit vectors."""
    chosen = np.unique(np.linspace(0, len(queries) - 1, QUERIES).astype(int))
    _, order = nearest(queries[chosen], [answers], ANSWERS)
    return {int(query): best.tolist() for query, best in zip(chosen, order, strict=True)}


# -- with training -----------------------------------------------------------------------------------------------------


def _labelled(subject: Subject, split: str) -> Labelled:
    features = subject.features(split, "trunk")
    labels = np.array(features.targets)
    if labels.ndim != 1:
        raise ValueError(f"Probes need images of one class; those of {subject.data_set.title} show several.")
    return Labelled(features.values, labels)


def _score(subject: Subject) -> Callable[[np.ndarray, np.ndarray], float]:
    """Makes the data set's own metric of probabilities (N, C) and labels (N,)."""
    metric = METRICS[subject.data_set.metric]
    key = _main_metric(subject)

    def score(probabilities: np.ndarray, labels: np.ndarray) -> float:
        return (metric().compute(predictions=probabilities, references=labels) or {})[key]

    return score


def probe(subject: Subject) -> Result:
    """A linear classifier on the frozen tower: CLIP's, or with `--probe` MAE's or FLIP's."""
    return probe_clip(subject) if subject.options.probe == "clip" else probe_mae(subject)


def probe_clip(subject: Subject) -> Result:
    """Logistic regression on features before the projection, its regularisation chosen on a validation split."""
    train = _labelled(subject, "train")
    test = _labelled(subject, "test")
    validation = _labelled(subject, "validation") if subject.has("validation") else None
    found = linear_probe(
        train,
        test,
        score=_score(subject),
        validation=validation,
        num_classes=len(subject.class_names),
        seed=subject.options.seed,
    )
    metrics = _classified(subject, found.probabilities, test.labels)
    names = subject.class_names
    details = {
        **{"lambda": found.best_lambda, "searched": {f"{k:.3g}": v for k, v in found.searched.items()}},
        **{"unconverged": found.unconverged, "empty_classes": [names[index] for index in found.empty_classes]},
    }
    splits = subject.data_set.splits
    held_out = validation is None
    details["searched_on"] = {
        "split": f"a fifth of {splits['train']}, held out" if held_out else splits["validation"],
        "samples": found.validation_samples,
    }
    material = {"searched": found.searched, "searched_on": details["searched_on"]}
    return make_result(
        subject, "linear-probe", metrics, _main_metric(subject), len(test.labels), details=details, material=material
    )


def probe_mae(subject: Subject) -> Result:
    """A linear classifier trained on augmented images, by MAE's recipe or FLIP's."""
    from flip_hf.evaluation.probes.mae import mae_probe  # here, since only this needs torchvision

    found = mae_probe(subject)
    metrics = _classified(subject, found.scores, found.labels)
    result = make_result(
        subject, "linear-probe", metrics, _main_metric(subject), len(found.labels), details=found.details
    )
    result.refused = dict(sorted(found.refused.items()))
    return result


def probe_few(subject: Subject) -> Result:
    """Logistic regression on a few images per class, repeated several times."""
    train = _labelled(subject, "train")
    test = _labelled(subject, "test")
    options = subject.options
    found = few_shot(
        train,
        test,
        score=_score(subject),
        shots=tuple(options.shots),
        repeats=options.repeats,
        validation=_labelled(subject, "validation") if subject.has("validation") else None,
        num_classes=len(subject.class_names),
        seed=options.seed,
    )
    metrics = {f"{shots}-shot": result.mean for shots, result in found.items()}
    details = {
        f"{shots}-shot": {"scores": list(result.scores), "spread": result.spread} for shots, result in found.items()
    }
    material = {"few_shot": {shots: list(result.scores) for shots, result in found.items()}}
    samples = len(test.labels)
    last = f"{max(found)}-shot"
    return make_result(subject, "few-shot", metrics, last, samples, details=details, material=material)


def fine_tuned(subject: Subject) -> Result:
    """The whole vision tower trained as a classifier."""
    from flip_hf.evaluation.finetuning import task as finetune_task  # here, since only this needs torchvision

    return finetune_task.fine_tuned(subject)


TASK_FUNCTIONS: dict[str, Callable[[Subject], Result]] = {
    "zero-shot": zero_shot,
    "masked": masked,
    "retrieval": retrieval,
    "class-retrieval": class_retrieval,
    "linear-probe": probe,
    "few-shot": probe_few,
    "fine-tune": fine_tuned,
}
