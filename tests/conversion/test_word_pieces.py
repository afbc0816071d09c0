"""The official word pieces, rule by rule with a small vocabulary, and as recorded with BERT's where that is at hand."""

import base64
import gzip
import json
import os

import pytest
from transformers import AutoTokenizer

from flip_hf.conversion.tables import ConversionError
from flip_hf.conversion.word_pieces import read_vocabulary, word_piece_tokenizer
from tests.helpers.fixtures import FIXTURES

LETTERS = "abcdeghilmnoprstuvwx12é中文ισβ"
PIECES = ["[PAD]", "[UNK]", *LETTERS, *(f"##{c}" for c in LETTERS), "straw", "##berry", "[", "]", "-", "¿", "!", "##⁄"]


@pytest.fixture(scope="module", params=["made", "loaded"])
def tokenizer(request, tmp_path_factory):
    tokenizer = word_piece_tokenizer(PIECES, context_length=8)
    if request.param == "loaded":
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", ""),
        ("Straw", "straw"),
        ("strawberry", "straw ##berry"),
        ("strawy", "[UNK]"),  # no piece for the y: the whole word is unknown
        ("a-b!", "a - b !"),
        ("¿a", "¿ a"),  # punctuation beyond ASCII
        ("中文", "中 文"),  # ideographs stand alone
        ("ÀÉ", "a ##e"),  # marks are dropped, so that é has no piece of its own
        ("straße ẞ", "s ##t ##r ##a ##s ##s ##e s ##s"),  # case folding, not lower case
        ("Σς", "σ ##σ"),
        ("\u1fb3", "[UNK]"),  # α with iota subscript: two letters; there is no α
        ("\u03b9\u0345", "ι ##ι"),
        ("ﬁ", "[UNK]"),
        ("½", "1 ##⁄ ##2"),  # compatibility forms are taken apart
        ("ａｂ", "a ##b"),
        ("a\u200bb\u00adc\ufe0f", "a ##b ##c"),  # ignorable characters vanish
        ("a\x07b\tc\u00a0d", "a b c d"),  # control characters and odd spaces separate
        ("[PAD] [UNK]", "[ p ##a ##d ] [ [UNK] ]"),  # special tokens are text; "unk" has no piece for its k
        ("a" * 100, "a " + "##a " * 99),
        ("a" * 101, "[UNK]"),
        ("β" * 50, "β " + "##β " * 49),  # two bytes each: 100 is the limit in bytes
        ("β" * 51, "[UNK]"),
    ],
)
def test_rules(tokenizer, text, pieces):
    assert tokenizer(text)["input_ids"] == [PIECES.index(piece) for piece in pieces.split()]


def test_text_is_cut_and_padded_and_nothing_is_added(tokenizer):
    inputs = tokenizer(["a b c d e a b c d e", "a"], padding=True, truncation=True)
    assert inputs["input_ids"][0] == tokenizer("a b c d e a b c")["input_ids"]
    assert inputs["input_ids"][1] == [PIECES.index("a")] + 7 * [0]
    assert inputs["attention_mask"][1] == [1] + 7 * [0]
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_ids_are_read_back(tokenizer):
    assert tokenizer.decode(tokenizer("Straw, 中é".replace(",", "-"))["input_ids"]) == "straw - 中 e"


@pytest.mark.parametrize(
    ("pieces", "message"), [([], "begin with"), (["a", "[PAD]", "[UNK]"], "begin with"), ([*PIECES, "a"], "twice")]
)
def test_a_vocabulary_that_cannot_serve_is_refused(pieces, message):
    with pytest.raises(ConversionError, match=message):
        word_piece_tokenizer(pieces, context_length=8)


def test_a_vocabulary_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="neither a file nor a Hub repository"):
        read_vocabulary(str(tmp_path / "none.txt"))
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConversionError, match="cannot be read as text"):
        read_vocabulary(str(tmp_path))


BERT_VOCABULARY = os.environ.get("FLIP_HF_BERT_VOCAB")


@pytest.mark.skipif(BERT_VOCABULARY is None, reason="FLIP_HF_BERT_VOCAB does not name BERT's uncased vocab.txt")
def test_ids_are_the_recorded_ones():
    """1,698 texts through the real TensorFlow Text 2.18.1, among them all of Unicode's first planes in groups."""
    with gzip.open(FIXTURES / "official_tokenizer_cases.json.gz") as file:
        recorded = json.load(file)
    tokenizer = word_piece_tokenizer(read_vocabulary(str(BERT_VOCABULARY)), context_length=32)
    cases = [(case["text"], case["ids"]) for case in (*recorded["cases"], *recorded["codepoint_scan"])]
    cases += [(base64.b64decode(c["bytes_b64"]).decode(errors="replace"), c["ids"]) for c in recorded["invalid_utf8"]]
    assert len(cases) == 1698
    assert [text for text, ids in cases if tokenizer(text, truncation=True)["input_ids"] != ids] == []
