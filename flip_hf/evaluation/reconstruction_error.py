"""The error of a decoder on masked patches, beside two baselines that are not learned.

Letters: B samples, L patches in a square grid, K kept patches, C channels, P patch side.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from flip_hf.evaluation.features import extract
from flip_hf.modeling import FlipForPreTraining, FlipModel
from flip_hf.modeling.masking_flip import cut_patches, draw_mask
from flip_hf.modeling.pretraining_flip import patch_statistics

logger = logging.getLogger(__name__)


def draw_masks(
    model: FlipModel | FlipForPreTraining, places: Sequence[tuple[int, int]], mask_ratio: float, seed: int
) -> torch.Tensor:
    """Draws masks by the model's strategy from the seed and each image's place, whatever the batches and processes.

    torch's default generators are left unchanged, so that a measurement does not affect the training around it.

    Args:
        model: the model to draw masks for.
        places: (shard, row) of each image.
        mask_ratio: fraction of the patches dropped.
        seed: seed of the masks.

    Returns:
        The visible patches (B, K), in raster order, on the CPU.

    Raises:
        ValueError: the mask keeps no patch; see [`num_kept`].
    """
    flip = model.flip if isinstance(model, FlipForPreTraining) else model
    vision = flip.vision_model.config
    side = vision.image_size // vision.patch_size
    masks = []
    with torch.random.fork_rng(devices=[]):
        for place in places:
            state = np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]))  # torch.manual_seed would seed the GPUs' generators too
            masks.append(draw_mask(vision.mask_strategy, 1, (side, side), mask_ratio, "cpu"))
    return torch.cat(masks)


def nearest_visible(ids_keep: torch.Tensor, side: int) -> torch.Tensor:
    """Finds the nearest visible patch to each patch; for a visible one, itself.

    Args:
        ids_keep: (B, K), the visible patches.
        side: rows and columns of the grid.

    Returns:
        (B, L), by Euclidean distance between patch centres; ties go to the first in raster order.
    """
    ids = torch.arange(side**2, device=ids_keep.device)
    rows = ids // side
    columns = ids % side
    squares = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2  # (L, L)
    ranks = squares * side**2 + ids  # unique in each row: by distance, then raster order
    return (ranks[:, ids_keep].amin(dim=2) % side**2).T  # (L, B, K) to (B, L)


def target_scale(model: FlipForPreTraining, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean and standard deviation (B, L, 1) that turn patches (B, L, C * P * P) into the model's targets.

    They are each patch's own with `norm_pixel_target`, else 0 and 1.
    """
    if model.config.norm_pixel_target:
        return patch_statistics(patches)
    return torch.zeros_like(patches[..., :1]), torch.ones_like(patches[..., :1])


@torch.no_grad()
def fill_in(model: FlipForPreTraining, patches: torch.Tensor, ids_keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """Predicts all patches by the model and by the baselines, in the space of the model's targets.

    Args:
        model: the whole model, in evaluation mode, unwrapped.
        patches: (B, L, C * P * P), all patches, normalised like the model's inputs.
        ids_keep: (B, K), the visible patches.

    Returns:
        (B, L, C * P * P) each, float32 or, for the model, its own dtype:

        - `model`: its decoder's predictions from the visible patches.
        - `patch_mean`: each channel's mean in the patch itself, as a plain area. This is an oracle, which the visible
            patches do not tell: the error of a guess with every colour right and no structure at all. One mean over all
            channels, the grey that zero is with `norm_pixel_target`, would be easier to beat.
        - `nearest_patch`: the nearest visible patch; with `norm_pixel_target` normalised by its own mean and standard
            deviation, so that it is, like the model's, a guess of structure and of colours about the mean.

    Raises:
        ValueError: the number of patches is not the model's, or all are visible.
    """
    vision = model.flip.vision_model.config
    if patches.shape[1] != vision.num_patches:
        raise ValueError(f"Expected all {vision.num_patches} patches of each image, got {patches.shape[1]}.")
    patches = patches.float()
    mean, std = target_scale(model, patches)
    targets = (patches - mean) / std
    nearest = nearest_visible(ids_keep, vision.image_size // vision.patch_size)  # (B, L)
    colours = targets.unflatten(2, (vision.num_channels, -1)).mean(dim=3, keepdim=True)  # (B, L, C, 1)
    visible = patches.take_along_dim(ids_keep[:, :, None], dim=1)  # (B, K, C * P * P)
    output = model(patches=visible, ids_keep=ids_keep, objective="reconstruction", return_loss=False)
    return {
        "model": output.reconstruction,
        "patch_mean": colours.expand(-1, -1, -1, vision.patch_size**2).flatten(2),
        "nearest_patch": targets.take_along_dim(nearest[:, :, None], dim=1),
    }


@torch.no_grad()
def reconstruction_errors(
    model: FlipForPreTraining, patches: torch.Tensor, ids_keep: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Computes mean squared errors on the dropped patches of each image, (B,), as in the model's loss.

    Args:
        model, patches, ids_keep: see [`fill_in`].

    Returns:
        The errors of the `model` (its `reconstruction_loss`) and of the baselines of [`fill_in`].

    Raises:
        ValueError: see [`fill_in`].
    """
    filled = fill_in(model, patches, ids_keep)
    return {name: model.reconstruction_loss(found, patches, ids_keep, per_image=True) for name, found in filled.items()}


def measure_reconstruction(
    model: FlipForPreTraining,
    batches: Iterable[dict[str, Any]],
    accelerator: Accelerator,
    mask_ratio: float,
    seed: int = 0,
    to_patches: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Measures mean errors over a data set, with the same masks every time and for any number of processes.

    Args:
        model: the model, whole and unwrapped on this process; its mode is restored afterwards.
        batches: batches of this process's [`EvalStream`].
        accelerator: the processes; each must call this.
        mask_ratio: fraction of the patches dropped, above 0.
        seed: seed of the masks.
        to_patches: turns a batch's images, on the device, into all patches (B, L, C * P * P), normalised; if None, the
            images are pixel values (B, C, height, width) from the image processor.

    Returns:
        `reconstruction_error`, `patch_mean_error` and `nearest_patch_error`, see [`reconstruction_errors`], and the
        number of `images`; without an image the errors are NaN.

    Raises:
        BadDataError: a process cannot read its part.
        ValueError: the ratio drops nothing or everything, or the images are not of the model's size.
    """
    patch_size = model.flip.vision_model.config.patch_size

    def encode(images: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
        patches = cut_patches(images, patch_size) if to_patches is None else to_patches(images)
        ids_keep = draw_masks(model, places, mask_ratio, seed).to(patches.device)
        errors = reconstruction_errors(model, patches, ids_keep)
        return torch.stack([errors[name] for name in ("model", "patch_mean", "nearest_patch")], dim=1)  # (B, 3)

    was_training = model.training
    model.eval()
    found = extract(encode, batches, accelerator, f"reconstruction at {mask_ratio:.0%}")
    model.train(was_training)
    if found.refused:
        logger.warning("The measurement of the reconstruction skipped images: %s", dict(found.refused))
    count = len(found.places)
    means = found.values.mean(axis=0, dtype=np.float64).tolist() if count else [float("nan")] * 3
    names = ("reconstruction_error", "patch_mean_error", "nearest_patch_error")
    return {**dict(zip(names, means, strict=True)), "images": float(count)}
