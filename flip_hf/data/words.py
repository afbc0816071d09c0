"""Find the words of tokenized texts: of word pieces, of byte pairs, and of pieces by SentencePiece.

A fast tokenizer knows the words that it split a text into before it cut them into pieces. Some of those that come from
SentencePiece do not split: their pieces show where a word begins.

Letters: B texts, T tokens.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

Word = tuple[int, ...]  # the ids of its tokens

_SPACE = "\u2581"  # SentencePiece writes it for the space before a word
_NO_WORD = -1


@dataclass(frozen=True)
class Words:
    """The words of a batch of texts.

    Attributes:
        begins: (B, T), bool, the tokens that begin a word; each special token and each padded one does.
        special: (B, T), bool, the tokens that belong to no word, padding among them.
        found: the words and special tokens, text after text, without padding.
        lengths: the number of tokens of each.
        spoken: for each, whether it is a word.
    """

    begins: np.ndarray
    special: np.ndarray
    found: list[Word]
    lengths: np.ndarray
    spoken: np.ndarray


class WordFinder:
    """Finds the words of texts that a fast tokenizer has encoded.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._begins = np.array([(piece or "").startswith(_SPACE) for piece in pieces])

    def __call__(self, encoded: BatchEncoding) -> Words:
        """Returns the words of texts that were padded on the right to one length."""
        ids = np.asarray(encoded["input_ids"])
        is_text = np.asarray(encoded["attention_mask"]).astype(bool)
        numbers = itertools.chain.from_iterable(encoding.word_ids for encoding in encoded.encodings or ())
        words = np.array([_NO_WORD if number is None else number for number in numbers]).reshape(ids.shape)
        begins = self._begins[ids] | (words == _NO_WORD)
        begins[:, :1] = True
        begins[:, 1:] |= words[:, 1:] != words[:, :-1]
        starts = np.flatnonzero(begins[is_text])  # no word goes on in the next text
        flat = ids[is_text].tolist()
        ends = [*starts[1:].tolist(), len(flat)]
        return Words(
            begins=begins,
            special=words == _NO_WORD,
            found=[tuple(flat[start:end]) for start, end in zip(starts.tolist(), ends, strict=True)],
            lengths=np.diff(np.append(starts, len(flat))),
            spoken=(words != _NO_WORD)[is_text][starts],
        )
