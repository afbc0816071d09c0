"""Several sources drawn from by weight."""

import itertools
from collections import Counter

import pytest
import torch

from tests.helpers.loading import current_epochs, make_train_loader, numbers, saved
from tests.helpers.pairs import write_tar


@pytest.fixture
def three(samples, tmp_path):
    """Sources of 64, 48 and 48 samples; the number tells which."""
    folders = []
    for name, first, last in (("a", 0, 64), ("b", 64, 112), ("c", 112, 160)):
        (tmp_path / name).mkdir()
        for shard in range(first, last, 16):
            write_tar(tmp_path / name / f"{shard}.tar", samples[shard : shard + 16])
        folders.append(tmp_path / name)
    return folders


def source_of(number: int) -> int:
    return (number >= 64) + (number >= 112)


def test_samples_are_drawn_by_weight(three):
    loader = make_train_loader(*three, weights=[5, 3, 2])
    drawn = numbers(itertools.islice(loader, 250))
    shares = Counter(map(source_of, drawn))
    # 2,000 draws: a share's standard deviation is about 0.011.
    assert [shares[s] / 2000 for s in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.04)
    assert loader.counts["drawn"] == {str(folder): shares[s] for s, folder in enumerate(three)}
    assert [current_epochs(loader, s)[0] for s in range(3)] == [shares[0] // 64, shares[1] // 48, shares[2] // 48]


def test_without_weights_each_is_drawn_as_often(three):
    shares = Counter(map(source_of, numbers(itertools.islice(make_train_loader(*three), 250))))
    assert [shares[s] / 2000 for s in range(3)] == pytest.approx([1 / 3] * 3, abs=0.045)


def test_each_source_is_read_whole_before_it_begins_again(three):
    drawn = numbers(itertools.islice(make_train_loader(*three, weights=[5, 3, 2]), 120))
    for source, size in ((0, 64), (1, 48), (2, 48)):
        own = [n for n in drawn if source_of(n) == source]
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_resumes_exactly(three, workers):
    options = {"workers": workers, "weights": [5, 3, 2]}
    whole = list(itertools.islice(make_train_loader(*three, **options), 60))
    loader = make_train_loader(*three, **options)
    for _ in itertools.islice(loader, 37):
        pass
    resumed = make_train_loader(*three, **options, states=saved([loader]))
    rest = list(itertools.islice(resumed, 23))
    assert numbers(rest) == numbers(whole[37:])
    assert all(torch.equal(a["patches"], b["patches"]) for a, b in zip(rest, whole[37:], strict=True))
    assert sum(resumed.counts["drawn"].values()) == 60 * 8


def test_workers_draw_differently(three):
    loader = make_train_loader(*three, workers=2)
    drawn = numbers(itertools.islice(loader, 40))
    first, second = ([source_of(n) for i, n in enumerate(drawn) if i // 8 % 2 == worker] for worker in (0, 1))
    assert first != second
