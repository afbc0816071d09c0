"""Decides what a folder of shards is made of, and whether an earlier call's work can be resumed.

It can with the same options and the same data, which may have changed since under the same name. Only shards of which
nothing was read may change: one that could not be read may have been repaired.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flip_hf.console.files import replacing
from flip_hf.console.json_types import JsonObject
from flip_hf.curation.contents import caption_columns
from flip_hf.curation.leaving_out import Unwanted
from flip_hf.curation.spool import Progress
from flip_hf.curation.state import damaged, read_state
from flip_hf.data.extent import bytes_of_shards, extent_of
from flip_hf.data.sources import Source

if TYPE_CHECKING:
    from flip_hf.curation.sharding import ShardOptions

_PLAN = "plan.json"
# More than there are workers at most.
_MAX_PARTS = 2**16


def identity(source: Source, options: "ShardOptions", unwanted: Unwanted | None) -> JsonObject:
    """Returns everything that decides what is written, but for the data's contents."""
    written = asdict(options)
    written.pop("skip_unreadable")  # it is added when reading has failed
    return {
        "data": source.name,
        "source_shards": source.shards.num_shards,
        "image_column": source.image_column,
        "caption_columns": [[column.name, column.weight] for column in caption_columns(source)],
        **json.loads(json.dumps(written)),
        "left_out": unwanted and unwanted.digest,
    }


def check_same(folder: Path, made_of: JsonObject, wanted: JsonObject) -> None:
    """Checks that a folder's shards are those that are wanted.

    Raises:
        ValueError: they are made of other data, or with other options.
    """
    differing = [name for name in wanted if made_of.get(name) != wanted[name]]
    if differing:
        said = "; ".join(f"{name} was {made_of.get(name)}, now {wanted[name]}" for name in differing)
        raise ValueError(f"{folder} has shards of another command: {said}. Give the same options, or another folder.")


def check_extent(folder: Path, before: JsonObject | None, now: JsonObject) -> None:
    """Checks that the data are of the extent that they had when a folder was begun, if that is known.

    Raises:
        ValueError: they have changed since.
    """
    changed = [name for name in now if before is not None and before.get(name) != now[name]]
    if before is not None and changed:
        said = "; ".join(f"{name}: {before.get(name)} then, {now[name]} now" for name in changed)
        raise ValueError(
            f"{folder} was begun with data that have changed since ({said}): remove it to begin again, or name a new "
            "folder."
        )


def begin(work: Path, wanted: JsonObject, source: Source, workers: int) -> int:
    """Writes the plan, or checks that of the earlier call; returns the number of tracks of a shard.

    Raises:
        ValueError: the folder is of another command, or its plan is damaged.
    """
    path = work / _PLAN
    if path.exists() or path.is_symlink():
        plan = read_state(path, {"made_of": dict, "parts": int})
        check_same(work.parent, plan["made_of"], wanted)
        if not 1 <= plan["parts"] <= _MAX_PARTS:
            raise damaged(path)
        return plan["parts"]
    parts = max(1, -(-workers // source.shards.num_shards))
    _write(path, wanted, parts, source)
    return parts


def check_data(work: Path, source: Source, progress: dict[int, Progress]) -> None:
    """Checks that what was read of the data has not changed since; a change of other shards is noted in the plan.

    Args:
        work: the folder with the plan.
        source: the data.
        progress: the state of each track that was begun.

    Raises:
        ValueError: it has changed, or the plan is damaged.
    """
    path = work / _PLAN
    kinds = {"made_of": dict, "parts": int, "extent": dict | None, "shard_bytes": list}
    plan = read_state(path, kinds)
    sizes = bytes_of_shards(source.shards)
    now = extent_of(source.shards)
    if plan["extent"] == now and plan["shard_bytes"] == sizes:
        return
    begun = {track // plan["parts"] for track, state in progress.items() if state.files}
    if not sizes or len(plan["shard_bytes"]) != len(sizes):
        check_extent(work.parent, plan["extent"], now)
    for shard in sorted(begun):
        before = {source.shards.name(shard): plan["shard_bytes"][shard]}
        check_extent(work.parent, before, {source.shards.name(shard): sizes[shard]})
    _write(path, plan["made_of"], plan["parts"], source)


def _write(path: Path, made_of: JsonObject, parts: int, source: Source) -> None:
    plan = {
        "made_of": made_of,
        "parts": parts,
        "extent": extent_of(source.shards),
        "shard_bytes": bytes_of_shards(source.shards),
    }
    with replacing(path) as new:
        new.write_text(json.dumps(plan), encoding="utf-8")
