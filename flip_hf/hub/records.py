"""Copies the records of a model's making without secrets: recipe, results, curves, logs, card, licence, evaluation."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import yaml

from flip_hf.console.names import without_paths
from flip_hf.hub.card import CARD
from flip_hf.hub.inspection import texts
from flip_hf.hub.regular import NotRegularError, RegularFiles
from flip_hf.redaction import redact, redacted

logger = logging.getLogger(__name__)

MIB = 2**20
# Names and largest sizes.
LOGS = {"log.jsonl": 512 * MIB, CARD: MIB, **dict.fromkeys(("LICENSE", "LICENSE.md", "LICENSE.txt"), MIB)}
RECORDS = {"recipe.yaml": MIB, "results.json": 16 * MIB, "training_curves.png": 64 * MIB}
REPORT = "evaluation/results.json"
EVALUATION = {REPORT: 16 * MIB, "evaluation/results.md": 16 * MIB}
# Files that only this package writes, in which paths of this machine are shortened.
_OWN_TEXTS = ("log.jsonl", "recipe.yaml", "results.json", *EVALUATION)
MAX_PICTURE = 64 * MIB
# Trackers write one file here and, for the options of the run, one in a subfolder named by the time.
EVENTS = "logs"
MAX_EVENTS = 512 * MIB
_EVENTS_FOLDER = re.compile(r"\d+(?:\.\d+)?")
_EVENTS_NAME = re.compile(r"(?P<kept>events\.out\.tfevents\.\d+)(?:\.(?P<host>.+))?")
_PICTURE_OF = re.compile(r"[\w .,@+=()\[\]-]{1,128}")


def copy_records(files: RegularFiles, logs: RegularFiles, target: Path) -> None:
    """Copies the existing records of a run, and warns of everything that is skipped or changed.

    Args:
        files: the folder that is published.
        logs: the folder of logs and card.
        target: the folder to copy to.
    """
    for name, limit in LOGS.items():
        _copy(logs, name, limit, target / name)
    for name, new_name in _event_files(logs):
        _copy(logs, name, MAX_EVENTS, target / new_name)
    for name, limit in {**RECORDS, **EVALUATION}.items():
        _copy(files, name, limit, target / name)
    for name in _pictures(target / REPORT):
        _copy(files, name, MAX_PICTURE, target / name)


def _copy(files: RegularFiles, name: str, limit: int, target: Path) -> None:
    """Copies a record without anything that looks like a secret, and warns if it is skipped."""
    path = files.root / name
    try:
        data = files.read(name, limit)
    except FileNotFoundError:
        return
    except NotRegularError as error:
        return logger.warning("%s It is skipped.", error)
    if _is_text(name):
        try:
            data = clean_text(data, path)
            if name in _OWN_TEXTS:
                data = _without_paths(data, path)
        except UnicodeDecodeError:
            return logger.warning("%s is not text and is skipped.", path)
    else:
        readable = texts(data)
        if redact(readable) != readable:
            return logger.warning("%s contains something like a token and is skipped.", path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def _is_text(name: str) -> bool:
    return not name.endswith(".png") and not name.startswith(f"{EVENTS}/")


def clean_text(data: bytes, path: Path) -> bytes:
    """Removes secrets from a text; returns the same bytes if there are none.

    Raises:
        UnicodeDecodeError: it is not text in UTF-8.
    """
    text = data.decode("utf-8")
    clean = redact(text)
    if path.suffix in _PARSED:
        clean = _PARSED[path.suffix](clean, redacted)
    if clean == text:
        return data
    logger.warning("Something like a token or a password was removed from %s.", path)
    return clean.encode("utf-8")


def _without_paths(data: bytes, path: Path) -> bytes:
    """Removes the folders of this machine from a record: they tell others nothing but who ran it."""
    text = data.decode("utf-8")
    parsed = _PARSED.get(path.suffix)
    clean = without_paths(text) if parsed is None else parsed(text, without_paths)
    return data if clean == text else clean.encode("utf-8")


# Takes secrets or paths out of the texts of a parsed value.
Clean = Callable[[object], object]


def _clean_json(text: str, cleaned: Clean) -> str:
    """Cleans JSON of what shows only when it is parsed: secrets behind escapes or under a telling key, and paths."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    clean = cleaned(value)
    return text if clean == value else json.dumps(clean, indent=2) + "\n"


def _clean_json_lines(text: str, cleaned: Clean) -> str:
    def clean(line: str) -> str:
        found = _clean_json(line, cleaned)
        return line if found == line else json.dumps(json.loads(found)) + "\n"

    # Escapes alone hide something from `redact`, and paths have slashes; most lines have neither.
    return "".join(clean(line) if "\\" in line or "/" in line else line for line in text.splitlines(keepends=True))


def _clean_yaml(text: str, cleaned: Clean) -> str:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text
    clean = cleaned(value)
    return text if clean == value else yaml.safe_dump(clean, sort_keys=False)


_PARSED = {".json": _clean_json, ".jsonl": _clean_json_lines, ".yaml": _clean_yaml}


def _event_files(logs: RegularFiles) -> list[tuple[str, str]]:
    """Returns TensorBoard's files and their published names, without the names of the host and the process."""
    found: list[tuple[str, str]] = []
    folders = [EVENTS, *(f"{EVENTS}/{name}" for name in logs.names(EVENTS) if _EVENTS_FOLDER.fullmatch(name))]
    for folder in folders:
        taken: dict[str, int] = {}
        for name in logs.names(folder):
            match = _EVENTS_NAME.fullmatch(name)
            if match is None:
                continue
            kept = match["kept"]
            taken[kept] = taken.get(kept, 0) + 1
            number = "" if taken[kept] == 1 else f".{taken[kept]}"
            found.append((f"{folder}/{name}", f"{folder}/{kept}{number}"))
    return found


def _pictures(report: Path) -> list[str]:
    """Returns the names of the pictures that `flip-hf evaluate` draws for the data sets in its report."""
    try:
        results = json.loads(report.read_text(encoding="utf-8"))["results"]
        names = list(dict.fromkeys(result["data_set"] for result in results))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    names = [name for name in names if isinstance(name, str) and _PICTURE_OF.fullmatch(name)]
    kinds = ("confusion", "probes", "retrieval_images_of_texts", "retrieval_texts_of_images")
    return ["evaluation/zero_shot.png", *(f"evaluation/{kind}_{name}.png" for name in names for kind in kinds)]
