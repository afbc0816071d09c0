"""Names of models and data: which are the Hub's, and what of a path is anybody else's business."""

import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Endings of files, which no name on the Hub has.
FILE_ENDINGS = (".tar", ".gz", ".tgz", ".zip", ".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".txt", ".yaml")


def is_hub_id(name: str) -> bool:
    """Tells whether a name is a Hub id, as far as its form and the files at hand tell."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(FILE_ENDINGS) and not Path(name).exists()


def short_name(name: str) -> str:
    """A name without the folders of this machine: of a folder its name, of a file or a pattern also its folder's.

    URLs and names on the Hub stay as they are.
    """
    if "://" in name or is_hub_id(name):
        return name
    path = Path(name)
    parts = [part for part in path.parts if part not in (path.anchor, "~", "..")]
    return "/".join(parts[-2:] if path.suffix else parts[-1:]) or name


# A path from the root, or from home, of two parts and more: in quotes, or where no letter that may be in one stands.
_QUOTED = re.compile(r"""(?<=(?P<quote>["'`]))(?:~|[A-Za-z]:)?[/\\][^"'`\n]+(?=(?P=quote))""")
_PLAIN = re.compile(r"(?<![\w/.:~*}-])~?/(?:[\w.@+,%={}*?-]+/)+[\w.@+,%={}*?-]*")


def without_paths(value: Any) -> Any:
    """A text, or all texts and keys of lists and mappings, with [`short_name`]s in place of paths of this machine."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~/")) and "\n" not in value:
        return short_name(value)
    shortened = _QUOTED.sub(lambda match: short_name(match[0]), value)
    return _PLAIN.sub(lambda match: short_name(match[0]), shortened)
