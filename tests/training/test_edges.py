"""Masks by content: the score of a patch, and the sample that is drawn by it."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from flip_hf.modeling.masking_flip import num_kept
from flip_hf.training.edges import NOISE_LEVEL, draw_gumbel, edge_scores, keep_edges
from tests.helpers.photographs import photograph


def as_tensor(*pictures) -> torch.Tensor:
    """Pictures (height, width, 3) as a batch (B, 3, height, width), uint8."""
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def busy_corner(side: int) -> torch.Tensor:
    """A grey picture whose first quarter of rows and columns is noise."""
    picture = np.full((side, side, 3), 128, np.uint8)
    picture[: side // 4, : side // 4] = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 1), np.uint8)
    return as_tensor(picture)


def drawn(images: torch.Tensor, patch_size: int, kept: int, strength: float, seed: int, times: int) -> torch.Tensor:
    """Masks (times, K) of a single picture."""
    torch.manual_seed(seed)
    gumbel = draw_gumbel(times, (images.shape[-1] // patch_size) ** 2)
    return keep_edges(images.expand(times, -1, -1, -1), gumbel, patch_size=patch_size, kept=kept, strength=strength)


def exact_probabilities(weights: list[float], kept: int) -> dict[tuple[int, ...], float]:
    """The probability of each subset, summed over all orders in which its patches can be drawn one by one."""
    found: Counter = Counter()
    for order in itertools.permutations(range(len(weights)), kept):
        left = sum(weights)
        probability = 1.0
        for patch in order:
            probability *= weights[patch] / left
            left -= weights[patch]
        found[tuple(sorted(order))] += probability
    return dict(found)


@pytest.mark.parametrize(("side", "patch_size"), [(32, 4), (32, 8), (28, 14), (64, 16), (45, 15), (12, 1), (2, 1)])
def test_the_score_is_the_mean_gradient_of_green(side, patch_size):
    pictures = [photograph(side, side), np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)]
    scores = edge_scores(as_tensor(*pictures), patch_size)
    assert scores.shape == (2, (side // patch_size) ** 2)
    for picture, found in zip(pictures, scores, strict=True):
        green = np.asarray(picture, np.float64)[..., 1]
        down, along = (np.abs(np.gradient(green, axis=axis)) for axis in (0, 1))
        if patch_size in (8, 14, 16):  # central differences at every second pixel, the last one repeated
            down = np.pad(down[1:-1:2, ::2], ((0, 1), (0, 0)), mode="edge")
            along = np.pad(along[::2, 1:-1:2], ((0, 0), (0, 1)), mode="edge")
        rows = side // patch_size
        cells = (down + along).reshape(rows, len(down) // rows, rows, -1).mean((1, 3))
        np.testing.assert_allclose(found, cells.flatten(), rtol=1e-6)


@pytest.mark.parametrize("side", [47, 46, 45])
def test_what_is_in_no_patch_has_no_score(side):
    """Images of models that ignore a remainder, here of patches of 8 pixels in 40."""
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    assert torch.equal(edge_scores(images, 8), edge_scores(images[:, :, :40, :40], 8))
    assert keep_edges(images, draw_gumbel(2, 25), patch_size=8, kept=5, strength=1.0).max() < 25


@pytest.mark.parametrize("strength", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("side", "patch_size"), [(224, 16), (32, 4), (12, 4)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.85])
def test_masks_are_sorted_subsets_of_exactly_the_right_size(side, patch_size, ratio, strength):
    num_patches = (side // patch_size) ** 2
    images = as_tensor(photograph(side, side), np.zeros((side, side, 3), np.uint8))
    kept = num_kept(num_patches, ratio)
    ids_keep = keep_edges(images, draw_gumbel(2, num_patches), patch_size=patch_size, kept=kept, strength=strength)
    assert ids_keep.shape == (2, kept) and ids_keep.dtype == torch.int64
    assert (ids_keep.diff(dim=1) > 0).all()  # sorted, and no patch twice
    assert 0 <= ids_keep.min() and ids_keep.max() < num_patches


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_subsets_are_as_frequent_as_when_patches_are_drawn_one_by_one(strength):
    """All 126 subsets of four patches of nine, against the probabilities of the stated draw, by a chi-square test."""
    images = as_tensor(photograph(12, 12))
    weights = (edge_scores(images, 4)[0].double() + NOISE_LEVEL).tolist()
    counts = Counter(tuple(row) for row in drawn(images, 4, 4, strength, seed=3, times=60_000).tolist())

    def p_value(of_strength: float) -> float:
        expected = exact_probabilities([weight**of_strength for weight in weights], 4)
        assert len(expected) == math.comb(9, 4) and sum(expected.values()) == pytest.approx(1)
        return chisquare([counts[s] for s in expected], [60_000 * p for p in expected.values()]).pvalue

    assert p_value(strength) > 0.001
    assert p_value(strength + 0.2) < 1e-9  # a test that tells strengths apart


def test_a_patch_with_edges_is_kept_more_often_and_every_other_one_at_times():
    ids_keep = drawn(busy_corner(64), 16, 4, strength=1.0, seed=0, times=2000)  # the corner is one patch of 16
    kept = torch.bincount(ids_keep.flatten(), minlength=16) / 2000
    assert kept[0] > 0.98 and (kept[1:] > 0.1).all()


@pytest.mark.parametrize("grey", [0, 77, 255])
def test_a_flat_picture_and_a_strength_of_zero_are_masked_at_random(grey):
    """The very subsets that the noise alone chooses, all equally likely."""
    flat = torch.full((1, 3, 64, 64), grey, dtype=torch.uint8)
    torch.manual_seed(5)
    chosen_by_noise = draw_gumbel(50, 16).argsort(descending=True)[:, :4].sort().values
    assert torch.equal(drawn(flat, 16, 4, strength=4.0, seed=5, times=50), chosen_by_noise)
    assert torch.equal(drawn(busy_corner(64), 16, 4, strength=0.0, seed=5, times=50), chosen_by_noise)
    assert not torch.equal(drawn(busy_corner(64), 16, 4, strength=1.0, seed=5, times=50), chosen_by_noise)


def test_faint_noise_is_not_taken_for_edges():
    """One grey level more or less on every pixel of the left half: kept at most twice as often as the flat half."""
    picture = np.full((64, 64, 3), 128, np.uint8)
    picture[:, :32] += np.random.default_rng(0).integers(0, 2, (64, 32, 1), np.uint8)
    kept = torch.bincount(drawn(as_tensor(picture), 16, 4, 1.0, seed=0, times=5000).flatten(), minlength=16).view(4, 4)
    assert 1 < kept[:, :2].sum() / kept[:, 2:].sum() < 2


def test_the_noise_is_gumbels():
    torch.manual_seed(0)
    noise = draw_gumbel(1000, 100).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03) and noise.isfinite().all()
