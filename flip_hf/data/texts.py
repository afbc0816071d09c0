"""Reads captions, labels and JSON from untrusted data within bounds; no context takes megabytes of text."""

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from flip_hf.data.refusals import RefusedSample

# Characters of a caption, label or prompt that are tokenized: eight per token for a context of 1,024, where English has
# four to five. CLIP's context is 77 tokens.
MAX_CAPTION_CHARACTERS = 8192
# Captions per image; data sets for retrieval have five or ten.
MAX_CAPTIONS = 1000
# All captions of one image together, and JSON, whose Python objects are thirty times as large.
MAX_TEXT_BYTES = 2**20
MAX_JSON_BYTES = 4 * 2**20

# This many brackets cannot be nested too deeply.
_SHALLOW = 200
_WORD = re.compile(r"\S+\s?")


def bound_text(text: str) -> str:
    """Truncates a text to [`MAX_CAPTION_CHARACTERS`] characters; a shorter one is returned unchanged.

    White space at the beginning of a long text, and all but the first character of other white space in it, is dropped,
    so that it does not take the place of words.
    """
    if len(text) <= MAX_CAPTION_CHARACTERS:
        return text
    pieces: list[str] = []
    room = MAX_CAPTION_CHARACTERS
    for word in _WORD.finditer(text):
        pieces.append(text[word.start() : min(word.end(), word.start() + room)])
        room -= len(pieces[-1])
        if room == 0:
            break
    return "".join(pieces)


def is_unicode(text: str) -> bool:
    r"""Returns whether a text can be encoded: JSON may hold half a character (`"\ud800"`), which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_caption(value: object) -> str:
    """Reads one caption from text or UTF-8 bytes and truncates it (see [`bound_text`]); line breaks are white space.

    Raises:
        RefusedSample: it is missing, empty, not text, or takes megabytes.
    """
    if isinstance(value, (bytes, bytearray, str)) and len(value) > MAX_TEXT_BYTES:
        raise RefusedSample("oversized caption")
    if isinstance(value, (bytes, bytearray)):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RefusedSample("caption is not UTF-8") from error
    if value is None:
        raise RefusedSample("missing caption")
    if not isinstance(value, str):
        raise RefusedSample("caption is not text")
    if not value.strip():
        raise RefusedSample("empty caption")
    value = bound_text(value)
    if not is_unicode(value):
        raise RefusedSample("caption is not UTF-8")
    return value


def usable_captions(values: Sequence[object]) -> list[str]:
    """Returns the captions that [`read_caption`] can read."""
    usable = []
    for value in values:
        with contextlib.suppress(RefusedSample):
            usable.append(read_caption(value))
    return usable


def read_json(text: str | bytes) -> Any:
    """Reads a JSON text.

    Raises:
        RefusedSample: it is damaged, nested too deeply, or larger than [`MAX_JSON_BYTES`].
    """
    if len(text) > MAX_JSON_BYTES:
        raise RefusedSample("oversized JSON")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedSample("damaged JSON") from error


def check_json_lines(path: str) -> None:
    """Checks a file of JSON lines before Arrow reads it, which crashes the process at deep nesting (pyarrow 26).

    Raises:
        ValueError: a line is too long, or nested too deeply; the message names it.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSON_BYTES + 1), b""), start=1):
            try:
                if len(line) > MAX_JSON_BYTES or line.count(b"[") + line.count(b"{") > _SHALLOW:
                    read_json(line)
            except RefusedSample as refused:
                raise ValueError(f"{path}, line {number}: {refused.reason}. Fix or remove the line.") from None
