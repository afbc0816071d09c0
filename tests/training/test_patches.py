"""The patches that a loader cuts are the model's, whichever bytes are moved at once."""

import pytest
import torch

from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.training.patches import cut_bytes


@pytest.mark.parametrize(
    ("size", "patch_size"), [(64, 32), (64, 16), (56, 8), (36, 12), (56, 14), (21, 7), (70, 16), (45, 14)]
)
def test_bytes_of_patches_are_moved_as_they_are(size, patch_size):
    """Every value in every place, through types of 1 to 16 bytes; what is left beside the patches is left out."""
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    ids_keep = torch.rand(3, (size // patch_size) ** 2).argsort(dim=1)[:, :2]
    for kept in (ids_keep, None):
        patches = cut_bytes(images, patch_size, kept)
        assert patches.dtype == torch.uint8 and torch.equal(patches, cut_patches(images, patch_size, kept))


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(ValueError, match="Images of 8 x 8 pixels are smaller than a patch of 16 x 16"):
        cut_bytes(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 16)


def test_views_of_images_are_cut_too():
    """As a mirrored picture, whose bytes lie in another order."""
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert torch.equal(cut_bytes(images, 16), cut_patches(images, 16))
