r"""Reproduces the official FLIP's word pieces as a tokenizer that Transformers loads without our code.

The official data pipeline uses TensorFlow Text's BERT tokenizer, which is not BERT's: NFKC case folding, ignorable
characters removed, no special tokens, words of more than 100 *bytes* unknown, text such as "[CLS]" taken literally.

Words are split as bytes (each represented by one character, as in GPT-2), so that the limit counts bytes; every entry
of the vocabulary consists of whole characters, so the longest match is the same.
"""

import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flip_hf.conversion.errors import ConversionError, reason
from flip_hf.conversion.files import read_file

logger = logging.getLogger(__name__)

PAD = "[PAD]"
UNKNOWN = "[UNK]"
CONTINUES = "##"
MAX_WORD_BYTES = 100
# BERT's multilingual vocabulary has 120,000 lines and 1 MB.
MAX_VOCABULARY_BYTES = 32 * 2**20
MAX_PIECES = 2**20
# MD5 of the release's vocabulary, one piece per line.
VOCABULARY_MD5 = "64800d5d8528ce344256daf115d4965e"

# Unicode's Default_Ignorable_Code_Point.
IGNORABLE = (
    r"[\x{AD}\x{34F}\x{61C}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{180B}-\x{180F}\x{200B}-\x{200F}\x{202A}-\x{202E}"
    r"\x{2060}-\x{206F}\x{3164}\x{FE00}-\x{FE0F}\x{FEFF}\x{FFA0}\x{FFF0}-\x{FFF8}\x{1BCA0}-\x{1BCA3}"
    r"\x{1D173}-\x{1D17A}\x{E0000}-\x{E0FFF}]"
)
# Characters whose case folding is not lower-casing, after compatibility decomposition; without Cherokee, which folds to
# upper case.
BEFORE_LOWER = {"\N{COMBINING GREEK YPOGEGRAMMENI}": "ι", "[ßẞ]": "ss"}
AFTER_LOWER = {"ς": "σ", **dict(zip(map(chr, range(0x1C80, 0x1C89)), "вдосттъѣꙋ", strict=True))}
# A mark and three punctuation signs that are newer than the release's Unicode tables, where they are unassigned.
MARK = r"[\p{Mn}&&[^\x{897}]]"
PUNCTUATION = r"[!-/:-@\[-`{-~]|[\p{P}&&[^\x{1B4E}\x{1B4F}\x{1B7F}]]"
IDEOGRAPH = (
    r"[\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}\x{2B740}-\x{2B81F}"
    r"\x{2B820}-\x{2CEAF}\x{2F800}-\x{2FA1F}]"
)


def _byte_alphabet() -> dict[int, str]:
    """Returns the character that represents each byte in the `ByteLevel` parts of `tokenizers`."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _normalizer() -> normalizers.Normalizer:
    def replace(pattern: str, content: str) -> normalizers.Normalizer:
        return normalizers.Replace(Regex(pattern), content)

    return normalizers.Sequence(
        [
            normalizers.NFKD(),
            replace(IGNORABLE, ""),
            *(replace(pattern, content) for pattern, content in BEFORE_LOWER.items()),
            normalizers.Lowercase(),
            *(replace(pattern, content) for pattern, content in AFTER_LOWER.items()),
            replace(MARK, ""),
            replace(r"[\p{Cc}\p{Cf}]", " "),
        ]
    )


def word_piece_tokenizer(pieces: Sequence[str], *, context_length: int) -> PreTrainedTokenizerFast:
    """Makes the tokenizer of an official FLIP.

    Args:
        pieces: the vocabulary in the order of ids; BERT's uncased one in the release.
        context_length: maximum number of tokens; the tokenizer's `model_max_length`.

    Raises:
        ConversionError: the vocabulary has no padding at id 0, no `[UNK]`, or duplicate entries.
    """
    if not pieces or pieces[0] != PAD or UNKNOWN not in pieces:
        raise ConversionError(f"The vocabulary must begin with {PAD} (id 0) and have {UNKNOWN}; see --vocab.")
    alphabet = _byte_alphabet()
    vocabulary = {"".join(alphabet[byte] for byte in piece.encode()): i for i, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ConversionError(f"The vocabulary has {len(pieces) - len(vocabulary)} entries that appear twice.")
    backend = Tokenizer(
        models.WordPiece(  # pyright: ignore[reportCallIssue]
            vocabulary,
            unk_token=UNKNOWN,
            continuing_subword_prefix=CONTINUES,
            max_input_chars_per_word=MAX_WORD_BYTES,
        )
    )
    backend.normalizer = _normalizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(r"[\t\n\f\r ]+"), "removed"),
            pre_tokenizers.Split(Regex(f"{PUNCTUATION}|{IDEOGRAPH}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        # The space between words, too, is in the alphabet of bytes.
        [decoders.WordPiece(prefix=CONTINUES, cleanup=False), decoders.Replace(" ", alphabet[32]), decoders.ByteLevel()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="right",
        # Text such as "[PAD]" is ordinary text.
        split_special_tokens=True,
    )


def read_vocabulary(file_or_repo: str) -> list[str]:
    """Reads the pieces of a BERT `vocab.txt`, one per line.

    Args:
        file_or_repo: the file, a folder with it, or a Hub id such as `google-bert/bert-base-uncased`.

    Raises:
        ConversionError: there is no such file, or it is not a vocabulary.
    """
    path = Path(file_or_repo)
    root = None
    try:
        exists = path.exists()
        if path.is_dir():
            root = path
            path = path / "vocab.txt"
    except (OSError, ValueError) as error:
        raise ConversionError(f"--vocab {file_or_repo!r} cannot be opened: {reason(error)}.") from error
    if not exists:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(file_or_repo, "vocab.txt"))
        except Exception as error:  # no such file, no such repository, no network: many types, one answer
            raise ConversionError(
                f"--vocab {file_or_repo}: neither a file nor a Hub repository with a vocab.txt ({reason(error)})."
            ) from error
    try:
        # Universal newlines.
        text = io.TextIOWrapper(io.BytesIO(read_file(path, MAX_VOCABULARY_BYTES, root=root)), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise ConversionError(f"--vocab {path} cannot be read as text: {reason(error)}.") from error
    lines = text.split("\n")
    if len(lines) > MAX_PIECES:
        raise ConversionError(f"--vocab {path} has {len(lines):,} lines, more than {MAX_PIECES:,}: not a vocabulary.")
    return lines[:-1] if lines[-1] == "" else lines


def official_pieces(vocab: str, vocab_size: int, *, released: bool) -> list[str]:
    """Reads the vocabulary that belongs to a token table.

    Args:
        vocab: see [`read_vocabulary`].
        vocab_size: rows of the table; the last is the official code's bucket for unknown words, which is never used.
        released: whether the checkpoint has a released size, whose vocabulary is known.

    Raises:
        ConversionError: the checkpoint has a released size, but the vocabulary is not the released one.
    """
    pieces = read_vocabulary(vocab)
    if released:
        digest = hashlib.md5("".join(f"{piece}\n" for piece in pieces).encode(), usedforsecurity=False).hexdigest()
        if digest != VOCABULARY_MD5:
            raise ConversionError(
                f"--vocab {vocab} has {len(pieces):,} entries and is not the released one, BERT's uncased "
                "vocab.txt of 30,522 entries (google-bert/bert-base-uncased)."
            )
    elif len(pieces) >= vocab_size:
        # The official model embeds ids outside its table as zeros, on which no tokenizer should rely.
        logger.warning(
            "The vocabulary has %d entries, the checkpoint's table %d rows: words that need the others become [UNK].",
            len(pieces),
            vocab_size,
        )
        pieces = pieces[: vocab_size - 1]
    return pieces
