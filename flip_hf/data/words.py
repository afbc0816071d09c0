"""Finds the words of tokenized texts: of word pieces, of byte pairs, and of pieces by SentencePiece.

A fast tokenizer knows the words that it split a text into before it cut them into pieces. Some of those that come from
SentencePiece do not split: their pieces show where a word begins. Scripts without spaces, such as Chinese and Thai,
have whole sentences between two spaces: of a run of many tokens, each is taken as a word.

Letters: B texts, T tokens.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

Word = tuple[int, ...]  # the ids of its tokens

_SPACE = "\u2581"  # SentencePiece writes it for the space before a word
_NO_WORD = -1
# Words of more tokens are runs of a script without spaces, or no words at all.
MAX_WORD_TOKENS = 16


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
        lengths = _lengths(begins[is_text])  # no word goes on in the next text
        begins[is_text] |= (lengths > MAX_WORD_TOKENS).repeat(lengths)
        starts = np.flatnonzero(begins[is_text])
        lengths = _lengths(begins[is_text])
        flat = ids[is_text].tolist()
        return Words(
            begins=begins,
            special=words == _NO_WORD,
            found=[tuple(flat[start : start + length]) for start, length in zip(starts, lengths, strict=True)],
            lengths=lengths,
            spoken=(words != _NO_WORD)[is_text][starts],
        )


def _lengths(begins: np.ndarray) -> np.ndarray:
    """Returns the number of tokens of each word of tokens (N,), of which those that begin one are marked."""
    return np.diff(np.append(np.flatnonzero(begins), len(begins)))
