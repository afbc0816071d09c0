"""Images as patches: the view of them at each step, and normalisation on the device."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from flip_hf.data.stream import View
from flip_hf.modeling import FlipVisionConfig
from flip_hf.modeling.masking_flip import draw_mask, num_kept, patch_grid
from flip_hf.training.edges import draw_gumbel, keep_edges
from flip_hf.training.masks import kept_tokens
from flip_hf.training.phases import Phase, phase_at


class Normalize(nn.Module):
    """Turns uint8 patches into normalised float ones, on their device.

    Args:
        mean, std: per channel, of pixels scaled to [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.mean = nn.Buffer(255 * torch.tensor(mean)[:, None])  # (3, 1)
        self.std = nn.Buffer(255 * torch.tensor(std)[:, None])  # (3, 1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Normalises (B, K, 3 * P * P) patches, uint8 to float32."""
        channels = patches.float().unflatten(2, (3, -1))  # (B, K, 3, P * P)
        return ((channels - self.mean) / self.std).flatten(2)


def cut_bytes(images: torch.Tensor, patch_size: int, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
    """Cuts uint8 images (B, 3, S, S) as [`cut_patches`] does, faster if their channels are last in memory.

    A row of a patch, all channels of it, is then moved at once, and only the kept bytes are put in the order of
    [`cut_patches`].

    Args:
        images: square images, uint8; a remainder smaller than a patch is dropped.
        patch_size: P.
        ids_keep: (B, K) indices in raster order; all L patches if None.

    Returns:
        (B, K, 3 * P * P), or (B, L, 3 * P * P) if `ids_keep` is None, uint8.

    Raises:
        ValueError: the images are smaller than a patch.
    """
    grid, _ = patch_grid(images.shape[2], images.shape[3], patch_size)
    side = grid * patch_size
    pixels = images[:, :, :side, :side].permute(0, 2, 3, 1).contiguous().numpy()  # (B, S, S, 3)
    rows = pixels.reshape(len(images), side, -1).view(f"V{3 * patch_size}")  # (B, S, W)
    rows = rows.reshape(-1, grid, patch_size, grid).swapaxes(2, 3)  # (B, H, W, P)
    if ids_keep is None:
        kept = rows.reshape(-1, grid**2, patch_size)  # (B, L, P)
    else:
        high, wide = np.divmod(ids_keep.numpy(), grid)  # (B, K)
        kept = rows[np.arange(len(images))[:, None], high, wide]  # (B, K, P)
    channels_last = kept.view(np.uint8).reshape(*kept.shape[:2], -1, 3)  # (B, K, P * P, 3)
    return torch.from_numpy(channels_last.swapaxes(2, 3).reshape(*kept.shape[:2], -1))


def visible_and_target(patches: torch.Tensor, ids_keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the visible ones of all patches (B, L, D) as `patches` (B, K, D), and all as `target_patches`."""
    return {"patches": patches.take_along_dim(ids_keep[:, :, None], dim=1), "target_patches": patches}


def resized_side(num_patches: int, mask_ratio: float) -> int:
    """Returns the side, in patches, of the smaller image with nearly as many patches as a mask would keep."""
    return max(1, round(math.sqrt(num_kept(num_patches, mask_ratio))))


def grid_of(phase: Phase, vision: FlipVisionConfig) -> tuple[int, int]:
    """Returns the rows and columns of patches in the images of a phase."""
    side = (phase.image_size or vision.image_size) // vision.patch_size
    return side, side


class Views:
    """Chooses the view of images and texts at each step, for the workers that cut them into patches.

    A smaller image gets interpolated positions, which tell where in the image a patch lies, as on the whole images that
    follow. CLIPA computes sin-cos from whole numbers instead: the small image then has the positions of a corner.

    Args:
        strategy: one of `MASK_STRATEGIES`, `edges` for patches chosen by content (see edges.py), or `resize` for all
            patches of a smaller image.
        vision_config: the model's vision configuration.
        phases: the run's phases.
        context: tokens of a text, of which a part may be masked; 0 where no text is read.
    """

    def __init__(self, strategy: str, vision_config: FlipVisionConfig, phases: list[Phase], context: int = 0):
        self.strategy = strategy
        self.vision = vision_config
        self.phases = phases
        self.context = context

    def __call__(self, samples: int) -> View:
        """Returns the view at the step that begins after this many samples of the whole run."""
        phase = phase_at(self.phases, samples)
        mask_ratio = phase.mask_ratio_at(samples)
        image_size = phase.image_size or self.vision.image_size
        patch_size = self.vision.patch_size
        texts = self._texts(phase)
        if mask_ratio == 0:
            return View(image_size, **texts)
        grid = grid_of(phase, self.vision)
        num_patches = grid[0] * grid[1]
        if self.strategy == "resize":
            return View(resized_side(num_patches, mask_ratio) * patch_size, **texts)
        if self.strategy == "edges":
            kept = num_kept(num_patches, mask_ratio)
            strength = phase.edge_strength_at(samples)
            choose = partial(keep_edges, patch_size=patch_size, kept=kept, strength=strength)
            return View(image_size, partial(draw_gumbel, num_patches=num_patches), choose, **texts)
        draw = partial(draw_mask, self.strategy, grid=grid, mask_ratio=mask_ratio, device="cpu")
        return View(image_size, draw, **texts)

    def _texts(self, phase: Phase) -> dict[str, Any]:
        """Returns the fields of a view that are about texts."""
        if self.context == 0 or phase.text_mask_ratio == 0:
            return {"text_length": phase.text_length}
        context = phase.text_length or self.context
        kept = kept_tokens(context, phase.text_mask_ratio)
        return {"text_length": phase.text_length, "text_noise": context, "text_kept": kept}
