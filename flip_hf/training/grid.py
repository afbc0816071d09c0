"""Pictures of what a decoder makes of masked images, on the way: in the run's folder and its trackers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from flip_hf.evaluation.reconstruction import draw_reconstructions, join_patches
from flip_hf.modeling import FlipForPreTraining

IMAGES = 8
# Trackers that take images as Accelerate gives them, and how they are told what the axes are.
TRACKERS: dict[str, dict[str, str]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}


class Grid:
    """The same few images of the run, under the same masks, drawn again and again.

    Args:
        accelerator: the process layer; the main process draws.
        output_dir: pictures go to its folder `reconstructions`.
        image_processor: knows mean and standard deviation of the pixels.
        mask_ratio: fraction of the patches dropped.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, image_processor: Any, mask_ratio: float):
        self.accelerator = accelerator
        self.folder = output_dir / "reconstructions"
        self.mask_ratio = mask_ratio
        self.mean = image_processor.image_mean
        self.std = image_processor.image_std
        self._pixel_values: torch.Tensor | None = None

    def see(self, target_patches: torch.Tensor, patch_size: int) -> None:
        """Takes its images from the run's first batch (B, L, C * P * P), normalised."""
        if self._pixel_values is None:
            self._pixel_values = join_patches(target_patches[:IMAGES], patch_size)

    def draw(self, model: FlipForPreTraining, samples: int) -> None:
        """Draws them as the model, whole on this process, reconstructs them after so many samples."""
        if self._pixel_values is None or not self.accelerator.is_main_process:
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{samples:012d}.png"
        was_training = model.training
        draw_reconstructions(
            model.eval(), self._pixel_values, [self.mask_ratio], path, statistics=(self.mean, self.std)
        )
        model.train(was_training)
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))[None]  # (1, height, width, 3)
        for tracker in self.accelerator.trackers:
            if tracker.name in TRACKERS:
                tracker.log_images({"reconstructions": pixels}, step=samples, **TRACKERS[tracker.name])
