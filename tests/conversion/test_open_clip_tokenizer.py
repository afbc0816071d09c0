"""Tokenizers that read texts as open_clip does: SigLIP's texts without punctuation, CLIPA's without a separator."""

import json

import pytest
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertTokenizer, T5Tokenizer

from flip_hf import FlipModel
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.open_clip import convert_from_open_clip
from flip_hf.conversion.open_clip_tokenizer import read_as_open_clip

WORDS = ("a", "photo", "of", "the", "cat", "s", "dog")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?_-'\"()[]\\^&"
TEXTS = ["A cat's photo!", "  THE_dog,  of-the\tCAT. ", "", '(a) [dog] "of" \\ ^&', "the " * 30]
CANONICAL = ["a cats photo", "the dog ofthe cat", "", "a dog of", ("the " * 30).strip()]
CONTEXT = 10


@pytest.fixture
def siglip_like(tmp_path):
    """A folder with a tokenizer of SigLIP's kind: pieces of sentences, padded with the end of the text."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces = [*special, *((f"▁{word}", -2.0) for word in WORDS), *((letter, -5.0) for letter in LETTERS)]
    T5Tokenizer(vocab=pieces, extra_ids=0, pad_token="</s>").save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip"


@pytest.fixture
def bert_like(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS[:26], *(f"##{c}" for c in LETTERS[:26])]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *"!'_,-.()[]\\^&\""]))}
    BertTokenizer(vocab=vocab).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def ids_of(tokenizer, texts) -> list[list[int]]:
    return tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT).input_ids


def converted(folder, tmp_path, **kwargs):
    """The tokenizer as open_clip's options change it, saved and loaded."""
    text_cfg = {"hf_tokenizer_name": "there", "tokenizer_kwargs": kwargs}
    read_as_open_clip(AutoTokenizer.from_pretrained(folder), text_cfg).save_pretrained(tmp_path / "saved")
    return AutoTokenizer.from_pretrained(tmp_path / "saved")


def test_texts_are_canonical(siglip_like, tmp_path):
    plain = AutoTokenizer.from_pretrained(siglip_like)
    ours = converted(siglip_like, tmp_path, clean="canonicalize")
    assert ids_of(ours, TEXTS) == ids_of(plain, CANONICAL) != ids_of(plain, TEXTS)
    lower = converted(siglip_like, tmp_path, clean="lower")
    assert ids_of(lower, TEXTS) == ids_of(plain, [text.lower() for text in TEXTS])
    assert (ours.pad_token_id, ours.eos_token_id, ours.padding_side) == (1, 1, "right")


def test_separators_are_zero_even_where_a_text_is_cut(bert_like, tmp_path):
    plain = AutoTokenizer.from_pretrained(bert_like)
    expected = [[0 if i == plain.sep_token_id else i for i in ids] for ids in ids_of(plain, TEXTS)]
    ours = converted(bert_like, tmp_path, strip_sep_token=True)
    assert ids_of(ours, TEXTS) == expected != ids_of(plain, TEXTS)
    assert ours.pad_token_id == 0 and expected[-1][-1] == 0 and len(expected[-1]) == CONTEXT


@pytest.mark.parametrize("options", [{"clean": "canonicalize"}, {"clean": "lower"}, {"strip_sep_token": True}])
def test_the_installed_open_clip_gives_the_same_ids(siglip_like, bert_like, tmp_path, options):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    folder = bert_like if "strip_sep_token" in options else siglip_like
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=CONTEXT, **options)
    assert ids_of(converted(folder, tmp_path, **options), TEXTS) == theirs(TEXTS).tolist()


def test_a_tokenizer_that_open_clip_does_not_change_stays(siglip_like):
    tokenizer = AutoTokenizer.from_pretrained(siglip_like)
    assert read_as_open_clip(tokenizer, {"hf_tokenizer_name": "there"}) is tokenizer
    assert read_as_open_clip(tokenizer, {"tokenizer_kwargs": {"clean": "canonicalize"}}) is tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([1], "tokenizer_kwargs must be an object"),
        ({"clean": "thoroughly"}, r"tokenizer_kwargs = \{'clean': 'thoroughly'\}, which FLIP does not support"),
        ({"clean": ["lower"]}, "which FLIP does not support"),
        ({"strip_sep_token": "yes"}, "which FLIP does not support"),
        ({"language": "en"}, "which FLIP does not support"),
        ({"strip_sep_token": True}, r"its tokenizer has no \[CLS\] or no \[SEP\]"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(siglip_like, options, message):
    tokenizer = AutoTokenizer.from_pretrained(siglip_like)
    with pytest.raises(ConversionError, match=message):
        read_as_open_clip(tokenizer, {"hf_tokenizer_name": "there", "tokenizer_kwargs": options})


@pytest.mark.parametrize("family", ["siglip"], indirect=True)
def test_a_converted_folder_reads_and_pads_as_open_clip(family, siglip_like, tmp_path):
    (siglip_like / "open_clip_config.json").write_text(json.dumps({"model_cfg": family["model_cfg"]}))
    save_file(family["state_dict"], siglip_like / "open_clip_model.safetensors")
    convert_from_open_clip(str(siglip_like)).save(tmp_path / "flip")
    flip = FlipModel.from_pretrained(tmp_path / "flip")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "flip")
    assert flip.config.text_config.pad_token_id == tokenizer.pad_token_id == 1
    assert tokenizer.model_max_length == CONTEXT
    short = tokenizer("A cat!", return_tensors="pt").input_ids
    full = tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    assert short.shape[1] < full.shape[1] == CONTEXT
    features = [flip.get_text_features(ids).pooler_output for ids in (short, full)]
    assert (features[0] - features[1]).abs().max() < 1e-5
