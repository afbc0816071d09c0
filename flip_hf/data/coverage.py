"""The losses of a tokenizer on captions: unknown words, texts that it reads alike, and ends beyond the context."""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# Beyond this share of captions a person is told what to do about it.
WORTH_A_WARNING = 0.01


@dataclass(frozen=True)
class Coverage:
    """Counts of what a tokenizer loses of captions.

    Attributes:
        captions: how many were read.
        unknown: those of them with an unknown word.
        confused: the different ones that read like another. Case and white space make no difference.
        cut: those that are longer than the context.
    """

    captions: int
    unknown: int
    confused: int
    cut: int

    def __str__(self) -> str:
        text = (
            f"of {self.captions:,} captions, {self.unknown:,} hold an unknown word, {self.confused:,} read like a "
            f"different one, {self.cut:,} are longer than the context"
        )
        if max(self.unknown, self.confused) <= WORTH_A_WARNING * self.captions:
            return text
        return f"{text}. What is unknown or alike is not learned: a --tokenizer for these captions may keep it"


def measure_coverage(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Coverage:
    """Measures what a tokenizer loses of captions, as the model will see them: cut at the context.

    Args:
        tokenizer: knows the context in tokens.
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
