"""Texts of megabytes, half characters and JSON of any depth: cut, refused and counted, whoever reads them."""

import itertools
import json

import numpy as np
import pytest

from flip_hf.data.decode import choose_caption
from flip_hf.data.refusals import RefusedSample
from flip_hf.data.sources import column_value, open_source
from flip_hf.data.targets import Captions
from flip_hf.data.texts import MAX_CAPTION_CHARACTERS, MAX_CAPTIONS, MAX_JSON_BYTES, MAX_TEXT_BYTES, bound_text
from flip_hf.data.tokenization import _learnable, train_wordpiece
from flip_hf.evaluation.zero_shot import TextInputs
from tests.helpers import damaged
from tests.helpers.loading import make_train_loader, numbers, refused

WORDS = [f"word{n} " for n in range(5000)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["a red circle", "a blue square"] * 4, vocab_size=100, context_length=77)


def choose(value) -> str:
    return choose_caption(value, np.random.default_rng(0))


def test_a_text_of_usual_length_is_left_as_it_is():
    for text in ("a  cat\n", " " * MAX_CAPTION_CHARACTERS, "x" * MAX_CAPTION_CHARACTERS):
        assert bound_text(text) is text
    assert choose(b" a  cat\n") == " a  cat\n"


def test_truncation_of_a_long_text_changes_no_kept_token(tokenizer):
    """Ordinary text, white space before and between words, letters of two code points, and no spaces at all."""
    space = " " * 2 * MAX_CAPTION_CHARACTERS
    for text in ("".join(WORDS), f"{space}a red circle", f"a{space}red\n{space}circle", "e\u0301" * 9000, "雨" * 9000):
        bounded = bound_text(text)
        assert 0 < len(bounded) <= MAX_CAPTION_CHARACTERS
        ids = [tokenizer(t, truncation=True)["input_ids"] for t in (text, bounded)]
        assert ids[0] == ids[1]
        assert TextInputs(tokenizer)([text])["input_ids"][0].tolist() == ids[0]
    assert bound_text("".join(WORDS)) == "".join(WORDS)[:MAX_CAPTION_CHARACTERS]
    assert bound_text("\n" * 10_000_000) == ""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"red circle " * 100_000, "oversized caption"),
        ("a" * (MAX_TEXT_BYTES + 1), "oversized caption"),
        (["\ud800"], "caption is not UTF-8"),
        ("a cat \udfff", "caption is not UTF-8"),
    ],
)
def test_texts_that_no_tokenizer_should_see_are_refused(value, reason):
    with pytest.raises(RefusedSample, match=reason):
        choose(value)
    with pytest.raises(RefusedSample, match=reason):
        Captions()(value)


def test_captions_of_one_image_are_bounded_in_number():
    assert len(Captions()(["a cat"] * MAX_CAPTIONS)) == MAX_CAPTIONS
    many = {"text": ["a cat"] * (MAX_CAPTIONS + 1), "lines": "a\n" * 2000, "json": json.dumps(["a"] * 2000)}
    for form, value in many.items():
        with pytest.raises(RefusedSample, match="too many captions"):
            Captions(form)(value)
    assert Captions()(["x" * 20_000]) == ["x" * MAX_CAPTION_CHARACTERS]
    with pytest.raises(RefusedSample, match="damaged JSON"):
        Captions("json")("[" * 200_000)


def test_json_is_bounded_in_depth_and_size():
    read = {
        "deep": b'{"caption": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "digits": b'{"caption": ' + b"9" * 100_000 + b"}",
        "large": b'{"caption": "a", "x": "' + b"x" * MAX_JSON_BYTES + b'"}',
    }
    for name, reason in (("deep", "damaged JSON"), ("digits", "damaged JSON"), ("large", "oversized JSON")):
        with pytest.raises(RefusedSample, match=reason):
            column_value({"json": read[name]}, "json.caption")


def test_captions_of_megabytes_are_skipped(tmp_path):
    """Also half a character in JSON, which the tokenizer would answer with a TypeError."""
    bad = {3: b"red circle " * 200_000, 7: b"0" * 5_000_000, 11: b"00011 " + b"x" * 500_000}
    rows = [(f"{n:05d}", [damaged.good(n)[0], ("txt", bad[n]) if n in bad else damaged.good(n)[1]]) for n in range(16)]
    (tmp_path / "x.tar").write_bytes(damaged.shard(rows))
    loader = make_train_loader(tmp_path / "x.tar", batch_size=14, block=1)
    assert sorted(numbers(itertools.islice(loader, 1))) == [n for n in range(16) if n not in (3, 7)]
    assert refused(loader) == {"oversized caption": 2}


def test_a_vocabulary_is_learned_without_words_that_no_token_can_be(monkeypatch):
    """Learning takes time that grows with the square of a word's length: a mebibyte would take hours."""
    usual = [f"a red circle {n} beside a blue square" for n in range(50)] + ["雨" * 200, f"http://{'a.b/' * 60}"]
    long = ["ab" * 2**19, "e\u0301" * 4000, f"red {'x' * 101} circle"]
    assert [text for text in _learnable(usual + long) if text] == [*usual, "red circle"]
    assert "[UNK]" not in train_wordpiece(usual + long).tokenize("a red circle beside a blue square")
    assert train_wordpiece(["x" * 100] * 3).tokenize("x" * 100) != ["[UNK]"]
    monkeypatch.setattr("flip_hf.data.tokenization.MAX_VOCABULARY_CHARACTERS", 60)
    assert "zebra" not in train_wordpiece(["a red circle"] * 5 + ["zebra"] * 50).get_vocab()


def test_lines_that_arrow_would_die_of_are_named(image_folder):
    """Twenty thousand brackets in `metadata.jsonl` end the process of pyarrow 26 by a signal."""
    table = image_folder / "train" / "metadata.jsonl"
    sound = table.read_text()
    deep = '{"x": ' + "[" * 20_000 + "]" * 20_000 + "}"
    for line, reason in ((deep, "damaged"), ("x" * (MAX_JSON_BYTES + 1), "oversized")):
        table.write_text(sound + line + "\n")
        with pytest.raises(ValueError, match=f"metadata.jsonl, line 161: {reason} JSON. Fix or remove the line."):
            open_source(str(image_folder), target_column="caption")
    boxes = json.dumps({"file_name": "00000.jpg", "caption": "a", "boxes": [[1, 2, 3, 4]] * 300})
    table.write_text(sound + boxes + "\n")
    open_source(str(image_folder), target_column="caption")
