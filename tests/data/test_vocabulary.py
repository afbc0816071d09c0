"""Learned vocabularies in many languages, and the measure of what a tokenizer loses."""

import pytest
from tokenizers import normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from flip_hf.data.coverage import Coverage, measure_coverage
from flip_hf.data.tokenization import _normalizer, _pre_tokenizer, train_wordpiece
from tests.helpers.programs import ROOT

# Words that differ in what BERT's uncased normalizer drops.
PAIRS = {
    "German": ("schon", "schön"),
    "Japanese": ("かき", "がき"),
    "Japanese, katakana": ("ハン", "パン"),
    "Russian": ("мои", "мой"),
    "Hindi": ("कल", "काला"),
    "Thai": ("ปา", "ป้า"),
    "Vietnamese": ("ma", "mã"),
    "Arabic": ("علم", "عَلَّمَ"),
    "Hebrew": ("שלום", "שָׁלוֹם"),
    "Turkish": ("on", "ön"),
    "Persian, with a joiner": ("نامه\u200cای", "نامهای"),
    "emoji of joined signs": ("👩\u200d🚀", "👩🚀"),
    "flags of tags": (
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    ),
}
THAI = ["แมวสีดำนั่งอยู่บนโซฟา", "หมาสีขาววิ่งเล่นในสวน", "แมวสีขาวนอนบนเตียง", "ผู้หญิงกำลังถือร่มสีแดง", "หมาสีดำกำลังนอนอยู่บนเตียงของผู้หญิง"]


@pytest.mark.parametrize("language", PAIRS)
def test_words_of_a_language_are_distinguished(language):
    one, other = PAIRS[language]
    tokenizer = train_wordpiece([one, other] * 3)
    assert tokenizer(one)["input_ids"] != tokenizer(other)["input_ids"]
    assert "[UNK]" not in tokenizer.tokenize(one) + tokenizer.tokenize(other)
    coverage = measure_coverage(tokenizer, [one, other])
    assert (coverage.unknown, coverage.confused) == (0, 0)


def test_composed_and_decomposed_letters_are_the_same_and_case_is_folded():
    tokenizer = train_wordpiece(["Schön und Ärger, 검은 고양이"] * 3)
    texts = ["Schön und Ärger, 검은 고양이", "scho\u0308n UND a\u0308rger, \u1100\u1165\u11b7\u110b\u1173\u11ab 고양이"]
    first, second = tokenizer(texts)["input_ids"]
    assert first == second
    assert tokenizer.unk_token_id not in first


def test_invisible_characters_make_no_difference():
    tokenizer = train_wordpiece(["a red circle"] * 3)
    spoilt = "\ufeffa\u200b re\u00add\x01 \u200ecir\ue000cle\u202c"
    assert tokenizer(spoilt)["input_ids"] == tokenizer("a red circle")["input_ids"]


LONG = "หมาสีขาวกำลังวิ่งเล่นอยู่ในสวนของผู้หญิงและแมวสีดำกำลังนอนอยู่บนโซฟา" * 3


@pytest.mark.parametrize("unseen", ["ผู้หญิงสีดำอยู่ในสวน", "สวนของหมา", LONG])
def test_an_unseen_sentence_without_spaces_is_not_one_unknown_word(unseen):
    """Though its letters stand elsewhere than in what was learned from, and some may never have been seen."""
    tokenizer = train_wordpiece(THAI * 2)
    tokens = tokenizer.tokenize(unseen)
    assert len(tokens) > 1
    assert tokens.count("[UNK]") <= len(unseen) / 16
    assert "[UNK]" not in tokenizer.tokenize("ผู้หญิงสีดำอยู่ในสวน")


def test_english_is_normalized_and_split_as_before():
    """As BERT's own normalizer and splitting have it, so that runs on English captions are what they were."""
    files = ("README.md", "docs/pretraining.md", "LICENSE")
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    lines = [line for line in text.splitlines() if line.isascii()] + ["Tabs\tand  A \x07 bell\r\n", "x" * 300]
    bert = normalizers.BertNormalizer(lowercase=True)
    split = pre_tokenizers.BertPreTokenizer()
    for line in lines:
        expected = [word for word, _ in split.pre_tokenize_str(bert.normalize_str(line))]
        ours = [word for word, _ in _pre_tokenizer().pre_tokenize_str(_normalizer().normalize_str(line))]
        assert ours == expected


def test_the_share_a_tokenizer_loses_is_measured_and_reported():
    tokenizer = train_wordpiece(["a red circle", "a blue square"] * 4, context_length=4)
    captions = [
        "a red circle",
        "A  RED circle",
        "a blue square",
        "a zebra",
        "a blue circle red square",
        "a blue circle red red",
    ]
    coverage = measure_coverage(tokenizer, captions)
    # "A  RED circle" is the first once more; the last two are the same within four tokens.
    assert coverage == Coverage(captions=6, unknown=1, confused=2, cut=2)
    assert "1 contain an unknown word, 2 have the same tokens as a different one, 2 are longer" in str(coverage)
    assert "--tokenizer" in str(coverage)
    fine = measure_coverage(tokenizer, captions[:3])
    assert "--tokenizer" not in str(fine)


def test_special_tokens_are_no_part_of_it():
    """CLIP's end token is its unknown one, too, and stands in every text."""
    tokenizer = train_wordpiece(["a red circle", "a blue square"] * 4, context_length=5)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[UNK] $A [UNK]", special_tokens=[("[UNK]", tokenizer.unk_token_id)]
    )
    assert tokenizer("a red circle")["input_ids"].count(tokenizer.unk_token_id) == 2
    coverage = measure_coverage(tokenizer, ["a red circle", "a blue square circle"])
    assert (coverage.unknown, coverage.confused, coverage.cut) == (0, 0, 1)


@pytest.mark.parametrize("vocab_size", [60, 1024])
def test_the_same_captions_give_the_same_vocabulary(vocab_size):
    """With many ties: a learner that breaks them at random gives another one each time."""
    captions = [
        f"{first} {second}" for first in ("aubergine", "lemon", "melon") for second in ("crate", "trace", "react")
    ]
    first = train_wordpiece(captions, vocab_size=vocab_size).get_vocab()
    assert all(train_wordpiece(captions, vocab_size=vocab_size).get_vocab() == first for _ in range(4))
    assert first["[PAD]"] == 0


def test_letters_are_not_special_tokens():
    tokenizer = train_wordpiece(["a red circle"] * 3)
    assert tokenizer.all_special_tokens == ["[UNK]", "[PAD]"]
    assert tokenizer.decode(tokenizer("a red circle")["input_ids"], skip_special_tokens=True) == "a red circle"
