r"""Linear classifiers on frozen features: CLIP's linear probe, and few-shot probes.

CLIP's protocol (paper, appendix A.3): logistic regression, scikit-learn's L-BFGS, at most 1,000 iterations; the L2
strength is searched on a validation split; the classifier that is tested is trained on train and validation together.
What the paper leaves open comes from its README and its authors' answers (openai/CLIP issues 39 and 128):

- $\lambda$ is `1 / C` of scikit-learn, for $\sum_i \text{loss}_i + \frac{\lambda}{2} \lVert W \rVert^2$: a sum over
  samples, not a mean; no penalty on the bias. The README's `C=0.316` is $10^{-4/8}$, a point of the paper's grid.
- Features are neither normalised nor standardised. With a ViT they are those before the projection.
- All else is scikit-learn's default of 2021. One default has changed its meaning since (1.4, pull request 26721): `tol`
  bounded the gradient of the sum, and now bounds that of the mean. See `GRADIENT_TOLERANCE`.

Every fit starts from zero, so that the score of a strength does not depend on those tried before it: with a weak one
the iterations end far from the optimum, at a point that depends on the start.

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

# Scores probabilities (N, C) against labels (N,); higher is better.
Score = Callable[[np.ndarray, np.ndarray], float]

STEPS_PER_DECADE = 8
# From 1e-6 to 1e6: the paper's 96 steps, 97 points.
LAMBDAS = tuple(10.0 ** (step / STEPS_PER_DECADE - 6) for step in range(12 * STEPS_PER_DECADE + 1))
COARSE_STEP = 2 * STEPS_PER_DECADE  # the search begins with every second decade
# The coarse strengths, two more for each halving of the step, and the classifier that is tested.
FITS_PER_PROBE = len(LAMBDAS[::COARSE_STEP]) + 2 * int(math.log2(COARSE_STEP)) + 1

# Of the summed loss. As a bound for the mean's, it would end fits of small features and many classes after a few
# iterations, or before the first: with zero weights that gradient is about a feature divided by C.
GRADIENT_TOLERANCE = 1e-4
MAX_VALIDATION_SHOTS = 4


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """The result of [`linear_probe`].

    Attributes:
        score: score on the test set.
        best_lambda: the strength found on the validation split.
        searched: validation score by strength tried.
        validation_samples: number of samples behind those scores.
        unconverged: number of fits stopped at `max_iter`, including the last.
        converged: whether the last fit, which is tested, converged.
        probabilities: (N, C), on the test set.
        empty_classes: classes without a training sample; their columns are 0.
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
    """The result of [`few_shot`] for one number of shots.

    Attributes:
        scores: score on the test set, per repeat.
        lambdas: strength found, per repeat.
        short_classes: classes with fewer samples than shots, all of which were used.
        unconverged: number of fits, over all repeats, stopped at `max_iter`.
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
        """Population standard deviation over the repeats, as CoOp reports it."""
        return float(np.std(self.scores))


def best_lambda(searched: dict[float, float]) -> float:
    """Returns the strength with the best score; of equals the larger, whose classifier is simpler and faster to fit."""
    return max(searched, key=lambda strength: (searched[strength], strength))


def search_lambda(score: Callable[[float], float]) -> dict[float, float]:
    """Runs CLIP's parametric binary search over `LAMBDAS`: every second decade, then finer around the best score.

    It finds the grid's best if the score has a single peak, with at most 15 scores. Returns the scores by strength.
    """
    searched: dict[float, float] = {}

    def try_all(indices: Iterable[int]) -> None:
        for strength in (LAMBDAS[index] for index in indices if 0 <= index < len(LAMBDAS)):
            searched[strength] = float(score(strength))
            if math.isnan(searched[strength]):
                raise ValueError(f"The validation score is not a number for lambda {strength:g}.")

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
    """Searches the strength on `train` and `validation`, fits `refit` with it, and scores `test`."""
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
        score: score of probabilities and labels, which chooses the strength and is reported.
        validation: data to choose the strength with, by default a fifth of each class of `train`. The classifier that
            is tested is trained on both.
        num_classes: C, by default one more than the largest label of all splits.
        max_iter: iterations per fit.
        seed: seed of the samples held out.

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
    """Fits linear classifiers to a few samples per class, several times, and tests them.

    CLIP chose the strength of its few-shot classifiers on the whole validation split (openai/CLIP issue 128), so they
    saw more than their shots. Here the same search uses as many validation samples per class as shots, at most 4, and
    the classifier is trained on the shots alone, as in CoOp's linear probe (KaiyangZhou/CoOp, lpclip). The draws of a
    repeat are nested, as in big_vision: two shots are the one shot and another.

    Args:
        train, test, score, num_classes, max_iter: see [`linear_probe`].
        shots: samples per class.
        repeats: draws for each number of shots.
        validation: data to draw validation samples from, by default a fifth of each class of `train`, from which no
            shot is then drawn.
        seed: seed of the draws, the same in every process.

    Returns:
        The result by number of shots.

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
