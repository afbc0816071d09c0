"""Packed texts: several to a row without padding, each attending only to itself.

Padded to the longest, half of a batch of captions is padding. Packed, the text tower computes almost only words, and
every text's feature is the same as if it were encoded alone.

Letters: B texts, T their padded length, R rows, W places of a row: the model's context.
"""

import hashlib

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from flip_hf.modeling import FlipTextConfig
from flip_hf.modeling.masking_flip import pooled_token
from flip_hf.training.masks import TextMasks

# The number of rows is a multiple of batch / 64, so that batches have few shapes, whose memory is used again.
STEPS = 64
# Of batches whose shapes are to be fewest, as each is compiled and its graph may be recorded: of batch / 32, and of 8.
FEWEST_STEPS = 32
FEWEST_ROWS = 8

CAPTION_IDS = "caption_ids"  # of a batch: equal where captions are, for a loss that counts those as positives


def can_pack(text_config: FlipTextConfig) -> bool:
    """Returns whether a run may pack its texts.

    It may not where the model attends to padding or averages over tokens; and only PyTorch's own attention takes the
    mask as it is.
    """
    return (
        not text_config.attend_to_padding
        and text_config.pooling_type != "mean"
        and text_config._attn_implementation == "sdpa"
    )


def _place(lengths: list[int], width: int) -> tuple[list[int], int]:
    """Returns the start of each text in rows of `width` places, counted through all rows, and the number of rows.

    Longest first, each text goes into the row with the least space left that holds it (best-fit decreasing).
    """
    starts = [0] * len(lengths)
    num_rows = 0
    by_places_left: list[list[int]] = [[] for _ in range(width + 1)]
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        length = lengths[text]
        left = next((left for left in range(length, width + 1) if by_places_left[left]), None)
        if left is None:
            row = num_rows
            left = width
            num_rows = num_rows + 1
        else:
            row = by_places_left[left].pop()
        starts[text] = row * width + width - left
        by_places_left[left - length].append(row)
    return starts, num_rows


def padded_rows(num_rows: int, batch_size: int, fewest_shapes: bool = False) -> int:
    """Returns a number of rows that batches of this size share: the next multiple of a part of the batch."""
    step = max(FEWEST_ROWS, -(-batch_size // FEWEST_STEPS)) if fewest_shapes else -(-batch_size // STEPS)
    return -(-num_rows // step) * step


def pack_texts(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    text_config: FlipTextConfig,
    position_ids: torch.Tensor | None = None,
    fewest_shapes: bool = False,
) -> dict[str, torch.Tensor]:
    """Packs texts into rows; on the CPU.

    Args:
        input_ids, attention_mask: (B, T), padded on the right.
        text_config: the model's text configuration.
        position_ids: (B, T), rising from 0 in each text; those of whole texts, 0 to T - 1, if None.
        fewest_shapes: add rows of padding, so that batches of one size have few different R.

    Returns:
        `input_ids` (R, W); `position_ids` (R, W), which rise from 0 in every text and are 0 on padding;
        `pooled_tokens` (B), the place in the flattened rows of each text's pooled token.
    """
    batch_size = len(input_ids)
    width = text_config.max_position_embeddings
    pooled = pooled_token(input_ids, text_config.pooling_type, text_config.eos_token_id)  # (B)
    lengths = torch.maximum(attention_mask.sum(dim=1), pooled + 1)  # (B), an empty text keeps its pooled token
    starts, num_rows = _place(lengths.tolist(), width)
    num_rows = padded_rows(num_rows, batch_size, fewest_shapes)

    starts = torch.tensor(starts)  # (B)
    positions = torch.arange(input_ids.shape[1])  # (T)
    is_text = positions < lengths[:, None]  # (B, T)
    places = (starts[:, None] + positions)[is_text]  # (all tokens)
    packed_ids = input_ids.new_full((num_rows * width,), text_config.pad_token_id or 0)
    packed_ids[places] = input_ids[is_text]
    packed_positions = torch.zeros_like(packed_ids)
    packed_positions[places] = (positions.expand(is_text.shape) if position_ids is None else position_ids)[is_text]
    return {
        "input_ids": packed_ids.view(num_rows, width),
        "position_ids": packed_positions.view(num_rows, width),
        "pooled_tokens": starts + pooled,
    }


def packed_attention_mask(position_ids: torch.Tensor, causal: bool) -> torch.Tensor:
    """Makes the mask (R, 1, W, W): each token sees its own text, in a causal model only the earlier tokens."""
    texts = (position_ids == 0).cumsum(dim=1)  # (R, W), position 0 begins a text
    mask = texts[:, :, None] == texts[:, None, :]  # (R, W, W)
    return (mask.tril() if causal else mask)[:, None]


def caption_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns integers (B,) that are equal where the tokens of captions (B, T) are, in all processes.

    They are hashes of 64 bits: among the 65,536 captions of a large batch, two that differ have the same one with a
    probability of 1e-10.
    """
    hashes = []
    for tokens, length in zip(input_ids.numpy(), attention_mask.sum(dim=1).tolist(), strict=True):
        digest = hashlib.blake2b(tokens[:length].tobytes(), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little", signed=True))
    return torch.tensor(hashes)


class Tokenize:
    """Turns captions into arguments of the text tower, masked and packed as the run does it, in the loader workers.

    Args:
        tokenizer: the run's tokenizer, with the length to truncate at.
        text_config: the model's text configuration.
        masks: masks the texts of batches that come with random numbers; None where none does.
        compares_captions: whether the loss needs to know which captions are equal.
        fewest_shapes: pad so that batches have as few different shapes as may be; results are the same.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_config: FlipTextConfig,
        masks: TextMasks | None = None,
        compares_captions: bool = False,
        fewest_shapes: bool = False,
    ):
        self.tokenizer = tokenizer
        self.text_config = text_config
        self.masks = masks
        self.compares_captions = compares_captions
        self.fewest_shapes = fewest_shapes
        self.packs = can_pack(text_config)

    def __call__(
        self, captions: list[str], text_length: int | None = None, noise: torch.Tensor | None = None, kept: int = 0
    ) -> dict[str, torch.Tensor]:
        """Returns [`pack_texts`]' output, or `input_ids` and `attention_mask` (B, T), padded to the longest.

        For the fewest shapes, texts that are not packed are padded to the length that they are cut to.

        Masked texts are shorter and have `position_ids`, too. Where the loss compares captions, their `caption_ids`
        (B,) come with them, those of the texts before they are masked: equal for texts that are cut to the same tokens.

        Args:
            captions: B captions.
            text_length: tokens that they are cut to, the tokenizer's own special ones included; its
                `model_max_length` if None.
            noise: (B, context) random numbers in [0, 1) that decide what is masked; None leaves the texts whole.
            kept: tokens kept of each text that is masked.
        """
        # SigLIP's tokenizers give no mask unless they are asked for one.
        padding = "max_length" if self.fewest_shapes and not self.packs else True
        options = {"padding": padding, "return_attention_mask": True}
        encoded = self.tokenizer(captions, truncation=True, max_length=text_length, **options)
        # The tokenizer itself would take three times as long to make tensors of its lists.
        texts = {name: torch.from_numpy(np.array(encoded[name])) for name in ("input_ids", "attention_mask")}
        ids = {CAPTION_IDS: caption_ids(**texts)} if self.compares_captions else {}
        if self.masks is not None and noise is not None:
            encoded.update(texts)
            texts = self.masks(encoded, noise, kept)
        if self.packs:
            texts = pack_texts(**texts, text_config=self.text_config, fewest_shapes=self.fewest_shapes)
        return {**texts, **ids}
