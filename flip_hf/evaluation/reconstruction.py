"""Pictures of a decoder's reconstructions: each image, its visible part, and its reconstruction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flip_hf.console.loading import load_complete, loading
from flip_hf.evaluation.encoder import ImageTransform
from flip_hf.evaluation.plots import DPI
from flip_hf.evaluation.reconstruction_error import draw_masks, fill_in, target_scale
from flip_hf.modeling import FlipForPreTraining, FlipPreTrainingConfig
from flip_hf.modeling.masking_flip import cut_patches

GREY = 0.5


def load_pretraining(name_or_path: str | Path) -> tuple[FlipForPreTraining, Any]:
    """Loads a model with its decoder, in evaluation mode, and its image processor, from a folder or Hub id.

    Raises:
        ModelUnreadable: there is no such model, or it is damaged.
        ValueError: it has no decoder.
    """
    with loading(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if not isinstance(config, FlipPreTrainingConfig):
        raise ValueError(
            f"{name_or_path} is a checkpoint of type {config.model_type!r}, which has no decoder; expected a "
            "FlipForPreTraining."
        )
    model = load_complete(FlipForPreTraining, name_or_path)
    with loading(name_or_path, "image processor"):
        return model.eval(), AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False)


def join_patches(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Joins all patches (B, L, C * P * P) into square images (B, C, height, width); inverts `cut_patches`."""
    side = int(patches.shape[1] ** 0.5)
    grid = patches.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, (side, side))  # (B, H, W, C, P, P)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def visible_pixels(ids_keep: torch.Tensor, num_patches: int, patch_size: int) -> torch.Tensor:
    """Returns a mask (B, 1, height, width) of the pixels of square images that lie in patches `ids_keep` (B, K)."""
    visible = torch.zeros(len(ids_keep), num_patches, dtype=torch.bool, device=ids_keep.device)
    visible = visible.scatter(1, ids_keep, True)[:, :, None]  # (B, L, 1)
    return join_patches(visible.expand(-1, -1, patch_size**2), patch_size)


@torch.no_grad()
def reconstruct(
    model: FlipForPreTraining, pixel_values: torch.Tensor, ids_keep: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Fills in what a mask drops, by the model and by the baselines.

    Predictions of normalised pixels are rescaled to the original patch, as in MAE's demo: its mean and standard
    deviation are looked up, not predicted, and likewise for the nearest patch. Visible patches are the originals.

    Args:
        model: in evaluation mode.
        pixel_values: (B, C, height, width), from the image processor.
        ids_keep: (B, K), the visible patches.

    Returns:
        A mask of the visible pixels (B, 1, height, width), and images of the shape of `pixel_values` under the names of
        [`fill_in`].

    Raises:
        ValueError: all patches are visible, or the images are not of the model's size.
    """
    patch_size = model.flip.vision_model.config.patch_size
    patches = cut_patches(pixel_values, patch_size).float()
    mean, std = target_scale(model, patches)
    filled = fill_in(model, patches, ids_keep)
    visible = visible_pixels(ids_keep, patches.shape[1], patch_size)
    pasted = {
        name: torch.where(visible, pixel_values, join_patches(found.float() * std + mean, patch_size))
        for name, found in filled.items()
    }
    return visible, pasted


def draw_reconstructions(
    model: FlipForPreTraining,
    pixel_values: torch.Tensor,
    mask_ratios: Sequence[float],
    path: str | Path,
    *,
    statistics: tuple[Sequence[float], Sequence[float]],
    places: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    baselines: bool = False,
) -> Figure:
    """Draws one row per image: the original and, for each mask ratio, the visible part and its reconstruction.

    The masks are the same every time (see [`draw_masks`]), so that pictures from a model's training are comparable.

    Args:
        model: in evaluation mode.
        pixel_values: (B, C, height, width), normalised, on the model's device.
        mask_ratios: fractions of the patches dropped.
        path: the file to write.
        statistics: mean and standard deviation per channel that the images are normalised with.
        places: (shard, row) of the images in their data set; if None, they are the rows of the first shard.
        seed: seed of the masks.
        baselines: also draw the baselines of [`fill_in`], before the model's reconstruction.

    Raises:
        ValueError: see [`reconstruct`] and [`draw_masks`].
    """
    places = [(0, row) for row in range(len(pixel_values))] if places is None else places
    columns = {"original": to_colours(pixel_values, statistics)}
    for ratio in mask_ratios:
        ids_keep = draw_masks(model, places, ratio, seed).to(pixel_values.device)
        visible, pasted = reconstruct(model, pixel_values, ids_keep)
        columns[f"{ratio:.0%} dropped"] = grey_out(columns["original"], visible)
        if baselines:
            columns[f"{ratio:.0%} nearest visible patch"] = to_colours(pasted["nearest_patch"], statistics)
            columns[f"{ratio:.0%} per-patch mean"] = to_colours(pasted["patch_mean"], statistics)
        columns[f"{ratio:.0%} reconstructed"] = to_colours(pasted["model"], statistics)
    return _draw_grid(columns, path)


def to_colours(pixel_values: torch.Tensor, statistics: tuple[Sequence[float], Sequence[float]]) -> torch.Tensor:
    """Converts normalised images (B, C, height, width) into (B, height, width, C) in [0, 1], on the CPU."""
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (pixel_values.cpu().float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


def grey_out(colours: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Greys out images (B, height, width, C) where they are not visible (B, 1, height, width)."""
    return torch.where(visible.cpu().permute(0, 2, 3, 1), colours, GREY)


def _draw_grid(columns: dict[str, torch.Tensor], path: str | Path) -> Figure:
    """Draws columns of images (B, height, width, C) under their titles."""
    rows = len(columns["original"])
    figure = Figure(figsize=(1.6 * len(columns), 0.3 + 1.6 * rows), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for row, cells in enumerate(grid):
        for axes, (title, pictures) in zip(cells, columns.items(), strict=True):
            axes.imshow(pictures[row].numpy(), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=8)
    figure.savefig(path, dpi=DPI)
    return figure


def plot_reconstructions(
    model: FlipForPreTraining,
    image_processor: Any,
    images: Sequence[Image.Image],
    mask_ratios: Sequence[float],
    path: str | Path,
    **options: Any,
) -> Figure:
    """Draws reconstructions of PIL images, see [`draw_reconstructions`].

    Args:
        model: in evaluation mode.
        image_processor: the model's, with its mean and standard deviation.
        images: PIL images.
        mask_ratios: fractions of the patches dropped.
        path: the file to write.
        options: further arguments of [`draw_reconstructions`].

    Raises:
        ValueError: see [`draw_reconstructions`].
    """
    pixel_values = torch.stack(list(map(ImageTransform(image_processor), images))).to(model.device)
    statistics = (image_processor.image_mean, image_processor.image_std)
    return draw_reconstructions(model, pixel_values, mask_ratios, path, statistics=statistics, **options)
