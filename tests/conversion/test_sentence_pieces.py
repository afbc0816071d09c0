"""SigLIP 1's sentencepiece tokenizer as a fast one: the ids of Transformers' own SiglipTokenizer, text by text."""

import json
import random
import sys
import unicodedata

import pytest
from transformers import AutoTokenizer, SiglipProcessor, SiglipTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.sentence_pieces import has_siglip_tokenizer, read_siglip_tokenizer
from flip_hf.conversion.siglip import convert_from_siglip, convert_to_siglip
from tests.helpers.siglip_folder import save_siglip_1, train_sentencepiece

WORDS = (
    *("a", "RED", "Circle,", "don't", "(photo)", "x_y", "1,234.5", "---", "…", "‘q’", "<b>bold</b>", "<pad>", "unk"),
    *("naïve", "cafe\u0301", "STRASSE", "straße", "İstanbul", "ΣΊΣΥΦΟΣ", "ΟΔΟΣ.", "ΑΣ'", "日本語", "русский", "हिन्दी"),
    *(
        "ﾊﾞﾊﾟ",
        "한국어",
        unicodedata.normalize("NFD", "한국어 tiếng Việt"),
        "½",
        "ﬁ",
        "ＡＢ～",
        "㍍",
        "①",
        "😀",
        "👨‍👩‍👧",
        "❤️",
        "1️⃣",
    ),
    *("\u200bz\u200b", "\ufeff", "\u00ad", "▁", "▁▁a▁", "\x07", "\x1c", "\u3000", "\n", "\t", "  ", "\U0001d49c"),
)
# Any character, but most often one that something is done with: marks and punctuation.
CHARACTERS = [
    *(chr(code) for code in range(1, 0x3100) if unicodedata.category(chr(code)) not in ("Cn", "Co")),
    *(
        chr(code)
        for start, end in ((0xAC00, 0xAC80), (0xFF00, 0xFFEF), (0x1F600, 0x1F640))
        for code in range(start, end)
    ),
    *30 * [*map(chr, range(0x20, 0x7F))],
]


def texts() -> list[str]:
    """1,300 texts: words with and without spaces between them, and characters."""
    generator = random.Random(0)
    made = ["", " ", "!", "a" * 1000, "word " * 300, *WORDS]
    for length in (1, 2, 5, 12):
        for _ in range(100):
            made.append(" ".join(generator.choices(WORDS, k=length)))
            made.append("".join(generator.choices(WORDS, k=length)))
            made.append("".join(generator.choices(CHARACTERS, k=length)))
    return made


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"byte_fallback": True, "vocab_size": 560, "character_coverage": 0.99},
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "nfkc"},
    ],
    ids=["siglip", "bytes", "identity", "nfkc"],
)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    SiglipTokenizer(str(train_sentencepiece(folder, **request.param))).save_pretrained(folder)
    return folder


def is_ordered(text: str) -> bool:
    """Returns whether all marks of a text are in Unicode's canonical order."""
    return "".join(unicodedata.normalize("NFD", letter) for letter in text) == unicodedata.normalize("NFD", text)


def ids_of(tokenizer, some) -> list[list[int]]:
    return [tokenizer(text, truncation=True).input_ids for text in some]


def test_ids_are_those_of_transformers(folder):
    fast = read_siglip_tokenizer(folder)
    slow = SiglipTokenizer.from_pretrained(folder)
    some = [text for text in texts() if is_ordered(slow.canonicalize_text(text))]
    pairs = zip(ids_of(fast, some), ids_of(slow, some), strict=True)
    assert fast.is_fast and len(some) > 1200
    assert [text for text, (ours, theirs) in zip(some, pairs, strict=True) if ours != theirs] == []
    assert fast.model_max_length == 64 and fast.pad_token_id == fast.eos_token_id == 1 and fast.unk_token_id == 2


def test_case_is_kept_where_the_configuration_says_so(folder, tmp_path):
    SiglipTokenizer(str(folder / "spiece.model"), do_lower_case=False).save_pretrained(tmp_path)
    some = ["A Red CIRCLE!", "Σίσυφος", "ＡＢ"]
    fast = read_siglip_tokenizer(tmp_path)
    assert ids_of(fast, some) == ids_of(SiglipTokenizer.from_pretrained(tmp_path), some)
    assert fast("H").input_ids != fast("h").input_ids


def test_it_is_saved_and_loaded_as_any_fast_tokenizer(folder, tmp_path):
    fast = read_siglip_tokenizer(folder)
    fast.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast and not (tmp_path / "spiece.model").exists()
    assert ids_of(loaded, WORDS) == ids_of(fast, WORDS)
    assert loaded.decode(loaded("A red circle.").input_ids, skip_special_tokens=True) == "a red circle"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "bpe"}, "not a unigram model"),
        ({"remove_extra_whitespaces": False}, "keeps repeated spaces"),
        ({"user_defined_symbols": ["cat"]}, r"symbols of its own \(cat\)"),
        ({"split_by_whitespace": False}, "pieces go on after a space"),
    ],
)
def test_models_of_another_kind_are_refused(options, why, tmp_path):
    SiglipTokenizer(str(train_sentencepiece(tmp_path, **options))).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=why):
        read_siglip_tokenizer(tmp_path)


def test_other_rules_are_refused(tmp_path):
    rules = tmp_path / "rules.tsv"
    rules.write_text("FF21\t0062\n")  # a wide A becomes a b
    SiglipTokenizer(str(train_sentencepiece(tmp_path, normalization_rule_tsv=str(rules)))).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="rules are not based on NFKC"):
        read_siglip_tokenizer(tmp_path)


def test_damaged_rules_and_scores_are_refused(tmp_path):
    path = train_sentencepiece(tmp_path)
    model = import_protobuf().ModelProto.FromString(path.read_bytes())
    for change in ("scores", "rules", "end of the rules", "long piece", "empty piece"):
        proto = import_protobuf().ModelProto.FromString(model.SerializeToString())
        if change == "scores":
            proto.pieces[10].score = float("nan")
        elif change == "end of the rules":  # on which `tokenizers` panics
            proto.normalizer_spec.precompiled_charsmap = proto.normalizer_spec.precompiled_charsmap[:-1007]
        elif change.endswith("piece"):
            proto.pieces.add(piece="a" * 300_000 if change == "long piece" else "", score=-1.0)
        else:
            proto.normalizer_spec.precompiled_charsmap = proto.normalizer_spec.precompiled_charsmap[:1001]
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ConversionError):
            read_siglip_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("do_lower_case", "yes", "do_lower_case must not be 'yes'"),
        ("pad_token", "<none>", "no piece '<none>'"),
        ("additional_special_tokens", ["<x>"], "tokens that SigLIP's tokenizer does not have"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(field, value, why, tmp_path):
    train_sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer", field: value}))
    with pytest.raises(ConversionError, match=why):
        read_siglip_tokenizer(tmp_path)


def test_without_protobuf_the_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(ConversionError, match=r"needs protobuf: pip install flip_hf\[convert\]"):
        read_siglip_tokenizer(folder)


def test_only_a_siglip_tokenizer_is_taken_for_one(tmp_path):
    train_sentencepiece(tmp_path)
    assert not has_siglip_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    assert has_siglip_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert not has_siglip_tokenizer(tmp_path)


def test_a_siglip_1_is_converted_and_back_with_its_texts(tmp_path):
    (tmp_path / "siglip").mkdir()
    save_siglip_1(tmp_path / "siglip")
    convert_from_siglip(str(tmp_path / "siglip")).save(tmp_path / "flip")
    convert_to_siglip(str(tmp_path / "flip")).save(tmp_path / "again")
    ours, theirs = (SiglipProcessor.from_pretrained(tmp_path / name) for name in ("again", "siglip"))
    some = ["A red Circle!", "naïve, 日本語 " * 20]
    options = {"padding": "max_length", "truncation": True}
    assert ours.tokenizer.is_fast and not theirs.tokenizer.is_fast
    assert ours(text=some, **options) == theirs(text=some, **options)
