"""Pictures of a decoder's reconstructions during training, in the run's folder and its trackers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from flip_hf.evaluation.reconstruction import draw_reconstructions, join_patches
from flip_hf.modeling import FlipForPreTraining
from flip_hf.training.arguments import Arguments

IMAGES = 8
# Trackers that take images through Accelerate, and the arguments that name the axes.
TRACKERS: dict[str, dict[str, str]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}


class ReconstructionPictures:
    """Draws reconstructions of the same few images under the same masks throughout the run.

    Args:
        accelerator: the process layer; the main process draws.
        arguments: the run's, for its folder, whose `reconstructions` the pictures go to, and its mask ratio.
        image_processor: has mean and standard deviation of the pixels.
        normalize: turns uint8 patches into the model's inputs.
        patch_size: side of a patch, in pixels.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: Arguments,
        image_processor: Any,
        normalize: nn.Module,
        patch_size: int,
    ):
        self.accelerator = accelerator
        self.folder = Path(arguments.run.output_dir) / "reconstructions"
        self.normalize = normalize
        self.patch_size = patch_size
        self.mask_ratio = arguments.model.mask_ratio
        self.mean = image_processor.image_mean
        self.std = image_processor.image_std
        self._pixel_values: torch.Tensor | None = None

    def see(self, patches: torch.Tensor) -> None:
        """Takes the images from the run's first batch: all patches (B, L, C * P * P), uint8."""
        if self._pixel_values is None:
            target_patches = self.normalize(patches[:IMAGES].to(self.accelerator.device))
            self._pixel_values = join_patches(target_patches, self.patch_size)

    def draw(self, model: FlipForPreTraining, samples: int) -> None:
        """Draws the reconstructions of a model, whole on this process, after this many samples."""
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
