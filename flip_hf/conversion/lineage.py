"""Traces the origin of a model: the Hub model at the beginning of a chain of conversions and runs."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from flip_hf.console.files import read_text
from flip_hf.console.names import is_hub_id

MAX_CARD_BYTES = 2**20
# In a run's results, the id of the model at the beginning of the chain.
BASE_MODEL = "base_model"


def base_model_of(name: str) -> str | None:
    """Returns the Hub id of the model that `name` is, or came from by conversions and runs, or None if unknown.

    Args:
        name: a Hub id or a folder; a folder's origin is in a conversion's card or a run's results.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name if is_hub_id(name) else None
    return _of_results(folder) or _of_card(folder)


def _of_results(folder: Path) -> str | None:
    try:
        return _hub_id(json.loads(read_text(folder / "results.json", "results")).get(BASE_MODEL))
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _of_card(folder: Path) -> str | None:
    try:
        card: Any = ModelCard(read_text(folder / "README.md", "a card", MAX_CARD_BYTES), ignore_metadata_errors=True)
        return _hub_id(card.data.base_model)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _hub_id(value: object) -> str | None:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) and is_hub_id(first) else None
