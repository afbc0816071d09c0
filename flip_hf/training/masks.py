"""Text masks, and the check that a run's masks fit its model; image masks are in patches.py."""

from collections.abc import Mapping

import torch

from flip_hf.modeling import FlipTextConfig
from flip_hf.modeling.masking_flip import mask_text, num_kept, pooled_token
from flip_hf.training.arguments import ModelArguments
from flip_hf.training.phases import Phase


def kept_tokens(context: int, text_mask_ratio: float) -> int:
    """Returns the number of tokens kept of a text, counted as padded to the context (the paper: 16 of 32)."""
    return int(context * (1 - text_mask_ratio))


def check_masks(options: ModelArguments, text_config: FlipTextConfig, num_patches: int) -> None:
    """Checks the masks against the model.

    Raises:
        ValueError: a ratio keeps too little of this model's images or texts, or text masking does not fit the model.
    """
    for ratio in (options.mask_ratio, options.mask_ratio_end or 0):
        num_kept(num_patches, ratio)
    check_text_mask("--text_mask_ratio", options.text_mask_ratio, text_config)


def check_text_mask(option: str, ratio: float, text_config: FlipTextConfig, text_length: int | None = None) -> None:
    """Checks a text mask ratio, named as `option`, against the model and the length that texts are cut to.

    Raises:
        ValueError: it keeps too little of a text, or text masking does not fit the model.
    """
    if ratio == 0:
        return
    if text_config.attend_to_padding:
        raise ValueError(
            f"{option} has no effect on a model that pads its texts again (attend_to_padding in its text "
            "configuration). Leave it at 0."
        )
    context = text_length or text_config.max_position_embeddings
    if kept_tokens(context, ratio) < 2:
        raise ValueError(f"{option} {ratio} keeps fewer than 2 of the context's {context} tokens; use a lower one.")


class TextMasks:
    """Draws the masks of a run's texts.

    Args:
        strategy: one of `TEXT_MASK_STRATEGIES`.
        text_config: the model's text configuration.
    """

    def __init__(self, strategy: str, text_config: FlipTextConfig):
        self.strategy = strategy
        self.text = text_config

    def __call__(self, batch: Mapping[str, torch.Tensor], phase: Phase) -> dict[str, torch.Tensor]:
        """Draws the replacements of a batch's `input_ids` and `attention_mask` (B, T), on their device."""
        if phase.text_mask_ratio == 0:
            return {}
        input_ids = batch["input_ids"]
        pooling_type = self.text.pooling_type
        return mask_text(
            input_ids,
            batch["attention_mask"],
            strategy=self.strategy,
            kept=self.kept_tokens(phase),
            context=self._context(phase),
            pooled=None if pooling_type == "mean" else pooled_token(input_ids, pooling_type, self.text.eos_token_id),
        )

    def kept_tokens(self, phase: Phase) -> int:
        """Returns the number of tokens kept of each text in a phase that masks texts."""
        return kept_tokens(self._context(phase), phase.text_mask_ratio)

    def _context(self, phase: Phase) -> int:
        return phase.text_length or self.text.max_position_embeddings
