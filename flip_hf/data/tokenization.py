"""Tokenizes with word pieces without special tokens, as the official FLIP does, or with any fast tokenizer unchanged.

FLIP takes the text's feature at the first token, and its tokenizer adds no `[CLS]` or `[SEP]`: the first token is the
first word piece. `PreTrainedTokenizerFast` around our own pipeline preserves that through saving and loading; a
modified `BertTokenizer` does not.

A learned vocabulary folds case, as CLIP's and SigLIP's do, and keeps what distinguishes words in languages other than
English. BERT's uncased normalizer, which comes with the tokenizer of the paper's recipes, drops all accents instead:
schön becomes schon, がき かき, and Hindi and Thai lose their vowels.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flip_hf.data.texts import bound_text

PAD = "[PAD]"
UNKNOWN = "[UNK]"
# Characters from which a vocabulary is learned, and of a word. A longer word is unknown in any vocabulary, and the time
# of learning grows with the square of its length.
MAX_VOCABULARY_CHARACTERS = 2**28
MAX_WORD_CHARACTERS = 100

# Private-use characters, soft hyphens, direction and byte order marks, the replacement character, and control
# characters. Joiners are kept because they distinguish Persian words and emoji.
_INVISIBLE = (
    r"[\p{Co}\x{AD}\x{61C}\x{180E}\x{200E}\x{200F}\x{202A}-\x{202E}\x{2060}-\x{206F}\x{FEFF}\x{FFFD}]"
    r"|[\p{Cc}&&[^\s]]"
)
# Thai, Lao, Myanmar, Khmer and kana write whole sentences as one word, which a single unseen letter would make unknown.
# Runs of them are split after this many letters with their marks.
_UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\ua9e0-\ua9ff\uaa60-\uaa7f\uff66-\uff9f]"
_UNSPACED_LETTER = re.compile(_UNSPACED)
_RUN_LENGTH = 16
_MAY_HOLD_LONG_WORD = re.compile(rf"\S{{{MAX_WORD_CHARACTERS + 1}}}")


def _wrap(backend: Tokenizer, context_length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="right",
    )


def _normalizer() -> normalizers.Normalizer:
    """Returns a normalizer that lower-cases, keeps accents as separate characters (NFD), and drops invisible ones."""
    return normalizers.Sequence(
        [
            normalizers.NFD(),
            normalizers.Replace(Regex(_INVISIBLE), ""),
            normalizers.Replace("\u200b", " "),  # where Khmer and Thai may break a line: between words
            normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=True),
        ]
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Returns a splitter at white space, punctuation and ideographs that also splits long runs of unspaced scripts."""
    runs = pre_tokenizers.Split(Regex(f"(?:(?={_UNSPACED})\\X){{1,{_RUN_LENGTH}}}"), behavior="isolated")
    return pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), runs])


def train_wordpiece(captions: Iterable[str], *, vocab_size: int = 4096, context_length: int = 32):
    """Learns a lower-cased word-piece tokenizer from captions; padding is id 0 and no special token is added.

    The same captions give the same tokenizer. `tokenizers` alone numbers the letters inside words in the random order
    of a hash table, and breaks ties between pieces by these numbers; here they are given to it, sorted.

    Args:
        captions: texts to learn from; only the first [`MAX_VOCABULARY_CHARACTERS`] characters are used, without words
            longer than [`MAX_WORD_CHARACTERS`].
        vocab_size: maximum number of pieces, but never fewer than the captions have different characters.
        context_length: the model's context in tokens; the tokenizer's `model_max_length`.
    """
    texts = list(_learnable(captions))
    first = [PAD, UNKNOWN, *_inner_letters(texts)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=first, show_progress=False, min_frequency=2
    )
    learning = _backend({})
    learning.train_from_iterator(texts, trainer=trainer)
    backend = _backend(learning.get_vocab())  # in which letters are not special tokens
    backend.add_special_tokens([PAD, UNKNOWN])
    return _wrap(backend, context_length)


def _backend(vocabulary: dict[str, int]) -> Tokenizer:
    model = models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=MAX_WORD_CHARACTERS)
    backend = Tokenizer(model)
    backend.normalizer = _normalizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = _pre_tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _inner_letters(texts: list[str]) -> list[str]:
    """Lists the pieces of one letter that continue a word of the texts, `##a`, sorted."""
    normalizer = _normalizer()
    pre_tokenizer = _pre_tokenizer()
    found: set[str] = set()
    for text in texts:
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)):
            found.update(word[1:])
    return [f"##{letter}" for letter in sorted(found)]


def _learnable(captions: Iterable[str]) -> Iterator[str]:
    """Yields bounded captions without long words, up to a total limit, and then letters of unspaced scripts."""
    # A separate normalizer, because that of the tokenizer being trained is locked until the training ends.
    normalizer = _normalizer()
    pre_tokenizer = _pre_tokenizer()
    unspaced: set[str] = set()
    left = MAX_VOCABULARY_CHARACTERS
    for caption in captions:
        text = bound_text(caption)
        left -= len(text)
        if left < 0:
            break
        if _MAY_HOLD_LONG_WORD.search(text):
            words = [word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))]
            if any(len(word) > MAX_WORD_CHARACTERS for word in words):
                text = " ".join(word for word in words if len(word) <= MAX_WORD_CHARACTERS)
        unspaced.update(_UNSPACED_LETTER.findall(normalizer.normalize_str(text)))
        yield text
    # A run with a letter never seen in first place, or never after another, would be unknown as a whole.
    yield from (letter + letter for letter in sorted(unspaced))


def load_tokenizer(name_or_path: str, *, context_length: int, special_tokens: bool) -> PreTrainedTokenizerBase:
    """Loads a fast tokenizer from the Hub or a folder; see [`fit_tokenizer`].

    Args:
        name_or_path: folder or Hub id for `AutoTokenizer.from_pretrained`, e.g. `google-bert/bert-base-uncased`.
        context_length: see [`fit_tokenizer`].
        special_tokens: likewise.

    Raises:
        ValueError: the tokenizer has no fast backend, or no padding token.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    return fit_tokenizer(tokenizer, name_or_path, context_length=context_length, special_tokens=special_tokens)


def fit_tokenizer(
    tokenizer: PreTrainedTokenizerBase, name: str, *, context_length: int, special_tokens: bool
) -> PreTrainedTokenizerBase:
    """Gives a tokenizer the model's context, and takes its special tokens away where they are not wanted.

    Args:
        tokenizer: a fast tokenizer, which may be changed.
        name: its folder or Hub id, for messages.
        context_length: the model's context in tokens; becomes `model_max_length`.
        special_tokens: False keeps only the word pieces, as in the official FLIP (BERT vocabularies); True leaves the
            tokenizer unchanged, as a CLIP tokenizer requires.

    Raises:
        ValueError: the tokenizer has no fast backend, or no padding token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"The tokenizer {name!r} has no fast version; FLIP needs one (tokenizer.json). For a SigLIP's, name its "
            "folder instead of its Hub id."
        )
    if tokenizer.pad_token is None:
        raise ValueError(f"The tokenizer {name!r} has no padding token; set one and save it.")
    own: Any = tokenizer.backend_tokenizer
    if not special_tokens and own.post_processor is not None:
        backend = Tokenizer.from_str(own.to_str())
        backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            model_max_length=context_length,
            model_input_names=["input_ids", "attention_mask"],
            pad_token=tokenizer.pad_token,
            unk_token=tokenizer.unk_token,
            padding_side="right",
        )
    tokenizer.model_max_length = context_length
    return tokenizer


class Pooling(Protocol):
    """The fields of a text tower's configuration that name the token from which a text's feature is pooled."""

    @property
    def pooling_type(self) -> str: ...

    @property
    def eos_token_id(self) -> int | None: ...


def check_pooling(tokenizer: PreTrainedTokenizerBase, text_config: Pooling) -> None:
    """Checks that the tokenizer gives every text the token from which its feature is pooled.

    Args:
        tokenizer: the tokenizer as it will be used.
        text_config: configuration of the model's text tower.

    Raises:
        ValueError: `pooling_type` is `eos` or `argmax`, and there is no end-of-text token where it is expected: the
            feature would be that of an arbitrary token.
    """
    pooling = text_config.pooling_type
    wanted = text_config.eos_token_id
    if pooling not in ("eos", "argmax"):
        return
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    if (wanted in ids) if pooling == "eos" else (ids and ids[-1] == max(ids) and ids[-1] in tokenizer.all_special_ids):
        return
    looked_for = f"token {wanted}" if pooling == "eos" else "the special token with the highest id"
    raise ValueError(
        f'pooling_type="{pooling}" reads the feature of a text at {looked_for}, but the tokenizer does not add it: '
        f"'a' becomes {ids}. Keep the tokenizer's special tokens (--special_tokens), make eos_token_id the one that it "
        'ends texts with, or take pooling_type="first".'
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that every token id has a row in the model's embedding table.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens, the model's table only {vocab_size:,}. Use the tokenizer "
            "that the model was trained with, or train a model with a larger text_config.vocab_size."
        )
