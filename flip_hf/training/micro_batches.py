"""The micro-batches of a step: moved to the device, masked, encoded, and their gradients accumulated."""

from typing import Any

from torch import nn

from flip_hf.modeling import FlipConfig
from flip_hf.training.arguments import Arguments
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import Encoded
from flip_hf.training.gradient_cache import StepLoss, accumulated_backward, cached_backward
from flip_hf.training.masks import TextMasks
from flip_hf.training.optimization import Phase
from flip_hf.training.patches import visible_and_target
from flip_hf.training.reconstructions import Grid


class MicroBatches:
    """Computes loss and gradients of a step from its micro-batches.

    Args:
        arguments: the run's arguments.
        distribution: the prepared model.
        config: configuration of its FlipModel.
        normalize: turns uint8 patches into the model's inputs.
        grid: gets the images of the run's first batch, where patches are reconstructed.
    """

    def __init__(
        self, arguments: Arguments, distribution: Distribution, config: FlipConfig, normalize: nn.Module, grid: Grid
    ):
        self.objective = arguments.objective
        self.distribution = distribution
        self.device = distribution.accelerator.device
        self.patch_size = config.vision_config.patch_size  # pyright: ignore
        self.text_masks = TextMasks(arguments.model.text_mask_strategy, config.get_text_config())
        self.normalize = normalize
        self.grid = grid

    def backward(self, batches: list[dict[str, Any]], phase: Phase) -> tuple[StepLoss, dict[str, Any]]:
        """Accumulates the gradients of a step's loss.

        Batches are prepared one at a time, so that only one is on the device; both passes of a contrast draw the same.

        Returns:
            The loss, and `logit_scale`, `kept_patches` and `text_tokens` of the last batch.
        """

        def encode(batch: dict[str, Any]) -> Encoded:
            return self._encode(self._prepare(batch, phase))

        def embed(batch: dict[str, Any]) -> Encoded:
            return self._encode({**self._prepare(batch, phase), "target_patches": None})

        backward = self.distribution.backward
        no_sync = self.distribution.no_sync
        if self.objective.contrasts:
            weight = self.objective.reconstruction_weight
            loss = cached_backward(
                encode, batches, backward, no_sync, self.device, embed=embed, reconstruction_weight=weight
            )
        else:
            loss = accumulated_backward(encode, batches, backward, no_sync)
        return loss, self._seen

    def _prepare(self, batch: dict[str, Any], phase: Phase) -> dict[str, Any]:
        """Moves a batch to the device, normalises its patches there and masks its texts."""
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        batch["patches"] = self.normalize(batch["patches"])
        if self.objective.reconstructs:
            batch |= visible_and_target(batch["patches"], batch["ids_keep"])
            self.grid.see(batch["target_patches"], self.patch_size)
        batch["interpolate_pos_encoding"] = "ids_keep" not in batch  # all patches may be those of a smaller image
        return {**batch, **self.text_masks(batch, phase)} if self.objective.contrasts else batch

    def _encode(self, batch: dict[str, Any]) -> Encoded:
        encoded = self.distribution.model(**batch)
        count, kept = batch["patches"].shape[:2]
        text_tokens = round(batch["input_ids"].numel() / count) if self.objective.contrasts else 0
        scale = None if encoded.logit_scale is None else encoded.logit_scale.detach()
        self._seen = {"logit_scale": scale, "kept_patches": kept, "text_tokens": text_tokens}
        return encoded
