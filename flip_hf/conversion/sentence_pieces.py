r"""Reads SigLIP 1's tokenizer, a file of sentencepiece for a slow class of Transformers, as a fast tokenizer.

`SiglipTokenizer` puts a text in lower case, removes ASCII punctuation and repeated white space, and encodes the rest
with a unigram model of sentencepiece. Here all of it becomes parts of `tokenizers`, which are saved as a
`tokenizer.json`. The file is parsed as the protobuf message that it is; sentencepiece itself, whose C++ has had faults
in reading damaged models (CVE-2026-1260), is not needed.

The ids are the same, with these exceptions:

- combining marks behind characters that NFKC takes apart, or in an order that no normal form of Unicode has, are put
  in order;
- behind a literal `</s>` or `<unk>` a word begins anew, and a text that ends with `</s>` has two of them;
- letters of alphabets newer than the tables of `tokenizers` keep their case.
"""

import math
import os
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, SiglipConfig
from transformers.convert_slow_tokenizer import SpmConverter

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.errors import ConversionError, reason
from flip_hf.conversion.files import check_file, read_json
from flip_hf.conversion.pretrained import CONFIG

SPIECE = "spiece.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
SIGLIP_FILES = (SPIECE, TOKENIZER_CONFIG, CONFIG)
SLOW = "SiglipTokenizer"
# The largest, with 250,000 pieces, has 4.3 MB.
MAX_SPIECE_BYTES = 32 * 2**20
MAX_PIECES = 2**20
# `tokenizers` needs stack for each letter of the longest piece. SigLIP's have at most 16 letters.
MAX_PIECE_LETTERS = 256
SPACE = "▁"  # sentencepiece's sign for a space
# Of sentencepiece's format: the type of a model, and types of pieces.
UNIGRAM = 1
NORMAL, UNKNOWN, BYTE = 1, 2, 6
# NFKC would replace this sign, which `nmt_nfkc` keeps, by the ASCII one. The other is never assigned.
TILDE, NO_TILDE = "\N{FULLWIDTH TILDE}", "\U0010fffe"
# Python's `\s`, which has four more characters than that of `tokenizers`.
WHITE_SPACE = r"[\s\x{1C}-\x{1F}]+"
# A sigma at the end of a word, by Unicode's rule, which Python follows and `tokenizers` does not.
_CASED = r"[\p{Cased}&&[^\p{Case_Ignorable}]]"
FINAL_SIGMA = rf"{_CASED}\p{{Case_Ignorable}}*\KΣ(?!\p{{Case_Ignorable}}*{_CASED})"


@dataclass(frozen=True)
class _Slow:
    """The fields of a `SiglipTokenizer`, by Transformers' names and with its defaults."""

    vocab_file: str
    eos_token: str = "</s>"
    unk_token: str = "<unk>"
    pad_token: str = "</s>"
    model_max_length: int = 64
    do_lower_case: bool = True
    padding_side: str = "right"
    truncation_side: str = "right"
    model_input_names: tuple[str, ...] = ("input_ids", "attention_mask")


def has_siglip_tokenizer(folder: Path) -> bool:
    """Returns whether Transformers would load a folder's tokenizer as a `SiglipTokenizer`.

    Raises:
        ConversionError: the folder's configurations cannot be read.
    """
    if not os.path.lexists(folder / SPIECE):
        return False
    kind = _read(folder, TOKENIZER_CONFIG).get("tokenizer_class")
    if kind is None:
        return _read(folder, CONFIG).get("model_type") == SiglipConfig.model_type
    return kind == SLOW


def read_siglip_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Makes a fast tokenizer with the ids of a folder's `SiglipTokenizer`.

    Raises:
        ConversionError: a file is damaged, or of a kind that SigLIP's are not; or protobuf is not installed.
    """
    _require_protobuf(folder)
    slow = _read_slow(folder)
    try:
        converter = _SiglipConverter(slow)
        _check_model(converter.proto)
        made = _wrap(slow, converter.converted())
        made("")
    except ConversionError as error:
        raise ConversionError(f"{folder / SPIECE}: {error}") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # protobuf raises many types for a damaged file, and tokenizers Rust's panics
        raise ConversionError(
            f"{folder / SPIECE} cannot be read as a model of sentencepiece: {reason(error)}. Fetch it again."
        ) from error
    return made


def _require_protobuf(folder: Path) -> None:
    try:
        import google.protobuf  # noqa: F401
    except ImportError as error:
        raise ConversionError(
            f"{folder / SPIECE} is SigLIP's tokenizer, and reading it needs protobuf: pip install flip_hf[convert]"
        ) from error


def _read(folder: Path, name: str) -> JsonObject:
    return read_json(folder / name, root=folder) if os.path.lexists(folder / name) else {}


def _read_slow(folder: Path) -> _Slow:
    """Reads the fields of a folder's `SiglipTokenizer`.

    Raises:
        ConversionError: one has another type, or there are tokens besides the sentencepiece model's.
    """
    config = _read(folder, TOKENIZER_CONFIG)
    found = {name: config[name] for name in _Slow.__dataclass_fields__ if config.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, dict):  # an AddedToken
            found[name] = value.get("content")
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            found[name] = tuple(value)
    found["vocab_file"] = str(check_file(folder / SPIECE, MAX_SPIECE_BYTES, root=folder))
    for name, field in _Slow.__dataclass_fields__.items():
        if name in found and name != "vocab_file" and type(found[name]) is not type(field.default):
            raise ConversionError(f"{folder / TOKENIZER_CONFIG}: {name} must not be {config[name]!r:.80}.")
    slow = _Slow(**found)
    _check_added(config, {slow.eos_token, slow.unk_token, slow.pad_token}, folder / TOKENIZER_CONFIG)
    return slow


def _check_added(config: JsonObject, known: set[str], path: Path) -> None:
    """Checks that a tokenizer's configuration names no tokens but the known ones.

    Raises:
        ConversionError: it names others.
    """
    added = config.get("added_tokens_decoder") or {}
    tokens = list(added.values()) if isinstance(added, dict) else [added]
    is_known = all(isinstance(token, dict) and token.get("content") in known for token in tokens)
    if not is_known or config.get("additional_special_tokens") or config.get("extra_special_tokens"):
        raise ConversionError(f"{path} has tokens that SigLIP's tokenizer does not have.")


def _check_model(proto: Any) -> None:
    """Checks what SigLIP's sentencepiece models have in common, on which the conversion relies.

    Raises:
        ConversionError: the model is not a unigram model of whole words without symbols of its own.
    """
    if len(proto.pieces) > MAX_PIECES:
        raise ConversionError(f"this sentencepiece model has {len(proto.pieces):,} pieces, more than {MAX_PIECES:,}.")
    rules = proto.normalizer_spec
    pieces = [(piece.piece, piece.type) for piece in proto.pieces]
    punctuation = set(string.punctuation)
    # In a text without punctuation, `</s>` and `<0x41>` cannot be found.
    symbols = [piece for piece, kind in pieces if kind not in (NORMAL, BYTE) and not punctuation & set(piece)]
    reasons = {
        "it is not a unigram model": proto.trainer_spec.model_type != UNIGRAM,
        "it keeps repeated spaces": not (rules.remove_extra_whitespaces and rules.escape_whitespaces),
        "it has no piece for a space": (SPACE, NORMAL) not in pieces,
        "its pieces go on after a space": any(SPACE in piece[1:] for piece, kind in pieces if kind == NORMAL),
        "it has not one unknown piece": [kind for _, kind in pieces].count(UNKNOWN) != 1,
        "a piece is empty or very long": not all(0 < len(piece) <= MAX_PIECE_LETTERS for piece, _ in pieces),
        "its scores are not finite": not all(math.isfinite(piece.score) for piece in proto.pieces),
        f"it has symbols of its own ({', '.join(symbols):.80})": symbols,
        "its rules are not based on NFKC": not _based_on_nfkc(rules.precompiled_charsmap),
    }
    for why, holds in reasons.items():
        if holds:
            raise ConversionError(f"this sentencepiece model is not of SigLIP's kind: {why}.")


def _rules(charsmap: bytes) -> list[normalizers.Normalizer]:
    """Returns sentencepiece's own normalization: nothing, or rules on top of Unicode's NFKC, such as `nmt_nfkc`.

    The rules alone would miss most sequences of characters, which `Precompiled` does not look for: é as e and a mark.
    """
    if not charsmap:
        return []
    rules = normalizers.Precompiled(charsmap)
    if rules.normalize_str(TILDE) != TILDE:
        return [normalizers.NFKC(), rules]
    return [normalizers.Replace(TILDE, NO_TILDE), normalizers.NFKC(), rules, normalizers.Replace(NO_TILDE, TILDE)]


def _based_on_nfkc(charsmap: bytes) -> bool:
    """Returns whether NFKC before the rules changes nothing for the characters of Unicode's first plane."""
    if not charsmap:
        return True
    rules = normalizers.Precompiled(charsmap)
    ours = normalizers.Sequence(_rules(charsmap))
    numbers = (*range(0xD800), *range(0xE000, 0x10000))  # without the halves of other characters
    return all(ours.normalize_str(chr(number)) == rules.normalize_str(chr(number)) for number in numbers)


class _SiglipConverter(SpmConverter):
    """The parts of a fast tokenizer, put together by Transformers' `converted`; their types are its own."""

    handle_byte_fallback = True

    def unk_id(self, proto: Any) -> int:
        return [piece.type for piece in proto.pieces].index(UNKNOWN)

    def tokenizer(self, proto: Any) -> Tokenizer:
        return Tokenizer(models.Unigram(self.vocab(proto), self.unk_id(proto), bool(proto.trainer_spec.byte_fallback)))

    def normalizer(self, proto: Any) -> Any:
        rules = _rules(proto.normalizer_spec.precompiled_charsmap)
        # Transformers puts a sign for a space before each text, of which the rules may make a space.
        first = normalizers.Sequence(rules).normalize_str(SPACE)
        lower = [normalizers.Replace(Regex(FINAL_SIGMA), "ς"), normalizers.Lowercase()]
        return normalizers.Sequence(
            [
                normalizers.Replace(SPACE, " "),
                *(lower if self.original_tokenizer.do_lower_case else ()),
                normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
                normalizers.Replace(Regex(WHITE_SPACE), " "),
                *rules,
                normalizers.Prepend(first),
                normalizers.Replace(Regex(" {2,}"), " "),
                normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), ""),
            ]
        )

    def pre_tokenizer(self, replacement: str, add_prefix_space: bool) -> Any:
        return pre_tokenizers.Metaspace(replacement, prepend_scheme="never")

    def decoder(self, replacement: str, add_prefix_space: bool) -> Any:
        joined = [decoders.ByteFallback(), decoders.Replace(replacement, " "), decoders.Fuse()]
        return decoders.Sequence([*joined, decoders.Strip(" ", 1, 0)])

    def post_processor(self) -> Any:
        end = self.original_tokenizer.eos_token
        proto: Any = self.proto
        ids = [(end, [piece.piece for piece in proto.pieces].index(end))]
        return TemplateProcessing(single=["$A", end], pair=["$A", end, "$B", end], special_tokens=ids)


def _wrap(slow: _Slow, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Gives a backend the special tokens and the limits of a tokenizer.

    Raises:
        ConversionError: a special token is not one of the pieces.
    """
    names = ("eos_token", "unk_token", "pad_token")
    special = {name: getattr(slow, name) for name in names}
    for name, token in special.items():
        if backend.token_to_id(token) is None:
            raise ConversionError(f"it has no piece {token!r:.80}, which {TOKENIZER_CONFIG} names as the {name}.")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=slow.model_max_length,
        padding_side=slow.padding_side,
        truncation_side=slow.truncation_side,
        model_input_names=list(slow.model_input_names),
        **{name: AddedToken(token, lstrip=True, rstrip=True, special=True) for name, token in special.items()},
    )
