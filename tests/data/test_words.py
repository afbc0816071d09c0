"""The words of tokenized texts, with tokenizers of every kind."""

import re

import pytest

from flip_hf.data.words import MAX_WORD_TOKENS, WordFinder
from tests.helpers.pairs import shapes_rows
from tests.helpers.tokenizers import KINDS, make_tokenizer

MARKS = re.compile("^##|</w>$|[▁Ġ]")


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [re.sub(r"[^a-z ]", "", row["caption"].lower()) for row in shapes_rows(60)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_word_make_the_word(kind, captions):
    tokenizer = make_tokenizer(kind, captions)
    encoded = tokenizer([*captions[:20], "red", ""], padding=True, truncation=True, return_tensors="np")
    words = WordFinder(tokenizer)(encoded)
    pieces = [tokenizer.convert_ids_to_tokens(list(word)) for word in words.found]
    spelt = ["".join(MARKS.sub("", piece) for piece in of_word) for of_word in pieces]
    spoken = [word for word, is_word in zip(spelt, words.spoken, strict=True) if is_word]
    assert spoken == " ".join([*captions[:20], "red"]).split()
    assert any(len(word) > 1 for word in words.found)
    assert words.lengths.tolist() == [len(word) for word in words.found]
    assert words.begins.sum() == len(words.found) + (encoded["attention_mask"] == 0).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_padding_belong_to_no_word(kind, captions):
    tokenizer = make_tokenizer(kind, captions)
    encoded = tokenizer([*captions[:8], "red"], padding=True, truncation=True, return_tensors="np")
    words = WordFinder(tokenizer)(encoded)
    is_word = encoded["input_ids"] > (1 if kind == "wordpiece" else 3)
    assert (words.special != is_word).all() and words.begins[words.special].all()


def test_an_unknown_word_is_a_word_and_a_word_cut_short_is_its_first_pieces(captions):
    tokenizer = make_tokenizer("wordpiece", captions, context_length=4)
    encoded = tokenizer(["☃ circlecircle red"], padding=True, truncation=True, return_tensors="np")
    words = WordFinder(tokenizer)(encoded)
    assert words.lengths.tolist() == [1, 3] and words.found[0] == (tokenizer.unk_token_id,)
    assert words.spoken.tolist() == [True, True]


def test_a_long_run_without_spaces_has_a_word_for_each_token():
    text = "red あいうえおかきくけこさしすせそたちつてとなにぬねの"
    tokenizer = make_tokenizer("unigram", [text], vocab_size=40)
    encoded = tokenizer([text, "red"], padding=True, return_tensors="np")
    words = WordFinder(tokenizer)(encoded)
    assert words.begins[0].sum() > MAX_WORD_TOKENS and words.lengths.sum() == encoded["attention_mask"].sum()
    assert max(words.lengths) <= MAX_WORD_TOKENS


def test_texts_without_a_token_have_no_words(captions):
    tokenizer = make_tokenizer("wordpiece", captions)
    words = WordFinder(tokenizer)(tokenizer(["", ""], padding="max_length", max_length=4, return_tensors="np"))
    assert words.found == [] and words.lengths.size == words.spoken.size == 0
