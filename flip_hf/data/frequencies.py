"""Counts how frequent words are in the training captions, once a run, and keeps that in a file.

The frequencies are those that training meets: captions are drawn as it draws them, truncated by the run's tokenizer,
and sources count by their weights. Held-out pairs are not read.

The file holds the words' ids, from which a run resumes, and beside them their pieces for people.
"""

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from flip_hf.data.reading import Reader, read_rows, row_bytes
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.sources import Source
from flip_hf.data.words import Word, WordFinder
from flip_hf.redaction import redacted

# Limits on what is counted, over all sources; a run's other processes wait for it.
MAX_CAPTIONS = 100_000
MAX_READ_BYTES = 8 * 2**30
MAX_TOKENS = 2**22
MAX_SECONDS = 300
# Words kept: of more, the most frequent ones. And bytes of the file.
MAX_WORDS = 2**18
MAX_FILE_BYTES = 64 * 2**20
# From Mikolov et al. 2013 and CLIPF, in whose released commands it is 1e-6 for CC12M: words that are rarer are all kept
# alike.
THRESHOLD = 1e-6

FILE = "word_frequencies.json"
_FORMAT = 1
_ABOUT_BYTES = 2**20  # left for what is beside the words
_SEED = 0  # of the order of shards and of drawn captions, independent of the run's seed
_AT_ONCE = 1024  # captions tokenized together


def keep_weight(frequency: float) -> float:
    """Returns the weight with which a word of this frequency is kept: its probability to stay in word2vec's sampling.

    Mikolov et al. (2013, arXiv 1310.4546) and CLIPF (Liang and Larson 2024, arXiv 2412.16148) drop a word with a
    probability of 1 - sqrt(t / f).
    """
    return min(1.0, math.sqrt(THRESHOLD / frequency))


@dataclass(frozen=True)
class Counted:
    """The captions of one source that were counted.

    Attributes:
        name: the source's name.
        weight: its share of the training samples, out of 1.
        captions, words: the number of captions and of words in them.
    """

    name: str
    weight: float
    captions: int
    words: int


@dataclass(frozen=True)
class WordFrequencies:
    """The frequencies of words in the training captions.

    Attributes:
        frequencies: the fraction of all words that each word is.
        unseen: the frequency that a word counts with which is not among them: that of a word seen once.
        sources: the data that were counted.
    """

    frequencies: dict[Word, float]
    unseen: float
    sources: tuple[Counted, ...]

    def in_words(self) -> str:
        """Describes what was counted in a sentence for the log."""
        captions = sum(source.captions for source in self.sources)
        words = sum(source.words for source in self.sources)
        return f"Word frequencies: {len(self.frequencies):,} different ones of {words:,} words in {captions:,} captions"

    def mixture(self) -> dict[str, float]:
        """Returns the weight of each source, by its name."""
        return {source.name: source.weight for source in self.sources}


def mixture_of(sources: Sequence[Source], weights: Sequence[float] | None) -> dict[str, float]:
    """Returns the share of each source in the training samples, by its name; equal ones if there are no weights."""
    given = weights or [1.0] * len(sources)
    return {source.name: weight / sum(given) for source, weight in zip(sources, given, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


def count_words(
    sources: Sequence[Source],
    weights: Sequence[float] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_captions: int = MAX_CAPTIONS,
) -> WordFrequencies:
    """Counts the words of a sample of the training captions, in a fixed shuffled order of shards and within bounds.

    Args:
        sources: the training data.
        weights: their sampling weights, in any unit; equal if None.
        tokenizer: the run's tokenizer, with the length to truncate at.
        max_captions: the number of captions counted, divided by weight.
    """
    finder = WordFinder(tokenizer)
    mixture = mixture_of(sources, weights)
    counts: list[Counter[Word]] = []
    counted: list[Counted] = []
    for source in sources:
        share = mixture[source.name]
        count: Counter[Word] = Counter()
        captions = _captions(source, share)
        read = 0
        tokens = 0
        for some in _in_pieces(captions, math.ceil(share * max_captions)):
            read += len(some)
            words = finder(tokenizer(some, padding=True, truncation=True, return_tensors="np"))
            count.update(itertools.compress(words.found, words.spoken))
            tokens += int(words.lengths.sum())
            if tokens >= share * MAX_TOKENS:
                break
        counts.append(count)
        counted.append(Counted(source.name, share, read, count.total()))
    return _combined(counts, counted)


def _combined(counts: list[Counter[Word]], counted: list[Counted]) -> WordFrequencies:
    """Combines the counts of all sources by their weights."""
    total = sum(source.weight for source in counted if source.words)
    frequencies: dict[Word, float] = {}
    unseen = 1.0
    for count, source in zip(counts, counted, strict=True):
        if source.words:
            once = source.weight / total / source.words
            unseen = min(unseen, once)
            for word, times in count.items():
                frequencies[word] = frequencies.get(word, 0.0) + times * once
    kept = sorted(frequencies.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS]
    return WordFrequencies(dict(kept), unseen, tuple(counted))


def _captions(source: Source, share: float) -> Iterator[str]:
    """Yields captions of a source as training draws them, within its share of the limits."""
    source = source.without_images()
    rows = read_rows(source.shards, Reader(0, 1), epoch=0, seed=_SEED, report=lambda reason, detail: None)
    deadline = time.monotonic() + share * MAX_SECONDS
    left = share * MAX_READ_BYTES
    for number, (_, row) in enumerate(rows):
        left -= row_bytes(row)
        if not source.is_held_out(row):
            try:
                yield source.caption(row, np.random.default_rng((_SEED, number)))
            except RefusedSample:
                pass  # counted when training meets it
        if left < 0 or time.monotonic() > deadline:
            return


def _in_pieces(captions: Iterator[str], limit: int) -> Iterator[list[str]]:
    """Yields lists of captions, in all so many."""
    captions = itertools.islice(captions, limit)
    while some := list(itertools.islice(captions, _AT_ONCE)):
        yield some


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def write_frequencies(counted: WordFrequencies, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the frequencies into a folder, the most frequent word first, one a line: its pieces, frequency and ids.

    Words that the file has no room for are left out, the rarest first.
    """
    rows = []
    for word, frequency in counted.frequencies.items():
        pieces = " ".join(map(str, tokenizer.convert_ids_to_tokens(list(word))))
        rows.append(json.dumps([pieces, frequency, *word], ensure_ascii=False))
    size = itertools.accumulate(len(row.encode()) + 2 for row in rows)
    rows = [row for row, until in zip(rows, size, strict=True) if until < MAX_FILE_BYTES - _ABOUT_BYTES]
    about = {"format": _FORMAT, "unseen": counted.unseen, "sources": [asdict(source) for source in counted.sources]}
    text = f'{json.dumps(about, ensure_ascii=False)[:-1]}, "words": [\n' + ",\n".join(rows) + "\n]}\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def read_frequencies(folder: Path) -> WordFrequencies:
    """Reads the frequencies that [`write_frequencies`] wrote into a folder.

    Raises:
        ValueError: the file is damaged or too large.
    """
    path = folder / FILE
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES:,} bytes")
        return _read(json.loads(data))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} with the word frequencies of the run cannot be read: {error!r}.") from None


def _read(found: dict[str, Any]) -> WordFrequencies:
    if found["format"] != _FORMAT:
        raise ValueError(f"it has format {found['format']}, and this version of flip_hf reads format {_FORMAT}")
    frequencies: dict[Word, float] = {}
    for _, frequency, first, *others in found["words"]:
        frequencies[tuple(map(_token, (first, *others)))] = _fraction(frequency)
    sources = (Counted(**source) for source in redacted(found["sources"]))
    read = tuple(Counted(str(s.name), float(s.weight), int(s.captions), int(s.words)) for s in sources)
    return WordFrequencies(frequencies, _fraction(found["unseen"]), read)


def _fraction(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 < value <= 1 + 1e-9:
        raise ValueError(f"{value!r} is not a frequency")
    return float(value)


def _token(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is not the id of a token")
    return value
