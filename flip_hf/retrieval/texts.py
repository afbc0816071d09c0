"""Texts of which a tokenizer makes nothing, which no model can encode."""

from collections.abc import Sequence

from flip_hf.evaluation.encoder import Encoder


def have_tokens(encoder: Encoder, texts: Sequence[str]) -> list[bool]:
    """Returns for each text whether the tokenizer makes anything of it."""
    mask = encoder.text_inputs(texts).get("attention_mask")
    return [True] * len(texts) if mask is None else (mask.sum(dim=1) > 0).tolist()
