import pytest
import torch

from flip_hf.modeling.masking_flip import cut_patches, num_kept, random_masking


@pytest.mark.parametrize(
    ("num_patches", "ratio", "kept"), [(196, 0.5, 98), (196, 0.75, 49), (256, 0.75, 64), (25, 0.8, 4), (16, 0, 16)]
)
def test_kept_counts_are_those_of_the_official_code(num_patches, ratio, kept):
    assert num_kept(num_patches, ratio) == kept  # (25, 0.8): floating point makes it 4, not 5


@pytest.mark.parametrize("ratio", [1.0, -0.1, 0.95])
def test_a_ratio_that_keeps_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        num_kept(16, ratio)


def test_masks_are_sorted_subsets_that_differ_by_sample_and_step():
    first, second = (random_masking(64, 16, 0.5, "cpu") for _ in range(2))
    assert first.shape == (64, 8)
    assert (first.diff(dim=1) > 0).all()  # sorted, and no patch twice
    assert 0 <= first.min() and first.max() < 16
    assert len({tuple(row) for row in first.tolist()}) > 60
    assert not torch.equal(first, second)


def test_masks_follow_the_torch_generator():
    torch.manual_seed(7)
    first = random_masking(4, 16, 0.5, "cpu")
    torch.manual_seed(7)
    assert torch.equal(first, random_masking(4, 16, 0.5, "cpu"))


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
