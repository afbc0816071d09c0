"""What of each batch a model gets to see: patches, smaller images, shorter texts."""

import math
from typing import Any

import torch

from flip_hf.modeling import FlipConfig
from flip_hf.modeling.masking_flip import draw_mask, mask_text, num_kept, pooled_token
from flip_hf.training.arguments import ModelArguments
from flip_hf.training.optimization import Phase


def resized_side(num_patches: int, mask_ratio: float) -> int:
    """Patches on a side of the smaller image that has the most nearly as many as a mask would keep."""
    return max(1, round(math.sqrt(num_kept(num_patches, mask_ratio))))


def resize_images(pixel_values: torch.Tensor, side: int) -> torch.Tensor:
    """(B, 3, S, S) to (B, 3, side, side): antialiased bilinear, as CLIPA's input pipeline."""
    return torch.nn.functional.interpolate(pixel_values, (side, side), mode="bilinear", antialias=True)


def kept_tokens(context: int, text_mask_ratio: float) -> int:
    """Number of tokens kept of a text, which counts as padded to the context (the paper: 16 of 32)."""
    return int(context * (1 - text_mask_ratio))


def check_masks(options: ModelArguments, text_config: Any, num_patches: int) -> None:
    """Checks the masks against the model that they are for.

    Raises:
        ValueError: a ratio keeps too little of this model's images or texts, or text masking does not fit the model.
    """
    for ratio in (options.mask_ratio, options.mask_ratio_end or 0):
        num_kept(num_patches, ratio)
    if options.text_mask_ratio == 0:
        return
    if text_config.attend_to_padding:
        raise ValueError(
            "--text_mask_ratio shortens no text of a model that pads it again (attend_to_padding in its text "
            "configuration). Leave it at 0."
        )
    context = text_config.max_position_embeddings
    if kept_tokens(context, options.text_mask_ratio) < 2:
        raise ValueError(
            f"--text_mask_ratio {options.text_mask_ratio} keeps fewer than 2 of the context's {context} tokens; use a "
            "lower one."
        )


class Masks:
    """Draws the masks of a run's batches, each once: both passes of gradient caching must see the same.

    Args:
        options: names the strategies.
        config: the model's.
    """

    def __init__(self, options: ModelArguments, config: FlipConfig):
        self.options = options
        self.vision: Any = config.vision_config
        self.text = config.get_text_config()

    def __call__(self, batch: dict[str, Any], phase: Phase, samples: int) -> dict[str, Any]:
        """Replaces in a batch what is masked.

        Args:
            batch: `pixel_values` (B, 3, S, S), float; `input_ids` and `attention_mask` (B, T); all on their device.
            phase: says how much is masked.
            samples: samples seen in the whole run before this batch's step.

        Returns:
            Arguments of `FlipModel`, which leave nothing for it to draw.
        """
        return {**batch, **self._images(batch, phase.mask_ratio_at(samples)), **self._texts(batch, phase)}

    def _images(self, batch: dict[str, Any], mask_ratio: float) -> dict[str, Any]:
        pixel_values = batch["pixel_values"]
        if mask_ratio == 0:
            return {"mask_ratio": 0}
        if self.options.mask_strategy != "resize":
            side = self.vision.image_size // self.vision.patch_size
            size = pixel_values.shape[0]
            strategy = self.options.mask_strategy
            return {"ids_keep": draw_mask(strategy, size, (side, side), mask_ratio, pixel_values.device)}
        side = resized_side(self.vision.num_patches, mask_ratio) * self.vision.patch_size
        # Interpolated positions say where in the image a patch lies, on the small one as on the whole ones that follow.
        # CLIPA computes sin-cos anew from whole numbers: the small image then has the positions of a corner.
        return {
            "pixel_values": resize_images(pixel_values, side),
            "interpolate_pos_encoding": True,
            "mask_ratio": 0,
        }

    def _texts(self, batch: dict[str, Any], phase: Phase) -> dict[str, torch.Tensor]:
        if phase.text_mask_ratio == 0:
            return {}
        input_ids, pooling_type = batch["input_ids"], self.text.pooling_type
        context = self.text.max_position_embeddings
        return mask_text(
            input_ids,
            batch["attention_mask"],
            strategy=self.options.text_mask_strategy,
            kept=kept_tokens(context, phase.text_mask_ratio),
            context=context,
            pooled=None if pooling_type == "mean" else pooled_token(input_ids, pooling_type, self.text.eos_token_id),
        )
