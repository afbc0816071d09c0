"""Checks a visitor's input, and formats answers as HTML."""

import html
import re
from collections.abc import Mapping, Sequence

from flip_hf.data.texts import is_unicode
from flip_hf.evaluation.templates import PROMPT_SETS, fault_of

# More rows would add nothing.
MAX_ROWS = 10
# With 80 prompts each, this bounds the texts that a visitor can have encoded at once.
MAX_LABELS = 200
# Maximum characters of the labels, the prompt and the query. The page's fields enforce them, but its API does not.
MAX_LABELS_TEXT = 20_000
MAX_PROMPT = 500
MAX_QUERY = 1000


def read_labels(text: str | None) -> list[str]:
    """Parses labels separated by commas or lines, without duplicates.

    Raises:
        ValueError: there are no labels, too many, or they are too long.
    """
    _check_text(text, MAX_LABELS_TEXT, "The labels")
    labels = [part.strip() for part in re.split(r"[,\n]", text or "")]
    labels = list(dict.fromkeys(label for label in labels if label))
    if not labels:
        raise ValueError("Write the labels to choose from: at least two, separated by commas or lines.")
    if len(labels) > MAX_LABELS:
        raise ValueError(f"These are {len(labels):,} labels; the page takes {MAX_LABELS} at most.")
    return labels


def read_query(text: str | None) -> str:
    """Checks a query.

    Raises:
        ValueError: it is empty or too long.
    """
    _check_text(text, MAX_QUERY, "The text")
    wanted = (text or "").strip()
    if not wanted:
        raise ValueError("Write what to search for.")
    return wanted


def _check_text(text: str | None, limit: int, name: str) -> None:
    if len(text or "") > limit:
        raise ValueError(f"{name} must not be longer than {limit:,} characters.")
    if not is_unicode(text or ""):
        raise ValueError(f"{name} must be Unicode text.")


def read_prompt(text: str | None) -> str:
    """Checks a prompt with one place for the label, or the name of a prompt set.

    Raises:
        ValueError: it is neither, or too long. It is untrusted: anything else that `str.format` understands is refused.
    """
    _check_text(text, MAX_PROMPT, "The prompt")
    prompt = (text or "").strip()
    if prompt in PROMPT_SETS:
        return prompt
    if prompt.count("{}") != 1 or prompt.count("{") + prompt.count("}") != 2:
        fault = fault_of(prompt) or "has other braces, which this page does not accept."
        raise ValueError(
            f"The prompt {fault} Write {{}} once, where the label goes; or name one of {', '.join(PROMPT_SETS)}."
        )
    return prompt


def ratio_in_words(mask_ratio: float) -> str:
    """Describes a mask ratio for a heading."""
    return f"{mask_ratio:.0%} dropped" if mask_ratio else "whole image"


def view_in_words(mask_ratio: float) -> str:
    """Describes the view of the image behind an answer, for its heading."""
    return f"the masked view, {mask_ratio:.0%} of the patches dropped" if mask_ratio else "the whole image"


def comparison_table(mask_ratios: Sequence[float], answers: Sequence[Mapping[str, float]]) -> str:
    """Formats probabilities as a table with bars, one row per label, best first, and one column per mask ratio.

    Args:
        mask_ratios: the ratios; the first one determines the order of the rows.
        answers: probabilities by label, one dictionary per ratio.
    """
    heads = "".join(f"<th>{ratio_in_words(ratio)}</th>" for ratio in mask_ratios)
    rows = []
    for label in sorted(answers[0], key=answers[0].__getitem__, reverse=True)[:MAX_ROWS]:
        cells = "".join(
            f'<td><span class="bar" style="width: {answer[label]:.1%}"></span><span>{answer[label]:.1%}</span></td>'
            for answer in answers
        )
        rows.append(f"<tr><th>{html.escape(label)}</th>{cells}</tr>")
    more = len(answers[0]) - len(rows)
    first = ratio_in_words(mask_ratios[0])
    note = f"<p>… and {more} labels less probable for the {first}.</p>" if more else ""
    body = f"<thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<table class="comparison">{body}</table>{note}'
