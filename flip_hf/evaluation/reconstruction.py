"""What a decoder makes of masked images, as pictures: each image, what is visible of it, and its reconstruction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from flip_hf.evaluation.plots import DPI
from flip_hf.modeling import FlipForPreTraining
from flip_hf.modeling.masking_flip import cut_patches, draw_mask
from flip_hf.modeling.pretraining_flip import patch_statistics

GREY = 0.5


def join_patches(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Square images (B, C, height, width) of all their patches (B, L, C * P * P); the inverse of `cut_patches`."""
    side = int(patches.shape[1] ** 0.5)
    grid = patches.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, (side, side))  # (B, H, W, C, P, P)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def reconstruct(
    model: FlipForPreTraining, pixel_values: torch.Tensor, mask_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks images at random (`torch.manual_seed` makes it repeatable) and fills in what was dropped.

    Predictions of normalised pixels are put back on the scale of the original patch, as in MAE's demo: its mean and
    standard deviation are not predicted, but looked up. Visible patches are the original ones.

    Args:
        model: in evaluation mode.
        pixel_values: (B, C, height, width), as the image processor gives them.
        mask_ratio: fraction of the patches dropped, above 0.

    Returns:
        Which pixels are visible (B, 1, height, width), and the reconstructions, of the shape of `pixel_values`.

    Raises:
        ValueError: the ratio drops nothing or everything, or the images are not of the model's size.
    """
    config = model.flip.vision_model.config
    side = config.image_size // config.patch_size
    ids_keep = draw_mask(config.mask_strategy, len(pixel_values), (side, side), mask_ratio, pixel_values.device)
    tokens = model.flip.vision_model(pixel_values, ids_keep=ids_keep).last_hidden_state
    predicted = model.reconstruct(tokens, ids_keep).float()
    patches = cut_patches(pixel_values, config.patch_size).float()
    if model.config.norm_pixel_target:
        mean, std = patch_statistics(patches)
        predicted = predicted * std + mean
    visible = torch.zeros(patches.shape[:2], device=patches.device).scatter(1, ids_keep, 1)[:, :, None]  # (B, L, 1)
    pasted = torch.where(visible > 0, patches, predicted)
    mask = visible.expand(-1, -1, config.patch_size**2)
    return join_patches(mask, config.patch_size) > 0, join_patches(pasted, config.patch_size)


def _colours(pixel_values: torch.Tensor, image_processor: Any) -> torch.Tensor:
    """Images (B, height, width, C) in [0, 1] of normalised ones (B, C, height, width)."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixel_values.cpu().float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


def plot_reconstructions(
    model: FlipForPreTraining,
    image_processor: Any,
    images: Sequence[Any],
    mask_ratios: Sequence[float],
    path: str | Path,
) -> Figure:
    """Draws a row an image: the original and, for each mask ratio, what is visible and what is made of it.

    Args:
        model: in evaluation mode.
        image_processor: the model's, with the mean and standard deviation that it normalises by.
        images: PIL images.
        mask_ratios: fractions of the patches dropped.
        path: the picture's file.

    Raises:
        ValueError: see [`reconstruct`].
    """
    pixel_values = image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    pixel_values = pixel_values.to(model.device, model.dtype)
    columns = {"original": _colours(pixel_values, image_processor)}
    for ratio in mask_ratios:
        visible, pasted = reconstruct(model, pixel_values, ratio)
        seen = visible.cpu().permute(0, 2, 3, 1)
        columns[f"{ratio:.0%} dropped"] = torch.where(seen, columns["original"], GREY)
        columns[f"{ratio:.0%} reconstructed"] = _colours(pasted, image_processor)
    figure = Figure(figsize=(1.6 * len(columns), 0.3 + 1.6 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for row, cells in enumerate(grid):
        for axes, (title, pictures) in zip(cells, columns.items(), strict=True):
            axes.imshow(pictures[row].numpy(), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=8)
    figure.savefig(path, dpi=DPI)
    return figure
