"""The folder of a data set's features: `embeddings.json`, which says what they are of, and the parquet files."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flip_hf.console.files import file_digest, read_text, replacing, unfinished
from flip_hf.console.json_types import JsonObject
from flip_hf.console.lock import LOCK
from flip_hf.console.names import counted
from flip_hf.retrieval.blocks import UNREADABLE, Block
from flip_hf.retrieval.parts import PATTERN, Part, part_path, read_part

MANIFEST = "embeddings.json"
REFUSED = "refused.jsonl"
INDEX = "index.faiss"
FORMAT = "flip_hf embeddings 1"
_MAX_BYTES = 64 * 2**20
# Names that `part_path` makes; any other in `embeddings.json` could lead out of the folder.
_PART_NAME = re.compile(r"part-\d{5,}-\d{5,}\.parquet")
# What a run that was ended leaves behind; other unfinished files in the folder are not ours.
_LEFT_BEHIND = tuple(unfinished(Path(name)).name for name in (PATTERN, INDEX, MANIFEST))
# What is read of a model, the data and the options later.
_NEEDED = {
    "model": ("name", "revision"),
    "data": ("name", "kind", "split", "config", "image_column", "caption_column"),
    "options": ("precision",),
}


@dataclass
class Manifest:
    """The content of `embeddings.json`.

    Attributes:
        model: the model's name, `revision`, and digests of its parts.
        data: the data set's name and what was asked of it.
        options: the options that features depend on.
        finished: whether all of the data are in the files.
        images, captions: numbers of both.
        width: E, the length of a feature.
        refused: samples that could not be used, by reason.
        files: size in rows and SHA-256 of each file of features.
        index: kind, file and SHA-256 of the index, if there is one.
        environment: versions and hardware, for information.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    options: dict[str, Any]
    finished: bool = False
    images: int = 0
    captions: int = 0
    width: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    index: dict[str, str] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def decides(self) -> dict[str, Any]:
        """Everything that decides the features, by name; the model by its content, wherever it lies."""
        model = {f"the model's {name}": value for name, value in self.model.items() if name not in ("name", "revision")}
        data = {f"the data's {name}": value for name, value in self.data.items()}
        return {**model, **data, **{f"--{name}": value for name, value in self.options.items()}}

    @property
    def identity(self) -> str:
        """A digest of what decides the features."""
        return hashlib.sha256(json.dumps(self.decides, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `embeddings.json`, whole."""
    with replacing(folder / MANIFEST) as path:
        path.write_text(json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Reads `embeddings.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another version.
    """
    if (folder / MANIFEST).is_symlink():
        raise ValueError(f"{folder / MANIFEST} is a link, and the file it leads to may be of another folder: copy it.")
    text = read_text(folder / MANIFEST, "what features are of; `flip-hf embed` writes it", _MAX_BYTES)
    try:
        values: JsonObject = json.loads(text)
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        manifest = Manifest(**values)
        _check(manifest)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is damaged ({error}). Embed the data again, into a new folder."
        ) from None


def _check(manifest: Manifest) -> None:
    """Checks the values of a manifest, which may have come from anyone.

    Raises:
        ValueError: one is of the wrong type, or names a file that is not one of features.
        KeyError: one is missing.
    """
    usual = Manifest({}, {}, {})
    for name in (each.name for each in fields(usual) if each.name != "index"):
        if type(getattr(manifest, name)) is not type(getattr(usual, name)):
            raise ValueError(f"wrong value: {name}")
    for name, needed in _NEEDED.items():
        for key in needed:
            if not isinstance(getattr(manifest, name)[key], str if key == "name" else str | None):
                raise ValueError(f"wrong value: {name}, {key}")
    _check_files(manifest.files)
    if not all(type(count) is int for count in manifest.refused.values()):
        raise ValueError("wrong value: refused")
    if manifest.index is not None and not all(isinstance(manifest.index[key], str) for key in ("kind", "sha256")):
        raise ValueError("wrong value: index")


def _check_files(files: dict[str, dict[str, Any]]) -> None:
    for name, about in files.items():
        if not _PART_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a file of features")
        if type(about["rows"]) is not int or not isinstance(about["sha256"], str):
            raise ValueError(f"wrong value: files, {name}")


def check_folder(folder: Path) -> None:
    """Refuses an existing folder of files that are not features, before anything is written there.

    Raises:
        ValueError: it holds files of another kind.
    """
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return
    ours = {LOCK, *(path.name for path in _left_behind(folder))}
    others = [name for name in os.listdir(folder) if name not in ours]
    if others:
        raise ValueError(f"{folder} holds other files, such as {min(others)}, and no features: name a new folder.")


def _left_behind(folder: Path) -> list[Path]:
    return [path for pattern in _LEFT_BEHIND for path in folder.glob(pattern)]


def take_folder(folder: Path, wanted: Manifest) -> Manifest:
    """Begins a folder, or checks that one that was begun is of the same model, data and options.

    Returns:
        What is in it so far.

    Raises:
        ValueError: it holds features of something else, or files of another kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_folder(folder)
    if not (folder / MANIFEST).exists():
        write_manifest(folder, wanted)
    found = read_manifest(folder)
    before = found.decides
    now = wanted.decides
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"{folder} holds features of something else: {', '.join(changed)} differ. Give the same, or name a new "
            "folder."
        )
    for path in _left_behind(folder):
        path.unlink(missing_ok=True)
    return found


def reopen(folder: Path, manifest: Manifest) -> None:
    """Marks a finished folder as one that is not, before its files are written again.

    If that does not end, as where one of several shards still cannot be read, the manifest would be of other files.
    """
    if manifest.finished:
        manifest.finished = False
        write_manifest(folder, manifest)


@dataclass(frozen=True)
class Expected:
    """The files that count as those of a folder.

    Attributes:
        identity: digest of what decides the features.
        shards: number of shards of the data.
        skip_unreadable: whether a shard may be left out from where it could not be read on.
    """

    identity: str
    shards: int
    skip_unreadable: bool

    def includes(self, part: Part) -> bool:
        """Returns whether a file of features is one of those."""
        is_skipped = any(reason == UNREADABLE for reason, _ in part.ending.damage)
        known = part.identity == self.identity and part.block.shard < self.shards
        return known and (self.skip_unreadable or not is_skipped)


def find_parts(folder: Path, wanted: Expected) -> tuple[dict[Block, bool], list[Path]]:
    """Finds the blocks that a folder has files of.

    Returns:
        Whether its shard ends in each block; and the files that are damaged, or belong to another run, and count as not
        there.
    """
    there: dict[Block, bool] = {}
    unusable: list[Path] = []
    for path in sorted(folder.glob(PATTERN)):
        try:
            part = read_part(path)
        except ValueError:
            unusable.append(path)
            continue
        if wanted.includes(part) and part_path(folder, part.block) == path:
            there[part.block] = part.ending.is_last
        else:
            unusable.append(path)
    return there, unusable


def finish(folder: Path, manifest: Manifest, names: Callable[[int], str], width: int, wanted: Expected) -> Manifest:
    """Writes the final `embeddings.json`, which it returns, and `refused.jsonl` if samples could not be used.

    Args:
        folder: the folder, with all files of features.
        manifest: what was begun; it is completed.
        names: gives the source's name of a shard.
        width: E.
        wanted: the files that count.

    Raises:
        ValueError: files are missing, since shards could not be read.
    """
    there, _ = find_parts(folder, wanted)
    _check_whole(there, wanted.shards, names)
    before = manifest.files
    manifest.files = {}
    manifest.images = manifest.captions = 0
    refused: Counter[str] = Counter()
    damage: dict[tuple[str, str], None] = {}
    with replacing(folder / REFUSED) as listing, listing.open("w", encoding="utf-8") as listed:
        for block in sorted(there):
            path = part_path(folder, block)
            part = read_part(path)
            manifest.images += part.images
            manifest.captions += part.captions
            manifest.files[path.name] = {"rows": part.images, "sha256": file_digest(path)}
            damage.update(dict.fromkeys(part.ending.damage))
            for row, key, reason in part.ending.refused:
                refused[reason] += 1
                listed.write(_line(names(block.shard), row, key, reason))
        for reason, detail in damage:
            refused[reason] += 1
            listed.write(_line(detail, None, None, reason))
    if manifest.files != before:
        manifest.index = None  # it is of the files before
    if not refused:
        (folder / REFUSED).unlink()
    manifest.refused = dict(sorted(refused.items()))
    manifest.width = width
    manifest.finished = True
    write_manifest(folder, manifest)
    return manifest


def _check_whole(there: dict[Block, bool], shards: int, names: Callable[[int], str]) -> None:
    """Checks that there are all blocks of all shards, each up to the one in which its shard ends.

    Raises:
        ValueError: some are missing; the message names the first of these shards.
    """
    last = {block.shard: block.number for block, is_last in there.items() if is_last}
    found = Counter(block.shard for block in there)
    unread = [shard for shard in range(shards) if shard not in last or found[shard] != last[shard] + 1]
    if unread:
        raise ValueError(
            f"{counted(len(unread), 'shard')} could not be read to the end, such as {names(unread[0])}; all others are "
            "encoded. Give the same command again to retry, or add --skip_unreadable to leave out what cannot be read."
        )


def _line(shard: str, row: int | None, key: str | None, reason: str) -> str:
    return json.dumps({"shard": shard, "row": row, "key": key, "reason": reason}) + "\n"
