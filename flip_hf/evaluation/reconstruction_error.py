"""How well a decoder fills in what a mask drops, beside two fillings that are not learned.

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
    """Masks by the model's own strategy, each from the seed and its image's place: batches and processes do not matter.

    torch's default generators are left as they were, so that a measurement does not change the training around it.

    Args:
        model: what the masks are for.
        places: (shard, row) of each image.
        mask_ratio: fraction of the patches dropped.
        seed: another one gives other masks.

    Returns:
        The visible patches (B, K), in raster order, on the CPU.

    Raises:
        ValueError: no patch would be left; see [`num_kept`].
    """
    flip = model.flip if isinstance(model, FlipForPreTraining) else model
    vision = flip.vision_model.config
    side = vision.image_size // vision.patch_size
    masks = []
    with torch.random.fork_rng(devices=[]):
        for place in places:
            state = np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]))  # torch.manual_seed would reach the GPUs' generators
            masks.append(draw_mask(vision.mask_strategy, 1, (side, side), mask_ratio, "cpu"))
    return torch.cat(masks)


def nearest_visible(ids_keep: torch.Tensor, side: int) -> torch.Tensor:
    """The visible patch that is nearest to each patch; a visible one is its own.

    Args:
        ids_keep: (B, K), the visible patches.
        side: rows and columns of the grid.

    Returns:
        (B, L), by Euclidean distance between the patches' centres; of several the first in raster order.
    """
    ids = torch.arange(side**2, device=ids_keep.device)
    rows, columns = ids // side, ids % side
    squares = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2  # (L, L)
    ranks = squares * side**2 + ids  # no two alike in a row: by distance, then in raster order
    return (ranks[:, ids_keep].amin(dim=2) % side**2).T  # (L, B, K) to (B, L)


def target_scale(model: FlipForPreTraining, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model's targets are patches (B, L, C * P * P) less and divided by: each (B, L, 1).

    With `norm_pixel_target` each patch's mean and standard deviation, else 0 and 1.
    """
    if model.config.norm_pixel_target:
        return patch_statistics(patches)
    return torch.zeros_like(patches[..., :1]), torch.ones_like(patches[..., :1])


@torch.no_grad()
def fill_in(model: FlipForPreTraining, patches: torch.Tensor, ids_keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """All patches as the model and as the baselines predict them, in the space of the model's targets.

    Args:
        model: the whole one, in evaluation mode, not wrapped.
        patches: (B, L, C * P * P), all of them, normalised as the model takes them.
        ids_keep: (B, K), the visible ones.

    Returns:
        (B, L, C * P * P) each, float32 or, of the model, its own type:

        - `model`: its decoder's predictions from the visible patches.
        - `patch_mean`: a plain area of the mean of each channel in that very patch, an oracle: who sees the visible
            patches alone does not know it. It is how far a guess gets that has every colour right and no structure at
            all. One mean over all channels, the grey that zero is with `norm_pixel_target`, would be easier to beat.
        - `nearest_patch`: the visible patch that is nearest; with `norm_pixel_target` on the scale of its own mean and
            standard deviation, so that it is, as the model's are, a guess of structure and of colours about the mean.

    Raises:
        ValueError: the patches are not those of the model's images, or all are visible.
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
    """Mean squared errors on the dropped patches of each image, (B,), as the model's loss counts them.

    Args:
        model, patches, ids_keep: see [`fill_in`].

    Returns:
        Those of the `model`, which are its `reconstruction_loss`, and of the baselines of [`fill_in`].

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
    """The mean errors over a data set, whose masks are the same every time and for any number of processes.

    Args:
        model: on this process, whole and not wrapped; afterwards in the mode that it was in.
        batches: of an [`EvalStream`] that knows this process.
        accelerator: the processes; each must call this.
        mask_ratio: fraction of the patches dropped, above 0.
        seed: of the masks.
        to_patches: a batch's images, on the device, to all of their patches (B, L, C * P * P), normalised; if None, the
            images are pixel values (B, C, height, width) as the image processor gives them.

    Returns:
        `reconstruction_error`, `patch_mean_error` and `nearest_patch_error`, see [`reconstruction_errors`], and the
        number of `images`; without an image the errors are not a number.

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
