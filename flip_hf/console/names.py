"""Names of models and data: which are on the Hub, and paths shortened for publication."""

import re
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Extensions of files, which no Hub id has.
FILE_ENDINGS = (".tar", ".gz", ".tgz", ".zip", ".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".txt", ".yaml")


def is_hub_id(name: str) -> bool:
    """Returns whether a name is a Hub id, judging by its form and by the local files."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(FILE_ENDINGS) and not Path(name).exists()


def short_name(name: str) -> str:
    """Strips a machine's folders from a path: a folder keeps its name, a file or pattern also its folder's.

    URLs and names on the Hub stay as they are.
    """
    if "://" in name or is_hub_id(name):
        return name
    path = Path(name)
    parts = [part for part in path.parts if part not in (path.anchor, "~", "..")]
    return "/".join(parts[-2:] if path.suffix else parts[-1:]) or name


# A path of two or more parts from the root or from home: in quotes, or not preceded by a character of a path.
_QUOTED = re.compile(r"""(?<=(?P<quote>["'`]))(?:~|[A-Za-z]:)?[/\\][^"'`\n]+(?=(?P=quote))""")
_PLAIN = re.compile(r"(?<![\w/.:~*}-])~?/(?:[\w.@+,%={}*?-]+/)+[\w.@+,%={}*?-]*")


def without_paths(value: Any) -> Any:  # Any: texts stay texts, lists lists, which no simple signature says
    """Replaces a machine's paths by [`short_name`]s in a text, or in all texts and keys of lists and mappings."""
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


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 shard`, `2,000 shards`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"
