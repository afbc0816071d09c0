"""Check a data set: read all of it once, find what training would skip and what it holds twice, and report."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from flip_hf.console.files import replacing
from flip_hf.console.json_types import JsonObject
from flip_hf.curation.duplicates import KINDS, Duplicates, Looks, find_duplicates
from flip_hf.curation.examination import SCHEMA, Examination
from flip_hf.curation.findings import Findings, places_of, shard_and_row
from flip_hf.curation.loader_speed import loader_rate
from flip_hf.curation.picture import draw_report
from flip_hf.curation.processes import run_in_workers
from flip_hf.curation.report import make_report
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.sources import Source

REPORT = "report.json"
PICTURE = "report.png"
SAMPLES = "samples.parquet"
DUPLICATES = "duplicates.parquet"
DUPLICATES_SCHEMA = pa.schema(
    [
        ("group", pa.int64()),
        ("surplus", pa.string()),  # null for the first sample of a group, which is kept
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("key", pa.string()),
    ]
)


@dataclass(frozen=True)
class CheckOptions:
    """Options of a check.

    Attributes:
        workers: processes that read; 0 reads in this one.
        distance: bits in which the perceptual hashes of images that look alike may differ.
        image_size: side of the images that the loader's speed is measured with, in pixels.
        seconds: duration of that measurement; 0 measures nothing.
        samples_per_second: what a GPU trains on, to compute the workers that it needs; None if unknown.
        background: colour of transparent parts.
    """

    workers: int
    distance: int
    image_size: int
    seconds: float
    samples_per_second: float | None = None
    background: Colour = WHITE


def check(
    source: Source,
    folder: Path,
    options: CheckOptions,
    about: JsonObject,
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None,
) -> JsonObject:
    """Checks a data set and writes what was found into a folder.

    Args:
        source: the data.
        folder: the folder; files of an earlier check in it are replaced.
        options: the options.
        about: facts that the report begins with.
        count_tokens: maps captions to their numbers of tokens.

    Returns:
        The report, as it is in [`REPORT`].

    Raises:
        WorkFailed: the data cannot be read.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rate = loader_rate(source, options.image_size, options.seconds, options.background) if options.seconds else None
    start = time.perf_counter()
    findings = _examine(Examination(source, count_tokens, options.background), folder, options.workers)
    seconds = time.perf_counter() - start
    records = findings.records()
    looks = Looks(records["looks"], records["colours"], records["has_looks"])
    duplicates = find_duplicates(records["image"], records["caption"], looks, options.distance)
    listed = _list_duplicates(records["place"], duplicates, folder)
    speed = {
        "workers": max(1, options.workers),
        "checked_per_second": findings.samples / seconds,
        "image_size": options.image_size,
        "loaded_per_second_and_worker": rate,
        "wanted_per_second": options.samples_per_second,
    }
    report = {**about, **make_report(source, findings, duplicates, options.distance, listed), "speed": speed}
    with replacing(folder / PICTURE) as path:
        draw_report(report, findings, source, listed, path, options.background)
    with replacing(folder / REPORT) as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _examine(work: Examination, folder: Path, workers: int) -> Findings:
    """Examines every sample, and writes a row for each into [`SAMPLES`]."""
    findings = Findings()
    bar = tqdm(desc="checking", unit=" samples", unit_scale=True, disable=None)
    with bar, replacing(folder / SAMPLES) as path, pq.ParquetWriter(path, SCHEMA) as writer:
        for batch in run_in_workers(work, workers):
            findings.add(batch)
            writer.write_batch(batch.samples)
            bar.update(batch.samples.num_rows)
    return findings


def _list_duplicates(places: np.ndarray, duplicates: Duplicates, folder: Path) -> list[dict[str, Any]]:
    """Lists the samples of all groups of several, in the order of their groups, and writes them to [`DUPLICATES`]."""
    has_others = np.zeros(len(places), bool)
    surplus = np.flatnonzero(duplicates.kind)
    has_others[surplus] = True
    has_others[duplicates.first[surplus]] = True
    members = np.flatnonzero(has_others)
    members = members[np.argsort(duplicates.first[members], kind="stable")]
    keys = _find_keys(np.sort(places[members]), folder / SAMPLES)
    groups = {first: number for number, first in enumerate(np.unique(duplicates.first[members]).tolist())}
    listed: list[dict[str, Any]] = []
    for member in members.tolist():
        shard, row = shard_and_row(int(places[member]))
        kind = int(duplicates.kind[member])
        group = groups[int(duplicates.first[member])]
        surplus_kind = KINDS[kind] if kind else None
        listed.append(
            {"group": group, "surplus": surplus_kind, "shard": shard, "row": row, "key": keys[int(places[member])]}
        )
    with replacing(folder / DUPLICATES) as path:
        pq.write_table(pa.Table.from_pylist(listed, DUPLICATES_SCHEMA), path)
    return listed


def _find_keys(places: np.ndarray, samples: Path) -> dict[int, str]:
    """Reads the keys of the samples at some places, which are sorted, from [`SAMPLES`]."""
    keys: dict[int, str] = {}
    with pq.ParquetFile(samples) as file:
        for batch in file.iter_batches(columns=["shard", "row", "key"]):
            found = places_of(batch["shard"].to_numpy(), batch["row"].to_numpy())
            nearest = np.minimum(np.searchsorted(places, found), len(places) - 1)
            wanted = np.flatnonzero(places[nearest] == found) if len(places) else []
            for index in wanted:
                keys[int(found[index])] = batch["key"][int(index)].as_py()
    return keys
