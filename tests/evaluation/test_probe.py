"""Linear probes of scikit-learn's digits: the search against the whole grid, the probe against scikit-learn itself."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from threadpoolctl import threadpool_limits

from flip_hf.evaluation.labelled import draw, hold_out
from flip_hf.evaluation.probes.linear import (
    FITS_PER_PROBE,
    LAMBDAS,
    Labelled,
    best_lambda,
    few_shot,
    linear_probe,
    search_lambda,
)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(accuracy_score(labels, probabilities.argmax(1)))


def likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return -float(log_loss(labels, probabilities, labels=range(probabilities.shape[1])))


@pytest.fixture(autouse=True)
def one_thread():
    """More only get into each other's way with so little to do."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def digits() -> dict[str, Labelled]:
    """Train 200, validation 100, test 300; every second pixel, between 0 and 1."""
    features, labels = load_digits(return_X_y=True)
    every = Labelled((features[:, ::2] / 16).astype(np.float32), labels)
    order = np.random.default_rng(0).permutation(600)
    return {
        "train": every.take(order[:200]),
        "validation": every.take(order[200:300]),
        "test": every.take(order[300:]),
    }


def without(data: Labelled, label: int) -> Labelled:
    return data.take(np.flatnonzero(data.labels != label))


# -- strengths --------------------------------------------------------------------------------------------------------


def test_the_grid_is_clips():
    assert len(LAMBDAS) == 97 and LAMBDAS[::16] == (1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6)
    assert np.diff(np.log10(LAMBDAS)) == pytest.approx(1 / 8)
    assert min(abs(1 / strength - 0.316) for strength in LAMBDAS) < 5e-4  # the README's C


def test_the_search_finds_a_single_peak_wherever_it_is():
    for peak in range(97):
        searched = search_lambda(lambda strength, peak=peak: -abs(LAMBDAS.index(strength) - peak))
        assert best_lambda(searched) == LAMBDAS[peak]
        assert len(searched) <= FITS_PER_PROBE - 1 and set(LAMBDAS[::16]) <= set(searched)


def test_of_equal_strengths_the_larger_is_taken():
    assert best_lambda(search_lambda(lambda strength: 0.5)) == 1e6
    # A plateau: its upper end, as a full grid has it.
    assert best_lambda(search_lambda(lambda strength: float(1e-3 < strength < 30))) == pytest.approx(10**1.375)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="not a number for lambda 0.01"):
        search_lambda(lambda strength: float("nan") if strength == 1e-2 else 1.0)


def test_the_search_picks_the_best_of_the_whole_grid(digits):
    train = digits["train"]
    validation = digits["validation"]
    result = linear_probe(train, digits["test"], validation=validation, score=likelihood, max_iter=40)
    grid = {}
    for strength in LAMBDAS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            classifier = LogisticRegression(C=1 / strength, max_iter=40, tol=1e-4 / 200)
            classifier.fit(train.features, train.labels)
        grid[strength] = likelihood(classifier.predict_proba(validation.features), validation.labels)
    assert result.best_lambda == best_lambda(grid) and LAMBDAS[0] < result.best_lambda < LAMBDAS[-1]
    assert result.searched == {strength: grid[strength] for strength in result.searched}


# -- the probe --------------------------------------------------------------------------------------------------------


def test_the_probe_is_scikit_learns_classifier_of_train_and_validation(digits):
    result = linear_probe(digits["train"], digits["test"], validation=digits["validation"], score=accuracy)
    both = digits["train"].join(digits["validation"])
    classifier = LogisticRegression(C=1 / result.best_lambda, max_iter=1000, tol=1e-4 / 300)
    expected = classifier.fit(both.features, both.labels).predict_proba(digits["test"].features)
    np.testing.assert_array_equal(result.probabilities, expected)
    assert result.score == accuracy(expected, digits["test"].labels) > 0.85
    assert result.converged and result.empty_classes == ()


def test_without_a_validation_split_a_fifth_is_held_out(digits):
    train = digits["train"]
    kept, held = hold_out(train, seed=3)
    counts = np.bincount(train.labels)
    np.testing.assert_array_equal(np.bincount(held.labels), np.rint(counts / 5))
    assert sorted(map(bytes, kept.join(held).features)) == sorted(map(bytes, train.features))
    assert not np.array_equal(held.features, hold_out(train, seed=4)[1].features)

    ours = linear_probe(train, digits["test"], score=likelihood, seed=3, max_iter=50)
    given = linear_probe(kept, digits["test"], validation=held, score=likelihood, max_iter=50)
    assert ours.searched == given.searched and ours.best_lambda == given.best_lambda
    np.testing.assert_allclose(ours.probabilities, given.probabilities, atol=0.03)  # in another order


def test_small_features_are_fitted_too(digits):
    """The gradient of their mean loss is below scikit-learn's default `tol` from the beginning."""
    small = {name: Labelled(data.features * 1e-3, data.labels) for name, data in digits.items()}
    default = LogisticRegression(C=1e6).fit(small["train"].features, small["train"].labels)
    assert accuracy(default.predict_proba(small["test"].features), small["test"].labels) < 0.2
    result = linear_probe(small["train"], small["test"], validation=small["validation"], score=accuracy, max_iter=100)
    assert result.score > 0.8


def test_a_class_without_samples_has_probability_zero(digits):
    train = without(digits["train"], 3)
    validation = without(digits["validation"], 3)
    result = linear_probe(train, digits["test"], validation=validation, score=accuracy, num_classes=12, max_iter=50)
    assert result.empty_classes == (3, 10, 11) and result.probabilities.shape == (300, 12)
    assert not result.probabilities[:, [3, 10, 11]].any()
    np.testing.assert_allclose(result.probabilities.sum(1), 1, atol=1e-5)
    others = digits["test"].labels != 3
    assert accuracy(result.probabilities[others], digits["test"].labels[others]) > 0.85


def test_a_class_that_only_the_validation_split_has_is_learnt(digits):
    result = linear_probe(
        without(digits["train"], 9), digits["test"], validation=digits["validation"], score=accuracy, max_iter=50
    )
    assert result.empty_classes == () and result.probabilities[:, 9].max() > 0.5


def test_fits_that_are_stopped_are_counted_in_silence(digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stopped = linear_probe(digits["train"], digits["test"], score=likelihood, max_iter=2)
        done = linear_probe(digits["train"], digits["test"], score=lambda p, y: -abs(p.max() - 0.1), max_iter=100)
    assert stopped.unconverged > 10 and not stopped.converged
    # That score peaks at 1e6, which is fitted at once; the weakest strengths of the search are not.
    assert done.best_lambda == 1e6 and done.converged and 0 < done.unconverged < 5


def test_models_that_cannot_be_probed_are_refused(digits):
    train = digits["train"]
    test = digits["test"]
    ones = train.take(np.flatnonzero(train.labels == 1))
    with pytest.raises(ValueError, match="All train samples are of class 1"):
        linear_probe(ones, test, score=accuracy)
    with pytest.raises(ValueError, match=r"different widths, \[31, 32\]"):
        linear_probe(train, Labelled(test.features[:, 1:], test.labels), score=accuracy)
    with pytest.raises(ValueError, match="a label 9, which 9 classes do not have"):
        linear_probe(train, test, score=accuracy, num_classes=9)
    with pytest.raises(ValueError, match="give a validation split"):
        linear_probe(train.take(np.unique(train.labels, return_index=True)[1]), test, score=accuracy)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), r"got \(3, 2\) and \(2,\)"),
        (np.zeros((0, 2)), np.zeros(0, int), "N >= 1"),
        (np.zeros((2, 2)), np.zeros(2), "whole numbers"),
        (np.zeros((2, 2)), np.array([0, -1]), "whole numbers"),
        (np.array([[0.0], [np.inf], [np.nan]]), np.zeros(3, int), "2 of 3 samples .* the first is number 1"),
    ],
)
def test_labelled_features_are_checked(features, labels, message):
    with pytest.raises(ValueError, match=message):
        Labelled(features, labels)


# -- few shots --------------------------------------------------------------------------------------------------------


def test_draws_are_balanced_seeded_and_nested():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [40, 30, 20, 3]))

    def drawn(wanted, seed):
        return draw(labels, wanted, np.random.default_rng(seed))

    four = drawn(4, (0, 0))
    np.testing.assert_array_equal(np.bincount(labels[four]), [4, 4, 4, 0, 0, 3])  # the last class has only three
    assert len(set(four)) == len(four)
    np.testing.assert_array_equal(four, drawn(4, (0, 0)))
    assert not np.array_equal(four, drawn(4, (0, 1))) and not np.array_equal(four, drawn(4, (1, 0)))
    assert set(drawn(2, (0, 0))) < set(four)
    np.testing.assert_array_equal(np.bincount(labels[drawn(np.array([1, 0, 2, 9]), 0)]), [1, 0, 2, 0, 0, 3])
    # Every sample has the same chance.
    hits = sum(np.bincount(drawn(2, seed), minlength=len(labels)) for seed in range(400))
    assert np.abs(hits[labels == 2] - 40).max() < 25


def test_few_shots_repeat_with_their_seed_and_get_better_with_more(digits):
    options = {"score": accuracy, "shots": (1, 8), "repeats": 2, "max_iter": 10}
    found = few_shot(digits["train"], digits["test"], **options)
    assert found == few_shot(digits["train"], digits["test"], **options)
    assert found[1].scores != few_shot(digits["train"], digits["test"], **options, seed=1)[1].scores
    assert list(found) == [1, 8] and all(len(set(result.scores)) == 2 for result in found.values())
    assert 0.3 < found[1].mean < found[8].mean - 0.1
    assert found[8].mean == pytest.approx(sum(found[8].scores) / 2)
    assert found[8].spread == pytest.approx(abs(found[8].scores[0] - found[8].scores[1]) / 2)
    assert set(found[8].lambdas) <= set(LAMBDAS) and 0 <= found[8].unconverged <= 2 * FITS_PER_PROBE


def test_few_shots_learn_from_the_shots_alone_and_choose_with_at_most_four(digits):
    seen = []

    def score(probabilities, labels):
        seen.append(labels)
        return accuracy(probabilities, labels)

    train = digits["train"]
    validation = digits["validation"]
    test = digits["test"]
    found = few_shot(train, test, validation=validation, score=score, shots=(6,), repeats=1, max_iter=30)[6]
    rng = np.random.default_rng((0, 0))
    few = train.take(draw(train.labels, 6, rng))
    np.testing.assert_array_equal(np.bincount(seen[0]), [4] * 10)
    np.testing.assert_array_equal(seen[0], validation.labels[draw(validation.labels, 4, rng)])
    assert len(seen[-1]) == len(test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = LogisticRegression(C=1 / found.lambdas[0], max_iter=30, tol=1e-4 / 60)
        classifier.fit(few.features, few.labels)
    assert found.scores == (accuracy(classifier.predict_proba(test.features), test.labels),)


def test_classes_with_fewer_samples_than_shots_are_named(digits):
    train = digits["train"]
    options = {"score": accuracy, "repeats": 1, "max_iter": 5}
    threes = np.flatnonzero(train.labels == 3)
    few = train.take(np.setdiff1d(np.arange(len(train)), threes[5:]))
    found = few_shot(few, digits["test"], validation=digits["validation"], shots=(5, 6), **options)
    assert found[5].short_classes == () and found[6].short_classes == (3,)
    # Without a validation split one of the five is held out.
    found = few_shot(few, digits["test"], shots=(4, 5), **options)
    assert found[4].short_classes == () and found[5].short_classes == (3,)


@pytest.mark.parametrize("options", [{"shots": (0, 1)}, {"repeats": 0}])
def test_no_shots_and_no_repeats_are_refused(digits, options):
    with pytest.raises(ValueError, match="1 or more"):
        few_shot(digits["train"], digits["test"], score=accuracy, **options)
