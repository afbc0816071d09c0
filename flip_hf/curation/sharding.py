"""Writes a data set as well-shuffled shards: any process may be killed at any time, and the next one resumes.

The data are read once, and their usable samples spooled beside the shards (`dealing.py`). Then the order of all samples
is drawn, and every shard is written from the spool (`writing.py`). The order depends on the places of the samples in
the data and on the seed, and so not on the number of processes, nor on where an earlier one was killed.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flip_hf.console.files import replacing
from flip_hf.console.json_types import JsonObject
from flip_hf.console.lock import lock_folder, unlock_folder
from flip_hf.console.names import counted
from flip_hf.curation.contents import caption_columns
from flip_hf.curation.dealing import Dealing, ImageForm
from flip_hf.curation.leaving_out import Unwanted
from flip_hf.curation.plan import begin, check_data, check_extent, check_same, identity
from flip_hf.curation.processes import WorkFailed, run_in_workers
from flip_hf.curation.shard_files import ShardFormat, check_columns, layout_of, make_columns
from flip_hf.curation.spool import Spool
from flip_hf.curation.state import damaged, read_state
from flip_hf.curation.writing import Writing
from flip_hf.data.extent import extent_of
from flip_hf.data.files import is_remote
from flip_hf.data.sources import Source

MANIFEST = "shards.json"
UNUSABLE = "unusable.json"
CLASSES = "classes.txt"
_WORK = ".work"
_MANIFEST = {
    "format": str,
    "samples": int,
    "bytes": int,
    "caption_column": str | None,
    "class_names": str | None,
    "unusable": dict,
    "left_out": int,
    "shards": list,
    "made_of": dict,
}
_SPOOL = "spool"
# What is written besides the images.
_SLACK = 1.05


@dataclass(frozen=True)
class ShardOptions:
    """Options that decide what is in the shards.

    Attributes:
        format: of the shards.
        samples_per_shard: samples of every shard but the last.
        seed: of their order.
        form: the form of images.
        split: the first part of the files' names.
        skip_unreadable: leave out shards of the data that cannot be read, or the rest of them.
    """

    format: ShardFormat
    samples_per_shard: int
    seed: int
    form: ImageForm
    split: str
    skip_unreadable: bool = False


def shard(source: Source, folder: Path, options: ShardOptions, workers: int, unwanted: Unwanted | None) -> JsonObject:
    """Writes a data set as shards into a folder, or goes on with what an earlier call has left.

    Args:
        source: the data.
        folder: the folder of the shards.
        options: what is in them.
        workers: processes; 0 works in this one.
        unwanted: samples that are left out.

    Returns:
        The manifest, as in [`MANIFEST`].

    Raises:
        ValueError: the folder holds something else, another process works in it, nothing in the data can be used, or
            there is too little room on the disk.
        WorkFailed: data cannot be read, or files cannot be written.
    """
    check_columns(caption_columns(source), options.format)
    wanted = identity(source, options, unwanted)
    if (folder / MANIFEST).exists() or (folder / MANIFEST).is_symlink():
        manifest = _read_manifest(folder / MANIFEST)
        check_same(folder, manifest["made_of"], wanted)
        check_extent(folder, manifest.get("extent"), extent_of(source.shards))
        shutil.rmtree(folder / _WORK, ignore_errors=True)
        return manifest
    work = folder / _WORK
    _check_empty(folder)
    work.mkdir(parents=True, exist_ok=True)
    lock_folder(work)
    try:
        parts = begin(work, wanted, source, workers)
        if options.form.short_side is None:
            _check_room(source, work)
        manifest = _finish(source, folder, options, workers, unwanted, parts)
        with replacing(folder / MANIFEST) as path:
            path.write_text(json.dumps({**manifest, "made_of": wanted}, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(work)
    finally:
        unlock_folder(work)
    return {**manifest, "made_of": wanted}


def _read_manifest(path: Path) -> JsonObject:
    """Reads the manifest of finished shards.

    Raises:
        ValueError: it is damaged.
    """
    manifest = read_state(path, _MANIFEST)
    counts = manifest["unusable"].values()
    if not all(type(count) is int for count in counts) or not isinstance(manifest.get("extent", {}), dict):
        raise damaged(path)
    return manifest


def _check_empty(folder: Path) -> None:
    if (folder / _WORK).is_symlink():  # all below it is removed in the end
        raise ValueError(f"{folder / _WORK} is a link: remove it, or name a new folder.")
    if folder.is_dir() and not (folder / _WORK).is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and holds no shards of this command: name a new folder.")


def _check_room(source: Source, work: Path) -> None:
    """Checks that the spool and the shards fit on the disk, where the size of the data is known.

    Raises:
        ValueError: they do not.
    """
    files = getattr(source.shards, "urls", ())
    if not files or any(is_remote(file) for file in files):
        return
    size = sum(os.path.getsize(file) for file in files)
    spooled = sum(path.stat().st_size for path in work.parent.rglob("*") if path.is_file())
    needed = 2 * _SLACK * size - spooled
    free = shutil.disk_usage(work).free
    if needed > free:
        raise ValueError(
            f"{work.parent} has {free / 1e9:,.1f} GB free, and up to {needed / 1e9:,.1f} GB are needed: twice the "
            "data, since a copy is kept while they are shuffled. Name a folder on a larger disk."
        )


def _finish(
    source: Source, folder: Path, options: ShardOptions, workers: int, unwanted: Unwanted | None, parts: int
) -> JsonObject:
    """Finishes what is left to do; returns the manifest."""
    names = [column.name for column in caption_columns(source)]
    spool = Spool(folder / _WORK / _SPOOL, source.shards.num_shards, parts, names)
    work = Dealing(source, spool, parts, options.form, options.skip_unreadable)
    check_data(folder / _WORK, source, work.progress)
    _spool(work, workers)
    index = spool.index()
    found = len(index.places)
    kept = np.arange(found) if unwanted is None else unwanted.others(index.places, found + index.refused.total())
    if found and not len(kept):
        raise ValueError(
            f"All {counted(found, 'usable sample')} of {source.name!r} would be left out: nothing remains."
        )
    if not found:
        raise ValueError(f"No sample of {source.name!r} can be used: {_in_words(index.refused)}.")
    order = np.random.default_rng(options.seed).permutation(kept)
    columns = make_columns(caption_columns(source), index.forms)
    layout = layout_of(options.format, columns)
    shards = _write(Writing(folder, spool, index.take(order), layout, options), workers)
    _write_unusable(spool, source, folder)
    labels = next((column for column in columns if column.classes and not layout.names_classes(column)), None)
    if labels is not None:
        with replacing(folder / CLASSES) as path:
            path.write_text("".join(f"{'; '.join(names)}\n" for names in labels.classes), encoding="utf-8")
    damage = Counter(reason for track in spool.progress().values() for reason, _ in track.damage)
    return {
        "format": options.format,
        "samples": len(order),
        "bytes": sum(each["bytes"] for each in shards),
        "caption_column": layout.caption_column(),
        "class_names": labels and CLASSES,
        "unusable": dict(sorted(index.refused.items())),
        "damage": dict(sorted(damage.items())),
        "left_out": found - len(kept),
        "extent": extent_of(source.shards),
        "shards": shards,
    }


def _spool(work: Dealing, workers: int) -> None:
    """Spools what is not spooled yet.

    Raises:
        WorkFailed: shards could not be read.
    """
    unread: list[str] = []
    done = sum(1 for progress in work.progress.values() if progress.is_finished)
    tracks = work.source.shards.num_shards * work.parts
    if done == tracks:
        return
    with tqdm(desc=f"reading ({done:,} of {tracks:,} parts were done)", unit=" samples", disable=None) as bar:
        for told in run_in_workers(work, workers):
            if isinstance(told, str):
                unread.append(told)
            else:
                bar.update(told)
    if unread:
        raise WorkFailed(
            f"{counted(len(unread), 'shard')} could not be read to the end, such as {unread[0]}. Give the same command "
            "again to retry, or add --skip_unreadable to leave out what cannot be read."
        )


def _write(work: Writing, workers: int) -> list[JsonObject]:
    """Writes the shards that are not written yet; returns the facts about all of them, in order."""
    with tqdm(desc="writing", total=work.count, initial=len(work.written), unit=" shards", disable=None) as bar:
        for _ in run_in_workers(work, workers) if len(work.written) < work.count else ():
            bar.update()
    return work.facts()


def _write_unusable(spool: Spool, source: Source, folder: Path) -> None:
    """Lists the samples that cannot be used, one a line, in the order of the data."""
    found: list[dict[str, Any]] = sorted(spool.refused(), key=lambda each: (each["shard"], each["row"]))
    for each in found:
        each["shard"] = source.shards.name(each["shard"])
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in found)
    with replacing(folder / UNUSABLE) as path:
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _in_words(refused: Counter[str]) -> str:
    return ", ".join(f"{count:,} x {reason}" for reason, count in refused.most_common(5)) or "it has none"
