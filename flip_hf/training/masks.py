"""Text masks, and the check that a run's masks fit its model; image masks are in patches.py."""

from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from flip_hf.data.frequencies import WordFrequencies, keep_weight
from flip_hf.data.words import WordFinder
from flip_hf.modeling import FlipTextConfig
from flip_hf.modeling.masking_flip import mask_text, num_kept, pooled_token
from flip_hf.training.arguments import ModelArguments


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
    """Masks the texts of a run, from random numbers that are drawn with its samples.

    Args:
        options: the ratio and the strategy.
        text_config: the model's text configuration.
        tokenizer: the run's tokenizer.
        frequencies: those of the words in the training captions; for the strategy `frequency`.
    """

    def __init__(
        self,
        options: ModelArguments,
        text_config: FlipTextConfig,
        tokenizer: PreTrainedTokenizerBase,
        frequencies: WordFrequencies | None = None,
    ):
        self.strategy = options.text_mask_strategy
        self.text = text_config
        self._words = None if frequencies is None else WordWeights(tokenizer, frequencies)

    def __call__(self, encoded: BatchEncoding, noise: torch.Tensor, kept: int) -> dict[str, torch.Tensor]:
        """Masks the tokenizer's texts (B, T) by random numbers (B, context); returns what [`mask_text`] does."""
        input_ids: Any = encoded["input_ids"]
        attention_mask: Any = encoded["attention_mask"]
        pooling_type = self.text.pooling_type
        return mask_text(
            input_ids,
            attention_mask,
            noise,
            strategy=self.strategy,
            kept=kept,
            pooled=None if pooling_type == "mean" else pooled_token(input_ids, pooling_type, self.text.eos_token_id),
            **({} if self._words is None else self._words(encoded)),
        )


class WordWeights:
    """Weighs the words of texts by how rare they are; see [`keep_weight`].

    Args:
        tokenizer: the run's tokenizer.
        frequencies: those of the words in the training captions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, frequencies: WordFrequencies):
        self._find = WordFinder(tokenizer)
        self._weights = {word: keep_weight(frequency) for word, frequency in frequencies.frequencies.items()}
        self._unseen = keep_weight(frequencies.unseen)

    def __call__(self, encoded: BatchEncoding) -> dict[str, torch.Tensor]:
        """Returns `word_begins` and `word_weights` (B, T); special tokens, no words, are kept before any."""
        words = self._find(encoded)
        weights = np.array([self._weights.get(word, self._unseen) for word in words.found], dtype=np.float32)
        by_token = np.full(words.begins.shape, np.inf, dtype=np.float32)
        by_token[np.asarray(encoded["attention_mask"]) != 0] = weights.repeat(words.lengths)
        by_token[words.special] = np.inf
        return {"word_begins": torch.from_numpy(words.begins), "word_weights": torch.from_numpy(by_token)}
