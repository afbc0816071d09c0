"""Makes a tokenizer read texts as open_clip does, which cleans them before it and changes the ids after it.

open_clip's SigLIP takes texts in lower case without punctuation (`clean` is `canonicalize`), as big_vision does; its
CLIPA has the id 0 in place of BERT's [SEP] (`strip_sep_token`). Both become a part of the tokenizer here, and are saved
with it.
"""

import re
import string

from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.errors import ConversionError

CLEANING = {
    "whitespace": [],
    "lower": [normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ],
}
# Texts that show whether a separator was replaced as open_clip does it.
_PROBES = ("", "a", "a photo of a cat")


def _options(text_cfg: JsonObject) -> tuple[str, bool]:
    """Returns how texts are cleaned, and whether separators are replaced.

    Raises:
        ConversionError: there are other options, or values that open_clip does not know.
    """
    given = text_cfg.get("tokenizer_kwargs") or {}
    if not isinstance(given, dict):
        raise ConversionError(f"This open_clip model's text_cfg.tokenizer_kwargs must be an object, got {given!r:.80}.")
    clean = given.get("clean", "whitespace")
    strip = given.get("strip_sep_token", False)
    others = sorted(given.keys() - {"clean", "strip_sep_token"})
    if others or not isinstance(clean, str) or clean not in CLEANING or type(strip) is not bool:
        raise ConversionError(
            f"This open_clip model has text_cfg.tokenizer_kwargs = {given!r:.200}, which FLIP does not support. It has "
            f"clean ({', '.join(CLEANING)}) and strip_sep_token (true or false)."
        )
    return clean, strip


def _without_separator(tokenizer: PreTrainedTokenizerBase) -> TemplateProcessing:
    """Returns the part of a tokenizer that adds the special tokens, with the id 0 in the separator's place.

    Raises:
        ConversionError: the tokenizer is not of BERT's kind.
    """
    first = tokenizer.cls_token
    zero = tokenizer.convert_ids_to_tokens(0)
    if not isinstance(first, str) or tokenizer.sep_token is None or not isinstance(zero, str):
        raise ConversionError(
            "This open_clip model has text_cfg.tokenizer_kwargs.strip_sep_token, but its tokenizer has no [CLS] or no "
            "[SEP]. Give BERT's: --tokenizer google-bert/bert-base-uncased."
        )
    special = [(first, tokenizer.convert_tokens_to_ids(first)), (zero, 0)]
    return TemplateProcessing(single=[first, "$A", zero], special_tokens=special)


def read_as_open_clip(tokenizer: PreTrainedTokenizerBase, text_cfg: JsonObject) -> PreTrainedTokenizerBase:
    """Returns a tokenizer that gives open_clip's ids: the one given, if it does so already.

    Args:
        tokenizer: the one that open_clip's `HFTokenizer` would load.
        text_cfg: open_clip's configuration of the text tower.

    Raises:
        ConversionError: open_clip changes texts or ids in a way that cannot be part of this tokenizer.
    """
    if not text_cfg.get("hf_tokenizer_name"):  # CLIP's own, which cleans texts itself
        return tokenizer
    clean, strip = _options(text_cfg)
    if clean == "whitespace" and not strip:
        return tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConversionError(
            "This open_clip model has text_cfg.tokenizer_kwargs, which cannot be a part of a "
            f"{type(tokenizer).__name__}. Give a tokenizer with a tokenizer.json."
        )
    expected = [tokenizer(text).input_ids for text in _PROBES]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    theirs = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*CLEANING[clean], *theirs])
    if strip:
        backend.post_processor = _without_separator(tokenizer)
    # Of the general class, because the model's own makes its parts anew when it is loaded.
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map,
    )
    if strip:
        expected = [[0 if token == tokenizer.sep_token_id else token for token in ids] for ids in expected]
    if expected != [made(text).input_ids for text in _PROBES]:
        raise ConversionError(
            "This open_clip model has text_cfg.tokenizer_kwargs, which cannot be a part of its tokenizer: the ids "
            "would differ."
        )
    return made
