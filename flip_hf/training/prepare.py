"""What is done to a micro-batch on the device, between the loader and the model."""

import torch
from torch import nn

from flip_hf.modeling import FlipConfig
from flip_hf.training.arguments import ModelArguments, ObjectiveArguments
from flip_hf.training.masks import TextMasks
from flip_hf.training.patches import grid_of, visible_and_target
from flip_hf.training.phases import Phase
from flip_hf.training.step import Batch, Inputs, without_caption_ids


class PrepareBatch:
    """Moves a micro-batch to the device, normalises its patches there and masks its texts.

    Args:
        model: which texts are masked, and how.
        objective: what the batch is trained on.
        config: configuration of the FlipModel.
        normalize: turns uint8 patches into the model's inputs.
        device: the model's device.
    """

    def __init__(
        self,
        model: ModelArguments,
        objective: ObjectiveArguments,
        config: FlipConfig,
        normalize: nn.Module,
        device: torch.device,
    ):
        self.objective = objective
        self.vision = config.vision_config
        self.text_masks = TextMasks(model.text_mask_strategy, config.get_text_config())
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
        if self.objective.contrasts:
            inputs |= self.text_masks(inputs, phase)
        return inputs

    def encoded_lengths(self, batch: Batch, phase: Phase) -> tuple[int, int]:
        """Returns the patches encoded per image of a micro-batch, and the tokens per text, padding included.

        Tokens are 0 where no text is read; of packed texts, (R, W) tokens are shared among the B texts.
        """
        patches = batch["ids_keep"] if "ids_keep" in batch else batch["patches"]
        if not self.objective.contrasts:
            return patches.shape[1], 0
        if phase.text_mask_ratio > 0:
            return patches.shape[1], self.text_masks.kept_tokens(phase)
        return patches.shape[1], round(batch["input_ids"].numel() / len(patches))
