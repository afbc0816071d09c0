"""The tables of a check: one of all samples, written while they are examined, and one of those that are duplicates."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from flip_hf.console.files import replacing
from flip_hf.curation.duplicates import Duplicates, Kind
from flip_hf.curation.examination import SCHEMA, Examination
from flip_hf.curation.findings import Findings, places_of, shards_and_rows
from flip_hf.curation.processes import run_in_workers

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
_GROUP_ROWS = 65_536


class SampleTable:
    """Writes batches of samples into parquet in row groups of moderate size; a context that ends with the file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self._writer = pq.ParquetWriter(path, SCHEMA)
        self._batches: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds a batch."""
        self._batches.append(batch)
        if sum(each.num_rows for each in self._batches) >= _GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._batches, SCHEMA))
        self._batches = []

    def __enter__(self) -> "SampleTable":
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        self._writer.close()


def examine(work: Examination, path: Path, workers: int, label: str) -> Findings:
    """Examines every sample, and writes a row for each into a table.

    Args:
        work: the examination.
        path: the table's file.
        workers: processes; 0 works in this one.
        label: words beside the progress bar.

    Raises:
        WorkFailed: the data cannot be read.
    """
    findings = Findings()
    bar = tqdm(desc=label, unit=" samples", unit_scale=True, disable=None)
    with bar, replacing(path) as unfinished, SampleTable(unfinished) as table:
        for batch in run_in_workers(work, workers):
            findings.add(batch)
            table.add(batch.samples)
            bar.update(batch.samples.num_rows)
    return findings


def list_duplicates(places: np.ndarray, duplicates: Duplicates, folder: Path) -> pa.Table:
    """Lists the samples of all groups of several, in the order of their groups, and writes them to [`DUPLICATES`].

    Args:
        places: (N,), where the samples are, sorted; see `places_of`.
        duplicates: the duplicates among them.
        folder: folder of the check, with [`SAMPLES`].
    """
    surplus = np.flatnonzero(duplicates.kind != Kind.FIRST)
    members = np.union1d(surplus, duplicates.first[surplus])
    keys = find_keys(places[members], folder / SAMPLES)
    by_group = np.argsort(duplicates.first[members], kind="stable")
    members = members[by_group]
    _, group = np.unique(duplicates.first[members], return_inverse=True)
    shards, rows = shards_and_rows(places[members])
    kinds = duplicates.kind[members]
    names = pa.array([kind.word for kind in Kind]).take(pa.array(kinds, mask=kinds == Kind.FIRST))
    listed = pa.table([group, names, shards, rows, keys.take(pa.array(by_group))], schema=DUPLICATES_SCHEMA)
    with replacing(folder / DUPLICATES) as path:
        pq.write_table(listed, path)
    return listed


def find_keys(places: np.ndarray, samples: Path) -> pa.Array:
    """Reads the keys of the samples at some places, which are sorted, from a table of samples."""
    found: list[np.ndarray] = [np.empty(0, np.uint64)]
    keys: list[pa.Array] = [pa.array([], pa.string())]
    with pq.ParquetFile(samples) as file:
        for batch in file.iter_batches(columns=["shard", "row", "key"]):
            here = places_of(batch["shard"].to_numpy(), batch["row"].to_numpy())
            wanted = np.flatnonzero(np.isin(here, places))
            found.append(here[wanted])
            keys.append(batch["key"].take(pa.array(wanted)))
    return pa.concat_arrays(keys).take(pa.array(np.argsort(np.concatenate(found))))


def near_examples(listed: pa.Table, count: int) -> list[tuple[dict, dict]]:
    """Returns the first sample and one that looks like it, of the first `count` groups that have such a sample."""
    groups = listed["group"].to_numpy()
    near = np.flatnonzero(listed["surplus"].to_numpy().astype(str) == Kind.NEAR.word)
    _, first_near = np.unique(groups[near], return_index=True)
    chosen = near[first_near[:count]]
    first = np.searchsorted(groups, groups[chosen])
    return list(zip(*(listed.take(pa.array(rows)).to_pylist() for rows in (first, chosen)), strict=True))
