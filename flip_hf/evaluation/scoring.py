"""The metrics of CLIP's and FLIP's tables, on NumPy arrays of scores and labels.

Of equal scores the earlier one ranks first, as with argmax and a stable sort. The field's tools (CLIP_benchmark and
open_clip: torch.topk, torch.argsort; torchmetrics too) leave the order of equal scores undefined; this is one of their
orders, always the same, and a model that scores everything equally is at chance level.

Letters: N samples, C classes, I images, T texts, E embedding.
"""

import numpy as np


def ranks_of(scores: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Ranks entry `indices` (N,) in each row of scores (N, C), greatest first; returns (N,), from 0."""
    chosen = np.take_along_axis(scores, indices[:, None], axis=1)  # (N, 1)
    earlier = np.arange(scores.shape[1]) < indices[:, None]  # (N, C)
    return ((scores > chosen) | ((scores == chosen) & earlier)).sum(axis=1)


def _check_no_nan(name: str, array: np.ndarray) -> None:
    if np.isnan(array).any():
        row = int(np.argwhere(np.isnan(array))[0, 0])
        raise ValueError(f"{name} hold NaN (first in row {row}), which cannot be ranked.")


def _check_labels(scores: np.ndarray, labels: np.ndarray) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(f"Expected scores (N, C) and labels (N,), one per row, got {scores.shape} and {labels.shape}.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"Labels are class indices from 0 to {scores.shape[1] - 1}, one per column of scores; got {labels.dtype} "
            f"from {labels.min()} to {labels.max()}."
        )
    _check_no_nan("Scores", scores)


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Returns the share of samples whose class is among the k greatest scores; 1 if there are at most k classes.

    Args:
        scores: (N, C).
        labels: (N,), class indices.
        k: number of guesses.
    """
    _check_labels(scores, labels)
    return float((ranks_of(scores, labels) < k).mean())


def mean_per_class_accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns top-1 accuracy averaged over the classes that have samples.

    Args:
        scores: (N, C).
        labels: (N,), class indices.
    """
    from sklearn.metrics import recall_score  # here, since it takes a second that training can save

    _check_labels(scores, labels)
    return float(recall_score(labels, scores.argmax(axis=1), labels=np.unique(labels), average="macro"))


def _average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns one class's 11-point interpolated average precision, from scores (N,) and labels (N,) of 0 or 1."""
    hits = labels[np.argsort(-scores, kind="stable")].cumsum()  # (N,), positives among the first 1, 2, ...
    precision = hits / np.arange(1, len(hits) + 1)
    # Recall of t / 10 or more, compared in integers: 0.1 has no exact float.
    return float(np.mean([precision[10 * hits >= t * hits[-1]].max() for t in range(11)]))


def map_11_points(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns VOC 2007's mean average precision: the greatest precision at recalls of at least 0, 0.1, ... 1, averaged.

    As in VOCevalcls.m of its development kit, equal scores rank in the order of the samples, and "difficult" samples
    count neither as right nor as wrong. Classes without a positive sample have no recall and are left out.

    Args:
        scores: (N, C).
        labels: (N, C), 1 where the class is in the image, 0 where not, -1 where it is difficult. VOC's own files use
            1, -1 and 0 instead.
    """
    if scores.ndim != 2 or labels.shape != scores.shape:
        raise ValueError(f"Expected scores (N, C) and labels (N, C), got {scores.shape} and {labels.shape}.")
    if not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError(f"Labels are 1, 0 or -1 (difficult), got {np.unique(labels)[:10].tolist()}.")
    _check_no_nan("Scores", scores)
    if not (labels == 1).any():
        raise ValueError("No class has a positive sample.")
    counted = labels >= 0  # (N, C)
    classes = np.flatnonzero((labels == 1).any(axis=0))
    return float(np.mean([_average_precision(scores[counted[:, c], c], labels[counted[:, c], c]) for c in classes]))


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the area under the ROC curve of two classes; equal scores count half, as in scikit-learn.

    Args:
        scores: (N,) of the positive class; or (N, 2), with the positive class second: the difference orders the samples
            like a softmax, without its saturation.
        labels: (N,), 0 or 1, both present.
    """
    from sklearn.metrics import roc_auc_score  # here, since it takes a second that training can save

    _check_no_nan("Scores", scores)
    if scores.ndim == 2 and scores.shape[1] == 2:
        scores = scores[:, 1].astype(np.float64) - scores[:, 0]
    if scores.ndim != 1 or labels.shape != scores.shape or set(np.unique(labels).tolist()) != {0, 1}:
        raise ValueError(
            "ROC AUC takes scores (N,) or (N, 2) and labels (N,) of 0 and 1, both present; got scores "
            f"{scores.shape}, labels {labels.shape} of {np.unique(labels)[:10].tolist()}."
        )
    return float(roc_auc_score(labels, scores))


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the average precision of images ranked by each class's scores, averaged over classes with samples.

    As in scikit-learn, precision is not interpolated, and equal scores are one step of recall.

    Args:
        scores: (N, C).
        labels: (N,), class indices.
    """
    from sklearn.metrics import average_precision_score  # here, since it takes a second that training can save

    _check_labels(scores, labels)
    return float(np.mean([average_precision_score(labels == c, scores[:, c]) for c in np.unique(labels)]))


def mean_precision_at(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Returns the share of a class's images among the k that its scores rank first, averaged over classes with samples.

    Args:
        scores: (N, C).
        labels: (N,), class indices.
        k: number of images that count; all of them if there are fewer.
    """
    _check_labels(scores, labels)
    first = np.argsort(-scores, axis=0, kind="stable")[:k]  # (k, C)
    classes = np.unique(labels)
    return float(np.mean(labels[first[:, classes]] == classes))


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Returns the share of queries whose first right answer is among the first k.

    Args:
        ranks: (Q,), from 0, as returned by [`retrieval_ranks`].
        k: number of answers that count.
    """
    return float((ranks < k).mean())


def retrieval_ranks(
    image_embeds: np.ndarray, text_embeds: np.ndarray, image_of_text: np.ndarray, max_pairs: int = 2**24
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks the right answers in retrieval by cosine similarity, among all images and all texts.

    As in CLIP's and FLIP's tables, the best-ranked of an image's texts counts.

    Args:
        image_embeds: (I, E).
        text_embeds: (T, E).
        image_of_text: (T,), the index of each text's image. Every image has a text.
        max_pairs: similarities held in memory at a time.

    Returns:
        The rank of each image's best text among all texts (I,), and of each text's image among all images (T,), from 0.
    """
    images = _unit("image_embeds", image_embeds)
    texts = _unit("text_embeds", text_embeds)
    every_image = np.arange(len(images))
    if images.shape[1] != texts.shape[1] or image_of_text.shape != (len(texts),):
        raise ValueError(
            "Expected image_embeds (I, E), text_embeds (T, E) and image_of_text (T,), got "
            f"{images.shape}, {texts.shape} and {image_of_text.shape}."
        )
    if not np.array_equal(np.unique(image_of_text), every_image):
        raise ValueError(
            f"image_of_text names each of the images 0 to {len(images) - 1} at least once, and no other; "
            f"missing {np.setdiff1d(every_image, image_of_text)[:10].tolist()}, "
            f"unknown {np.setdiff1d(image_of_text, every_image)[:10].tolist()}."
        )
    return (
        _first_hits(images, texts, every_image, image_of_text, max_pairs),
        _first_hits(texts, images, image_of_text, every_image, max_pairs),
    )


def _unit(name: str, embeds: np.ndarray) -> np.ndarray:
    """Normalises embeddings (B, E) to length 1, in float32."""
    if embeds.ndim != 2 or not len(embeds):
        raise ValueError(f"{name} must be a matrix with at least one row, got {embeds.shape}.")
    embeds = embeds.astype(np.float32)
    _check_no_nan(name, embeds)
    return embeds / np.maximum(np.linalg.norm(embeds, axis=1, keepdims=True), 1e-12)


def _first_hits(
    queries: np.ndarray, items: np.ndarray, image_of_query: np.ndarray, image_of_item: np.ndarray, max_pairs: int
) -> np.ndarray:
    """Ranks each query's first item of the same image, (Q,), a block of queries at a time."""
    ranks = np.empty(len(queries), dtype=np.int64)
    rows = max(1, max_pairs // len(items))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        similarity = queries[block] @ items.T  # (rows, items)
        own = image_of_query[block, None] == image_of_item  # (rows, items)
        first = np.where(own, similarity, -np.inf).argmax(axis=1)  # (rows)
        ranks[block] = ranks_of(similarity, first)
    return ranks
