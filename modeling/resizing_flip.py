"""Positions and patch projections for images and patches of any size."""

import math
from typing import Any, Protocol

import torch
from torch import nn

from .configuration_flip import FlipVisionConfig


def sincos_positions(grid_size: int, width: int, class_token: bool = True) -> torch.Tensor:
    """Makes the fixed 2D table of FLIP and MAE: (1 + grid_size^2, width), float32, with the class token's row zero.

    Without a class token, the table has no row for it.

    Half of the channels encode the column, then half the row; each half is sines, then cosines, of the integer
    coordinate times 10000^(-i / (width / 4)).
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # (D / 4)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (grid, D / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D / 2)
    columns = axis[None].expand(grid_size, -1, -1)  # (H, W, D / 2), varies along W
    rows = axis[:, None].expand(-1, grid_size, -1)  # (H, W, D / 2), varies along H
    table = torch.cat([columns, rows], dim=2).flatten(0, 1)  # (L, D)
    return torch.cat([torch.zeros(int(class_token), width, dtype=table.dtype), table]).float()  # (1 + L, D)


class FlipSincosPositions(nn.Module):
    """A fixed table of positions, with the parameter name of a learned one.

    A buffer, so that nothing trains it; saved, since the official checkpoints' table differs in the last bits.

    Args:
        side: patches in a row of an image.
        width: channels of a position; divisible by 4.
        class_token: the first row is that of a class token.
    """

    def __init__(self, side: int, width: int, class_token: bool = True):
        super().__init__()
        # Computed here as well as by `_init_weights`: a model may be built without initialising its weights. On the
        # meta device there are no values yet, and `_init_weights` fills in what the checkpoint lacks.
        self.weight = nn.Buffer(sincos_positions(side, width, class_token).to(torch.get_default_dtype()))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Looks up positions (...) as (..., D)."""
        return nn.functional.embedding(position_ids, self.weight)


@torch.no_grad()
def resize_patch_kernel(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Resizes the patch projection to another patch size by FlexiViT's pseudo-inverse (Beyer et al. 2023).

    With R the linear map that resizes a patch, the new kernel is the one whose products with R x come closest to the
    old kernel's with x: equal for larger patches, in the least-squares sense for smaller ones. Resizing the kernel as
    if it were an image would change the scale of all tokens, by 14^2 / 16^2 from patch 16 to 14.

    Args:
        weight: (D, C, P, P), of any floating-point dtype.
        patch_size: the new side.

    Returns:
        (D, C, patch_size, patch_size), in the dtype of `weight`; `weight` itself where the side is the same.
    """
    old = weight.shape[-1]
    if patch_size == old:
        return weight
    pixels = torch.eye(old * old, dtype=torch.float64, device=weight.device).view(old * old, 1, old, old)
    resized = nn.functional.interpolate(pixels, (patch_size, patch_size), mode="bicubic", antialias=True)
    # R^T, (old^2, new^2); float64, as its smallest singular values are far below its largest.
    inverse = torch.linalg.pinv(resized.flatten(1))  # (new^2, old^2)
    kernel = weight.flatten(2).double() @ inverse.T  # (D, C, new^2)
    return kernel.unflatten(2, (patch_size, patch_size)).to(weight.dtype)


class ResizableEmbeddings(Protocol):
    """The part of a vision tower that depends on the sizes."""

    position_embedding: nn.Module

    def resize(self, side: int, patch_size: int) -> None: ...


class ResizableTower(Protocol):
    """The part of a vision tower that resizing reads and changes."""

    config: FlipVisionConfig
    embeddings: ResizableEmbeddings


class Resizable:
    """Resizing of a model with a vision tower to other image or patch sizes."""

    def _vision_tower(self) -> ResizableTower:
        tower: Any = getattr(self, "vision_model", self)
        if not hasattr(getattr(tower, "embeddings", None), "patch_embedding"):
            raise NotImplementedError(f"{type(self).__name__} has no vision tower to resize.")
        return tower

    def get_position_embeddings(self) -> Any:
        """Returns the image positions: `nn.Embedding`, or the fixed table."""
        return self._vision_tower().embeddings.position_embedding

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Resizes the model to images of another size, to fine-tune or run it there; call before making an optimizer.

        Learned positions are interpolated (bicubic), fixed ones computed, as the official code does.

        Args:
            new_num_position_embeddings: (image side // patch side)^2, plus 1 for the class token if there is one.

        Raises:
            ValueError: that is not a square of patches, with the class token if there is one.
            NotImplementedError: the model has no vision tower.
        """
        tower = self._vision_tower()
        first = int(tower.config.use_class_token)
        side = math.isqrt(max(new_num_position_embeddings - first, 0))
        if side < 1 or side * side + first != new_num_position_embeddings:
            raise ValueError(
                f"{new_num_position_embeddings} is not the number of positions of a square image: (side in patches)^2"
                f"{' + 1' if first else ''}."
            )
        tower.embeddings.resize(side, tower.config.patch_size)

    def resize_patch_embeddings(self, patch_size: int, image_size: int | None = None) -> None:
        """Resizes the model to patches of another size, to tune it (the paper's L/14 is a tuned L/16); call before
        making an optimizer.

        The kernel is resized so that equally resized patches give the same tokens ([`resize_patch_kernel`]), the
        positions as by [`Resizable.resize_position_embeddings`].

        Args:
            patch_size: side of a patch, in pixels.
            image_size: side of an image, in pixels; unchanged if not given.

        Raises:
            ValueError: the patches do not fill the image.
            NotImplementedError: the model has no vision tower.
        """
        tower = self._vision_tower()
        size = tower.config.image_size if image_size is None else image_size
        if not 1 <= patch_size <= size or size % patch_size != 0:
            raise ValueError(f"image_size ({size}) must be a multiple of patch_size ({patch_size}).")
        tower.embeddings.resize(size // patch_size, patch_size)
