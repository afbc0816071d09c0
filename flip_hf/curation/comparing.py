"""Compares checked data with evaluation data: examines these, too, and lists samples whose images are in both."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_hf.console.files import replacing
from flip_hf.console.json_types import JsonObject
from flip_hf.curation.duplicates import Kind
from flip_hf.curation.examination import Examination
from flip_hf.curation.findings import Findings, looks_of, shards_and_rows
from flip_hf.curation.listing import SAMPLES, examine, find_keys
from flip_hf.curation.overlap import Overlap, find_overlap
from flip_hf.curation.report import damage_of
from flip_hf.data.extent import extent_of
from flip_hf.data.rendering import Colour
from flip_hf.data.sources import Source

OVERLAP = "overlap.parquet"
OVERLAP_SCHEMA = pa.schema(
    [
        ("overlap", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("eval_data", pa.string()),
        ("eval_shard", pa.int32()),
        ("eval_row", pa.int64()),
        ("eval_key", pa.string()),
    ]
)


@dataclass(frozen=True)
class Compared:
    """A data set's overlap with one set of evaluation data.

    Attributes:
        source: the evaluation data.
        facts: numbers for the report.
        listed: a row of [`OVERLAP_SCHEMA`] for each sample of the data whose image is in the evaluation data.
    """

    source: Source
    facts: JsonObject
    listed: pa.Table

    def examples(self, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Returns the first `count` samples that look like one of the evaluation data, each with that one."""
        is_near = self.listed["overlap"].to_numpy().astype(str) == Kind.NEAR.word
        rows = self.listed.take(pa.array(np.flatnonzero(is_near)[:count])).to_pylist()
        names = ("shard", "row", "key")
        return [({name: row[name] for name in names}, {name: row[f"eval_{name}"] for name in names}) for row in rows]


def compare(
    source: Source, records: np.ndarray, folder: Path, distance: int, workers: int, background: Colour
) -> Compared:
    """Examines evaluation data, and finds the samples of the data whose images are among them.

    Args:
        source: the evaluation data.
        records: what was found of the usable samples of the data; see [`Findings.records`].
        folder: folder of the check, with [`SAMPLES`].
        distance: bits in which the perceptual hashes of images that look alike may differ.
        workers: processes; 0 works in this one.
        background: colour of transparent parts.

    Raises:
        WorkFailed: the evaluation data cannot be read.
    """
    with tempfile.TemporaryDirectory() as temporary:
        samples = Path(temporary) / SAMPLES
        findings = examine(Examination(source, None, background), samples, workers, f"checking {source.name}")
        others = findings.records()
        overlap = find_overlap(records["image"], looks_of(records), others["image"], looks_of(others), distance)
        listed = _list(overlap, records["place"], folder / SAMPLES, others["place"], samples, source.name)
    return Compared(source, _facts(source, findings, overlap, distance), listed)


def _list(
    overlap: Overlap, places: np.ndarray, samples: Path, other_places: np.ndarray, other_samples: Path, name: str
) -> pa.Table:
    numbers = np.flatnonzero(overlap.kind != Kind.FIRST)
    matches, nth = np.unique(overlap.match[numbers], return_inverse=True)
    kinds = pa.array([kind.word for kind in Kind]).take(pa.array(overlap.kind[numbers]))
    keys = find_keys(places[numbers], samples)
    other_keys = find_keys(other_places[matches], other_samples).take(pa.array(nth))
    names = pa.array([name] * len(numbers), pa.string())
    mine = shards_and_rows(places[numbers])
    theirs = shards_and_rows(other_places[matches[nth]])
    return pa.table([kinds, *mine, keys, names, *theirs, other_keys], schema=OVERLAP_SCHEMA)


def _facts(source: Source, findings: Findings, overlap: Overlap, distance: int) -> JsonObject:
    return {
        "data": source.name,
        "extent": extent_of(source.shards),
        "image_column": source.image_column,
        "samples": findings.samples,
        "usable": findings.usable,
        "damage": damage_of(findings),
        "same_image": int((overlap.kind == Kind.IMAGE).sum()),
        "near": int((overlap.kind == Kind.NEAR).sum()),
        "eval_same_image": int((overlap.other_kind == Kind.IMAGE).sum()),
        "eval_near": int((overlap.other_kind == Kind.NEAR).sum()),
        "without_structure": int((~findings.records()["has_looks"]).sum()),
        "distance": distance,
        "is_complete": overlap.is_complete,
    }


def write_overlap(compared: Sequence[Compared], folder: Path) -> None:
    """Writes the samples that overlap with any evaluation data into [`OVERLAP`]; there is none without such data."""
    if not compared:
        (folder / OVERLAP).unlink(missing_ok=True)
        return
    with replacing(folder / OVERLAP) as path:
        pq.write_table(pa.concat_tables([each.listed for each in compared]), path)
