r"""How well a linear classifier tells classes apart by frozen features: CLIP's linear probe, and with a few samples.

CLIP's protocol (paper, appendix A.3): logistic regression, scikit-learn's L-BFGS, at most 1,000 iterations; the L2
strength is searched on a validation split; train and validation together give the classifier that is tested. What the
paper leaves open, from its README and its authors' answers (openai/CLIP issues 39 and 128):

- $\lambda$ is `1 / C` of scikit-learn, for $\sum_i \text{loss}_i + \frac{\lambda}{2} \lVert W \rVert^2$: a sum over
  samples, not a mean; no penalty on the bias. The README's `C=0.316` is $10^{-4/8}$, a point of the paper's grid.
- Features go in as they are, neither normalised nor standardised. With a ViT they are those before the projection.
- All else is as scikit-learn had it in 2021. One default has changed its meaning since (1.4, pull request 26721): `tol`
  bounded the gradient of the sum, and now that of the mean. See `GRADIENT_TOLERANCE`.

Every fit starts from zero, so that what a strength scores does not depend on those tried before it: with a weak one the
iterations end far from the optimum, at a place that depends on where they started.

Letters: N samples, C classes.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from flip_hf.evaluation.labelled import Labelled, count_classes, draw, hold_out

# Probabilities (N, C) and labels (N,) to how good they are; more is better.
Score = Callable[[np.ndarray, np.ndarray], float]

STEPS_PER_DECADE = 8
# From 1e-6 to 1e6: the paper's 96 steps, 97 points.
LAMBDAS = tuple(10.0 ** (step / STEPS_PER_DECADE - 6) for step in range(12 * STEPS_PER_DECADE + 1))
COARSE_STEP = 2 * STEPS_PER_DECADE  # the search begins with every second decade
# The coarse strengths, two more each time that the step is halved, and the classifier that is tested.
FITS_PER_PROBE = len(LAMBDAS[::COARSE_STEP]) + 2 * int(math.log2(COARSE_STEP)) + 1

# Of the summed loss. As a bound for the mean's, it ends fits of small features and many classes after a few iterations,
# or before the first: with weights of zero that gradient is about a feature divided by C.
GRADIENT_TOLERANCE = 1e-4
MAX_VALIDATION_SHOTS = 4


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What [`linear_probe`] found.

    Attributes:
        score: of the test set.
        best_lambda: the strength found on the validation split.
        searched: each strength that was tried to its validation score.
        validation_samples: how many samples gave that score.
        unconverged: how many fits were stopped at `max_iter`, of the search and the last.
        converged: whether the last one, which is tested, was not.
        probabilities: (N, C), of the test set.
        empty_classes: without a sample to learn from; their columns are 0.
    """

    score: float
    best_lambda: float
    searched: dict[float, float]
    validation_samples: int
    unconverged: int
    converged: bool
    probabilities: np.ndarray
    empty_classes: tuple[int, ...]


@dataclass(frozen=True)
class FewShotResult:
    """What [`few_shot`] found with one number of shots.

    Attributes:
        scores: of the test set, one a repeat.
        lambdas: the strengths found, one a repeat.
        short_classes: with fewer samples to draw from than shots; they gave what they had.
        unconverged: how many fits of all repeats were stopped at `max_iter`.
    """

    scores: tuple[float, ...]
    lambdas: tuple[float, ...]
    short_classes: tuple[int, ...]
    unconverged: int

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float:
        """Standard deviation over the repeats, of the population, as CoOp reports it."""
        return float(np.std(self.scores))


def best_lambda(searched: dict[float, float]) -> float:
    """The strength with the best score; of equals the larger, whose classifier is simpler and sooner fitted."""
    return max(searched, key=lambda strength: (searched[strength], strength))


def search_lambda(score: Callable[[float], float]) -> dict[float, float]:
    """CLIP's parametric binary search over `LAMBDAS`: every second decade, then ever finer around the best score.

    Finds the grid's best wherever the score has one peak, with 15 scores at most. Returns those, by strength.
    """
    searched: dict[float, float] = {}

    def try_all(indices: Iterable[int]) -> None:
        for strength in (LAMBDAS[index] for index in indices if 0 <= index < len(LAMBDAS)):
            searched[strength] = float(score(strength))
            if math.isnan(searched[strength]):
                raise ValueError(f"The score of the validation split is not a number, with lambda {strength:g}.")

    step = COARSE_STEP
    try_all(range(0, len(LAMBDAS), step))
    while step > 1:
        step //= 2
        peak = LAMBDAS.index(best_lambda(searched))
        try_all((peak - step, peak + step))
    return searched


def _fit(data: Labelled, strength: float, max_iter: int) -> LogisticRegression:
    classifier = LogisticRegression(C=1 / strength, max_iter=max_iter, tol=GRADIENT_TOLERANCE / len(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
        return classifier.fit(data.features, data.labels)


def _probe(
    train: Labelled,
    validation: Labelled,
    refit: Labelled,
    *,
    test: Labelled,
    score: Score,
    num_classes: int,
    max_iter: int,
    bar: tqdm,
) -> ProbeResult:
    """Searches the strength with `train` and `validation`, fits `refit` with it, and scores `test`."""
    stopped = []

    def probabilities(data: Labelled, strength: float, features: np.ndarray) -> np.ndarray:
        classifier = _fit(data, strength, max_iter)
        stopped.append(int(classifier.n_iter_.max()) >= max_iter)
        bar.update()
        known = classifier.predict_proba(features)
        every = np.zeros((len(features), num_classes), known.dtype)
        every[:, classifier.classes_] = known
        return every

    searched = search_lambda(lambda x: score(probabilities(train, x, validation.features), validation.labels))
    strength = best_lambda(searched)
    tested = probabilities(refit, strength, test.features)
    bar.update(FITS_PER_PROBE - len(stopped))  # a peak at an end of the range has no neighbours beyond it
    return ProbeResult(
        score=float(score(tested, test.labels)),
        best_lambda=strength,
        searched=searched,
        validation_samples=len(validation),
        unconverged=sum(stopped),
        converged=not stopped[-1],
        probabilities=tested,
        empty_classes=tuple(np.setdiff1d(np.arange(num_classes), refit.labels).tolist()),
    )


def linear_probe(
    train: Labelled,
    test: Labelled,
    *,
    score: Score,
    validation: Labelled | None = None,
    num_classes: int | None = None,
    max_iter: int = 1000,
    seed: int = 0,
) -> ProbeResult:
    """Fits a linear classifier by CLIP's protocol and tests it.

    Args:
        train, test: features and labels.
        score: of probabilities and labels; it chooses the strength and is reported.
        validation: what the strength is chosen with, by default a fifth of `train`, class by class. The classifier
            that is tested learns from both.
        num_classes: C, by default one more than the largest label of all splits.
        max_iter: of every fit.
        seed: which samples are held out.

    Raises:
        ValueError: `train` has one class or too few samples, the splits do not fit together, a score is not a number.
    """
    num_classes = count_classes(num_classes, train, test, validation)
    if validation is None:
        refit = train
        train, validation = hold_out(train, seed)
    else:
        refit = train.join(validation)
    with tqdm(total=FITS_PER_PROBE, desc="linear probe", unit="fit", disable=None) as bar:
        return _probe(
            train, validation, refit, test=test, score=score, num_classes=num_classes, max_iter=max_iter, bar=bar
        )


def few_shot(
    train: Labelled,
    test: Labelled,
    *,
    score: Score,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    repeats: int = 3,
    validation: Labelled | None = None,
    num_classes: int | None = None,
    max_iter: int = 1000,
    seed: int = 0,
) -> dict[int, FewShotResult]:
    """Fits linear classifiers to a few samples a class, several times, and tests them.

    CLIP chose the strength of its few-shot classifiers on the whole validation split (openai/CLIP issue 128): they saw
    more than their shots. Here the same search has as many validation samples a class as shots, at most 4, and the
    classifier learns from the shots alone, as in CoOp's linear probe (KaiyangZhou/CoOp, lpclip). The draws of a repeat
    are nested, as in big_vision: two shots are the one shot and another.

    Args:
        train, test, score, num_classes, max_iter: see [`linear_probe`].
        shots: samples a class.
        repeats: draws for each number of shots.
        validation: what validation samples are drawn from, by default a fifth of `train`, class by class, which no
            shot is drawn from then.
        seed: which samples are drawn, the same in every process.

    Returns:
        Shots to what was found.

    Raises:
        ValueError: as in [`linear_probe`]; or shots or repeats are below 1.
    """
    if min((*shots, repeats)) < 1:
        raise ValueError(f"Shots and repeats are 1 or more; got {tuple(shots)} and {repeats}.")
    num_classes = count_classes(num_classes, train, test, validation)
    if validation is None:
        train, validation = hold_out(train, seed)
    available = np.bincount(train.labels, minlength=num_classes)
    results = {}
    with tqdm(total=FITS_PER_PROBE * len(shots) * repeats, desc="few-shot probes", unit="fit", disable=None) as bar:
        probe = partial(_probe, test=test, score=score, num_classes=num_classes, max_iter=max_iter, bar=bar)
        for k in shots:
            probes = []
            for repeat in range(repeats):
                rng = np.random.default_rng((seed, repeat))
                few = train.take(draw(train.labels, k, rng))
                check = validation.take(draw(validation.labels, min(k, MAX_VALIDATION_SHOTS), rng))
                probes.append(probe(few, check, few))
            results[k] = FewShotResult(
                scores=tuple(result.score for result in probes),
                lambdas=tuple(result.best_lambda for result in probes),
                short_classes=tuple(np.flatnonzero(available < k).tolist()),
                unconverged=sum(result.unconverged for result in probes),
            )
    return results
