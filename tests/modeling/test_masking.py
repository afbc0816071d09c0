import itertools
import math
from typing import get_args, get_type_hints

import pytest
import torch

from flip_hf import FlipModel, FlipVisionConfig
from flip_hf.modeling.masking_flip import (
    MASK_STRATEGIES,
    TEXT_MASK_STRATEGIES,
    cut_patches,
    draw_mask,
    num_kept,
    random_masking,
)
from tests.helpers.models import tiny_config


@pytest.mark.parametrize(
    ("num_patches", "ratio", "kept"), [(196, 0.5, 98), (196, 0.75, 49), (256, 0.75, 64), (25, 0.8, 4), (16, 0, 16)]
)
def test_kept_counts_are_those_of_the_official_code(num_patches, ratio, kept):
    assert num_kept(num_patches, ratio) == kept  # (25, 0.8): floating point makes it 4, not 5


@pytest.mark.parametrize("ratio", [1.0, -0.1, 0.95])
def test_a_ratio_that_keeps_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        num_kept(16, ratio)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (7, 7), (4, 9), (13, 5), (1, 8), (6, 1)])
@pytest.mark.parametrize("ratio", [0, 0.3, 0.5, 0.6180339, 0.75, 0.83])
def test_masks_are_sorted_subsets_of_exactly_the_right_size(strategy, grid, ratio):
    num_patches = math.prod(grid)
    ids_keep = draw_mask(strategy, 200, grid, ratio, "cpu")
    assert ids_keep.shape == (200, num_kept(num_patches, ratio)) and ids_keep.dtype == torch.int64
    assert (ids_keep.diff(dim=1) > 0).all()  # sorted, and no patch twice
    assert 0 <= ids_keep.min() and ids_keep.max() < num_patches


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_masks_differ_by_sample_and_step_and_follow_the_torch_generator(strategy):
    torch.manual_seed(7)
    first, second = (draw_mask(strategy, 64, (14, 14), 0.7, "cpu") for _ in range(2))
    assert len({tuple(row) for row in first.tolist()}) > 30 and not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(first, draw_mask(strategy, 64, (14, 14), 0.7, "cpu"))


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_masks_are_drawn_on_the_device_without_reading_it(strategy):
    """The meta device has no values: a strategy that looked at one would fail, as it would stall a GPU."""
    assert draw_mask(strategy, 8, (14, 14), 0.5, "meta").shape == (8, 98)


def test_an_unknown_strategy_is_refused_and_the_configuration_knows_the_same_ones():
    with pytest.raises(ValueError, match="one of random, block, grid, gaussian, got 'blocks'"):
        draw_mask("blocks", 8, (4, 4), 0.5, "cpu")
    assert get_args(FlipVisionConfig.__annotations__["mask_strategy"]) == tuple(MASK_STRATEGIES)


def frequencies(strategy: str, grid: tuple[int, int], ratio: float) -> torch.Tensor:
    """Frequency with which each patch is kept."""
    ids_keep = draw_mask(strategy, 20_000, grid, ratio, "cpu")
    return (torch.bincount(ids_keep.flatten(), minlength=math.prod(grid)) / 20_000).view(grid)


def as_pictures(ids_keep: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Masks (B, H, W), true where a patch is kept."""
    kept = torch.zeros(len(ids_keep), math.prod(grid), dtype=torch.bool)
    return kept.scatter_(1, ids_keep, True).view(-1, *grid)


@pytest.mark.parametrize(("ratio", "shape"), [(0.75, (7, 7)), (0.5, (10, 10)), (0.9, (4, 5))])
def test_a_block_is_one_rectangle_but_for_the_end_of_a_column(ratio, shape):
    kept = num_kept(196, ratio)
    for picture in as_pictures(draw_mask("block", 100, (14, 14), ratio, "cpu"), (14, 14)):
        rows = picture.any(1).nonzero()
        columns = picture.any(0).nonzero()
        box = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.shape == shape and box.sum() == kept
        full = box.all(0)  # the columns without a gap
        assert full.sum() >= shape[1] - 1 and full[1:-1].all()
        for column in box.T[~full]:
            assert column.int().diff().abs().sum() == 1  # its gap lies at one end
    assert frequencies("block", (14, 14), ratio).min() > 0


def test_a_grid_keeps_the_same_patch_of_each_window():
    pictures = as_pictures(draw_mask("grid", 200, (14, 14), 0.75, "cpu"), (14, 14))
    windows = pictures.unflatten(1, (7, 2)).unflatten(3, (7, 2)).transpose(2, 3)  # (B, 7, 7, 2, 2)
    assert (windows == windows[:, :1, :1]).all() and (windows.sum((3, 4)) == 1).all()
    assert len({tuple(window) for window in windows[:, 0, 0].flatten(1).tolist()}) == 4
    chequered = as_pictures(draw_mask("grid", 50, (14, 14), 0.5, "cpu"), (14, 14))
    assert (chequered[:, 1:] != chequered[:, :-1]).all() and (chequered[:, :, 1:] != chequered[:, :, :-1]).all()
    # Where K fits no pattern, no 4 x 4 window has more than two patches more than another.
    uneven = as_pictures(draw_mask("grid", 200, (12, 16), 0.6, "cpu"), (12, 16))
    counts = uneven.unflatten(1, (3, 4)).unflatten(3, (4, 4)).sum((2, 4))
    assert (counts.amax((1, 2)) - counts.amin((1, 2))).max() <= 2
    assert (frequencies("grid", (7, 9), 0.6) - 25 / 63).abs().max() < 0.06


def test_a_gaussian_keeps_the_centre_more_often_than_the_border_and_alike_on_all_sides():
    kept = frequencies("gaussian", (14, 14), 0.75)
    assert kept[6:8, 6:8].mean() > 0.7 and kept[0].mean() < 0.15
    assert all((a >= b - 0.02) for a, b in itertools.pairwise(kept.diagonal()[7:].tolist()))
    for mirrored in (kept.flip(0), kept.flip(1), kept.T):
        assert (kept - mirrored).abs().max() < 0.03


def test_every_patch_is_kept_equally_often():
    counts = torch.bincount(random_masking(20_000, 16, 0.75, "cpu").flatten(), minlength=16)
    assert (counts / 20_000 - 0.25).abs().max() < 0.02  # six standard deviations


def test_patches_are_those_of_a_strided_convolution():
    images = torch.randn(2, 3, 12, 20)
    patches = cut_patches(images, 4)
    unfolded = torch.nn.functional.unfold(images, kernel_size=4, stride=4).transpose(1, 2)
    assert torch.equal(patches, unfolded)
    assert torch.equal(cut_patches(torch.nn.functional.pad(images, (0, 3, 0, 1)), 4), patches)  # the rest is left out


def test_selected_patches_are_the_selected_ones():
    images = torch.randn(2, 3, 12, 20)
    ids_keep = torch.tensor([[0, 7, 14], [3, 4, 9]])
    every = cut_patches(images, 4)
    for sample in range(2):
        assert torch.equal(cut_patches(images, 4, ids_keep)[sample], every[sample, ids_keep[sample]])


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_a_model_trains_a_step_with_each_strategy(strategy, images, texts):
    model = FlipModel(tiny_config(mask_strategy=strategy, mask_ratio=0.75)).train()
    torch.manual_seed(3)
    outputs = model(pixel_values=images, return_loss=True, **texts)
    outputs.loss.backward()
    assert model.vision_model.embeddings.patch_embedding.weight.grad.isfinite().all()
    torch.manual_seed(3)
    assert torch.equal(outputs.ids_keep, draw_mask(strategy, 3, (4, 4), 0.75, "cpu"))


def test_every_strategy_is_a_choice_of_a_run():
    from flip_hf.training.arguments import ModelArguments

    hints = get_type_hints(ModelArguments)
    assert get_args(hints["mask_strategy"]) == (*MASK_STRATEGIES, "edges", "resize")
    assert get_args(hints["text_mask_strategy"]) == TEXT_MASK_STRATEGIES
