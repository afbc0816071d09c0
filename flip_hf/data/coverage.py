"""Measures what a tokenizer loses of captions: unknown words, texts that become identical, and truncated ends."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# Above this fraction of captions, the report says what to do about it.
WORTH_A_WARNING = 0.01


@dataclass(frozen=True)
class Coverage:
    """Counts of what a tokenizer loses of captions.

    Attributes:
        captions: number of captions read.
        unknown: those with an unknown word.
        confused: those with the same tokens as a different caption, ignoring case and white space.
        cut: those longer than the context.
    """

    captions: int
    unknown: int
    confused: int
    cut: int

    def __str__(self) -> str:
        text = (
            f"of {self.captions:,} captions, {self.unknown:,} contain an unknown word, {self.confused:,} have the same "
            f"tokens as a different one, {self.cut:,} are longer than the context"
        )
        if max(self.unknown, self.confused) <= WORTH_A_WARNING * self.captions:
            return text
        return f"{text}. The model cannot learn these differences; a --tokenizer made for these captions may keep them"


def measure_coverage(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Coverage:
    """Measures what a tokenizer loses of captions as the model will see them: truncated to the context.

    Args:
        tokenizer: its `model_max_length` is the context, in tokens.
        captions: one or more.
    """
    encoded = tokenizer(list(captions), truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    readings: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for caption, ids in zip(captions, encoded, strict=True):
        readings[tuple(ids[:room])].add(_without_case(caption))
    return Coverage(
        captions=len(captions),
        unknown=sum(tokenizer.unk_token_id in ids for ids in encoded),
        confused=sum(len(texts) for texts in readings.values() if len(texts) > 1),
        cut=sum(len(ids) > room for ids in encoded),
    )


def _without_case(caption: str) -> str:
    return " ".join(unicodedata.normalize("NFC", caption).lower().split())
