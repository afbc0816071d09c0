"""Features of labelled images, and how some are drawn or held out.

Letters: N samples, D features, C classes.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Labelled:
    """Features of labelled images.

    Attributes:
        features: (N, D), float32, as the model returns them.
        labels: (N,), whole numbers from 0.

    Raises:
        ValueError: there is no sample, the shapes do not match, or a feature is not finite.
    """

    features: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1] or not len(self):
            raise ValueError(
                f"Features are (N, D) and labels (N,), with N >= 1; got {self.features.shape} and {self.labels.shape}."
            )
        if not np.issubdtype(self.labels.dtype, np.integer) or self.labels.min() < 0:
            raise ValueError("Labels are whole numbers from 0, one per sample: class indices.")
        finite = np.isfinite(self.features).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{(~finite).sum()} of {len(self)} samples have features that are not finite; the first is number "
                f"{finite.argmin()}: leave them out, or extract them in float32."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Labelled":
        """Returns the samples at these indices."""
        return Labelled(self.features[indices], self.labels[indices])

    def join(self, other: "Labelled") -> "Labelled":
        """Returns these samples and others."""
        return Labelled(np.concatenate([self.features, other.features]), np.concatenate([self.labels, other.labels]))


def draw(labels: np.ndarray, wanted: int | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws samples of each class.

    Generators in the same state give nested draws: what is drawn stays drawn when more are wanted.

    Args:
        labels: (N,).
        wanted: samples per class, for all classes or for each that occurs, ascending. Smaller classes are drawn whole.
        rng: the random generator.

    Returns:
        Indices, ascending.
    """
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(order[place < np.repeat(np.broadcast_to(wanted, counts.shape), counts)])


def hold_out(data: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    """Splits off a fifth of each class, and returns the rest and the held-out part.

    A class with two samples or more is in both; a single sample stays in the rest.

    Raises:
        ValueError: no class has two samples.
    """
    _, counts = np.unique(data.labels, return_counts=True)
    a_fifth = np.where(counts > 1, np.maximum(1, np.rint(counts / 5)), 0)
    held = draw(data.labels, a_fifth, np.random.default_rng(seed))
    if not len(held):
        raise ValueError("No class has two train samples, so none can be held out: give a validation split.")
    return data.take(np.setdiff1d(np.arange(len(data)), held)), data.take(held)


def count_classes(num_classes: int | None, train: Labelled, test: Labelled, validation: Labelled | None) -> int:
    """Counts the classes: the given number, or one more than the largest label.

    Raises:
        ValueError: the splits have features of different widths, `train` has only one class, or a label exceeds the
            given number.
    """
    splits = [data for data in (train, test, validation) if data is not None]
    widths = {data.features.shape[1] for data in splits}
    if len(widths) > 1:
        raise ValueError(f"The splits have features of different widths, {sorted(widths)}: take them from one model.")
    if len(np.unique(train.labels)) < 2:
        raise ValueError(f"All train samples are of class {train.labels[0]}; a probe needs two classes or more.")
    needed = 1 + max(int(data.labels.max()) for data in splits)
    if num_classes is not None and num_classes < needed:
        raise ValueError(f"There is a label {needed - 1}, which {num_classes} classes do not have.")
    return needed if num_classes is None else num_classes
