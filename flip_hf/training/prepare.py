"""Preparation of a micro-batch on the device, between the loader and the model."""

import torch
from torch import nn

from flip_hf.modeling import FlipVisionConfig
from flip_hf.training.arguments import ObjectiveArguments
from flip_hf.training.patches import grid_of, visible_and_target
from flip_hf.training.phases import Phase
from flip_hf.training.step import Batch, Inputs, without_caption_ids


class PrepareBatch:
    """Moves a micro-batch to the device and normalises its patches there.

    Args:
        objective: what the batch is trained on.
        vision: the model's vision configuration.
        normalize: turns uint8 patches into the model's inputs.
        device: the model's device.
    """

    def __init__(
        self,
        objective: ObjectiveArguments,
        vision: FlipVisionConfig,
        normalize: nn.Module,
        device: torch.device,
    ):
        self.objective = objective
        self.vision = vision
        self.normalize = normalize
        self.device = device

    def __call__(self, batch: Batch, phase: Phase) -> Inputs:
        """Makes the model's inputs of a micro-batch from the loader."""
        batch = without_caption_ids(batch)
        inputs: Inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        inputs["patches"] = self.normalize(inputs["patches"])
        if self.objective.reconstructs:
            inputs |= visible_and_target(inputs["patches"], inputs["ids_keep"])
        inputs["interpolate_pos_encoding"] = "ids_keep" not in inputs  # all patches may be those of a smaller image
        if "ids_keep" in inputs and phase.image_size not in (None, self.vision.image_size):
            inputs["grid"] = grid_of(phase, self.vision)
        return inputs

    def encoded_lengths(self, batch: Batch) -> tuple[int, int]:
        """Returns the patches encoded per image of a micro-batch, and the tokens per text, padding included.

        Tokens are 0 where no text is read; of packed texts, (R, W) tokens are shared among the B texts.
        """
        patches = batch["ids_keep"] if "ids_keep" in batch else batch["patches"]
        if not self.objective.contrasts:
            return patches.shape[1], 0
        return patches.shape[1], round(batch["input_ids"].numel() / len(patches))
