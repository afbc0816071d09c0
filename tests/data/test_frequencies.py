"""How frequent words are in the training captions: counted, mixed, bounded, and kept in a file."""

import json
import re
from collections import Counter
from dataclasses import replace

import datasets
import pytest

from flip_hf.data import frequencies
from flip_hf.data.captions import Prompts
from flip_hf.data.frequencies import (
    FILE,
    WordFrequencies,
    count_words,
    keep_weight,
    read_frequencies,
    write_frequencies,
)
from flip_hf.data.sources import open_source
from tests.helpers.pairs import write_tar
from tests.helpers.tokenizers import KINDS, make_tokenizer

PICTURE = b"never opened"


def captions_of(samples, first: int, last: int) -> list[str]:
    return [re.sub(r"[^a-z ]", "", caption.decode().lower()).strip() for _, _, caption in samples[first:last]]


def source_of(path, captions: list[str], name: str):
    """Tar shards of 16 pairs; no picture is one."""
    (path / name).mkdir()
    for start in range(0, len(captions), 16):
        rows = [(f"{i:04d}", PICTURE, text.encode()) for i, text in enumerate(captions[start : start + 16])]
        write_tar(path / name / f"{start:04d}.tar", rows)
    return replace(open_source(str(path / name)), name=name)


def spelt(counted, tokenizer) -> dict[str, float]:
    pieces = {ids: tokenizer.convert_ids_to_tokens(list(ids)) for ids in counted.frequencies}
    return {"".join(re.sub("^##|</w>$|[▁Ġ]", "", p) for p in pieces[ids]): f for ids, f in counted.frequencies.items()}


def shares(captions: list[str]) -> dict[str, float]:
    words = Counter(" ".join(captions).split())
    return {word: count / words.total() for word, count in words.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_frequency_is_the_share_of_a_word_among_all(kind, samples, tmp_path):
    captions = captions_of(samples, 0, 64)
    tokenizer = make_tokenizer(kind, captions)
    counted = count_words([source_of(tmp_path, captions, "a")], None, tokenizer)
    assert spelt(counted, tokenizer) == pytest.approx(shares(captions))
    total = sum(len(caption.split()) for caption in captions)
    assert counted.unseen == pytest.approx(1 / total)
    assert counted.in_words().endswith(f"of {total:,} words in 64 captions")
    frequencies = list(counted.frequencies.values())
    assert frequencies == sorted(frequencies, reverse=True)


def test_sources_count_by_their_weights(samples, tmp_path):
    parts = [captions_of(samples, 0, 48), captions_of(samples, 48, 112)]
    tokenizer = make_tokenizer("wordpiece", parts[0] + parts[1])
    sources = [source_of(tmp_path, captions, name) for captions, name in zip(parts, "ab", strict=True)]
    counted = count_words(sources, [3, 1], tokenizer)
    one, other = map(shares, parts)
    expected = {word: 0.75 * one.get(word, 0) + 0.25 * other.get(word, 0) for word in one | other}
    assert spelt(counted, tokenizer) == pytest.approx(expected)
    assert counted.mixture() == {"a": 0.75, "b": 0.25}
    words = [sum(len(caption.split()) for caption in part) for part in parts]
    assert counted.unseen == pytest.approx(min(0.75 / words[0], 0.25 / words[1]))


def test_words_are_counted_within_bounds(samples, tmp_path, monkeypatch):
    captions = captions_of(samples, 0, 64)
    tokenizer = make_tokenizer("wordpiece", captions)
    sources = [source_of(tmp_path, captions, name) for name in "ab"]
    counted = count_words(sources, [3, 1], tokenizer, max_captions=40)
    assert [source.captions for source in counted.sources] == [30, 10]
    monkeypatch.setattr(frequencies, "MAX_WORDS", 3)
    fewer = count_words(sources, [3, 1], tokenizer, max_captions=40)
    assert list(fewer.frequencies.items()) == list(counted.frequencies.items())[:3]
    monkeypatch.setattr(frequencies, "MAX_READ_BYTES", 400)
    assert sum(source.captions for source in count_words(sources, None, tokenizer).sources) < 20
    monkeypatch.setattr(frequencies, "MAX_SECONDS", 0)
    assert [source.captions for source in count_words(sources, None, tokenizer).sources] == [1, 1]


def test_captions_are_cut_as_in_training_and_held_out_ones_are_not_read(samples, tmp_path):
    captions = ["one two three four five", "one six"] * 40
    tokenizer = make_tokenizer("wordpiece", [*captions, "seven"], context_length=3, vocab_size=400)
    (tmp_path / "a").mkdir()
    write_tar(tmp_path / "a" / "0.tar", [(f"{i:03d}", samples[i][1], t.encode()) for i, t in enumerate(captions)])
    source = open_source(str(tmp_path / "a"))
    assert set(spelt(count_words([source], None, tokenizer), tokenizer)) == {"one", "two", "three", "six"}
    source = replace(source, holdout=0.4)
    rows = len(list(source.rows()))
    assert rows < 70 and count_words([source], None, tokenizer).sources[0].captions == rows


def test_captions_made_of_labels_are_counted_as_they_are_drawn(tmp_path):
    rows = {"image": [PICTURE] * 300, "label": [0, 1, 2] * 100}
    features = datasets.Features(
        image=datasets.Value("binary"), label=datasets.ClassLabel(names=["red", "green", "blue"])
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    source = open_source(str(tmp_path / "x.parquet"), target_column="label", prompts=Prompts(("a {}", "the {} one")))
    tokenizer = make_tokenizer("wordpiece", ["a red the green one blue"], vocab_size=400)
    found = spelt(count_words([source], None, tokenizer), tokenizer)
    assert found["red"] == found["green"] == found["blue"]
    assert found["the"] == found["one"] and found["a"] + found["the"] == pytest.approx(3 * found["red"])
    assert 0.4 < found["the"] / (found["a"] + found["the"]) < 0.6


def test_pictures_are_not_read(tmp_path):
    rows = {"image": [PICTURE] * 3, "text": ["a b", "a", "b c"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "x.parquet"))
    source = open_source(str(tmp_path / "x.parquet"))
    assert all("image" not in row for row in source.without_images().rows())
    assert len(list(source.without_images().rows())) == 3
    assert "image" in next(iter(replace(source, holdout=0.5).without_images().rows()))


def test_frequencies_come_back_from_their_file(samples, tmp_path):
    captions = captions_of(samples, 0, 32)
    tokenizer = make_tokenizer("unigram", captions)
    counted = count_words([source_of(tmp_path, captions, "a")], None, tokenizer)
    write_frequencies(counted, tokenizer, tmp_path)
    assert read_frequencies(tmp_path) == counted
    described = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    assert described["words"][0][:2] == ["▁a", counted.frequencies[tuple(described["words"][0][2:])]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "it has format 2"),
        ({"unseen": 0}, "0 is not a frequency"),
        ({"unseen": float("nan")}, "nan is not a frequency"),
        ({"words": [["a", 0.5, "x"]]}, "'x' is not the id of a token"),
        ({"words": [["a"]]}, "not enough values"),
        ({"words": [["a", 0.5]]}, "not enough values"),
        ({"words": [["a", 0.5, True]]}, "True is not the id"),
        ({"words": [["a", "0.5", 5]]}, "'0.5' is not a frequency"),
        ({"sources": [{"name": "a"}]}, "missing 3 required"),
        ({"sources": [{"name": "a", "weight": [], "captions": 1, "words": 1}]}, "must be a string or a real number"),
        ({"sources": 5}, "not iterable"),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(change, message, tmp_path):
    whole = {"format": 1, "unseen": 0.1, "sources": [], "words": [["a", 0.5, 5]]}
    (tmp_path / FILE).write_text(json.dumps(whole))
    assert read_frequencies(tmp_path).frequencies == {(5,): 0.5}
    (tmp_path / FILE).write_text(json.dumps({**whole, **change}))
    with pytest.raises(ValueError, match=f"{FILE} with the word frequencies of the run cannot be read: .*{message}"):
        read_frequencies(tmp_path)


def test_what_is_written_can_be_read(tmp_path, monkeypatch):
    tokenizer = make_tokenizer("wordpiece", ["a red circle", "a blue square"] * 5)
    monkeypatch.setattr(frequencies, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(frequencies, "_ABOUT_BYTES", 200)
    counted = WordFrequencies({(2, number): 1 / (2 + number) for number in range(200)}, 1e-3, ())
    write_frequencies(counted, tokenizer, tmp_path)
    found = read_frequencies(tmp_path).frequencies
    assert 10 < len(found) < 200 and found == dict(list(counted.frequencies.items())[: len(found)])


def test_a_file_that_is_no_table_or_too_large_is_refused(tmp_path, monkeypatch):
    for text in ("[" * 100_000, "[]", "{", "\udcff"):
        (tmp_path / FILE).write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ValueError, match="cannot be read"):
            read_frequencies(tmp_path)
    monkeypatch.setattr(frequencies, "MAX_FILE_BYTES", 3)
    (tmp_path / FILE).write_text("{}  ")
    with pytest.raises(ValueError, match="more than 3 bytes"):
        read_frequencies(tmp_path)


def test_a_weight_is_the_probability_to_stay_of_word2vec():
    assert keep_weight(1e-2) == pytest.approx(0.01) and keep_weight(4e-6) == pytest.approx(0.5)
    assert keep_weight(1e-6) == keep_weight(1e-9) == 1
