"""Leaves the duplicates, and the images of evaluation data, that a check has found out of the shards."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_hf.console.files import read_text
from flip_hf.console.json_types import JsonObject
from flip_hf.curation.check import REPORT
from flip_hf.curation.comparing import OVERLAP
from flip_hf.curation.findings import places_of
from flip_hf.curation.listing import DUPLICATES
from flip_hf.data.extent import extent_of
from flip_hf.data.sources import Source

# Each kind includes those before it.
DuplicateKind = Literal["pair", "image", "near"]
DUPLICATE_KINDS: tuple[DuplicateKind, ...] = get_args(DuplicateKind)
OverlapKind = Literal["image", "near"]
OVERLAP_KINDS: tuple[OverlapKind, ...] = get_args(OverlapKind)


class OtherCheck(ValueError):
    """A check is of other data, or compared them with none; the message says what to do."""


@dataclass(frozen=True)
class Unwanted:
    """Samples that are left out.

    Attributes:
        places: where they are; see `places_of`.
        samples: number of samples of the data, as the check counted them.
        digest: hash of the places.
    """

    places: np.ndarray
    samples: int
    digest: str

    def others(self, places: np.ndarray, samples: int) -> np.ndarray:
        """Returns the numbers of the samples at some places that are not left out.

        Args:
            places: places of the usable samples.
            samples: number of samples of the data, as they were counted now.

        Raises:
            ValueError: the data are not those that were checked.
        """
        if samples != self.samples:
            raise ValueError(
                f"The data have {samples:,} samples, but had {self.samples:,} when they were checked: check them again."
            )
        return np.flatnonzero(~np.isin(places, self.places))


def read_unwanted(
    folder: Path, duplicates: DuplicateKind | None, overlap: OverlapKind | None, source: Source
) -> Unwanted:
    """Reads the samples to leave out that a check has found.

    Args:
        folder: the folder of the check.
        duplicates: surplus of which kind: samples that repeat an image with its captions, an image, or its looks.
        overlap: overlap of which kind: samples with an image of the evaluation data, or also those that look like one.
        source: the data.

    Raises:
        ValueError: there is no check, it is of other data, or it compared them with no evaluation data.
    """
    try:
        report = json.loads(read_text(folder / REPORT, "the report of a check"))
        _check_same(folder, report, source)
        samples = int(report["samples"])
        places = [np.empty(0, np.uint64)]
        if duplicates is not None:
            kinds = DUPLICATE_KINDS[: DUPLICATE_KINDS.index(duplicates) + 1]
            places.append(_places(folder / DUPLICATES, "surplus", kinds))
        if overlap is not None:
            if not report.get("eval_overlap"):
                raise OtherCheck(
                    f"{folder} is a check without evaluation data: run `flip-hf data check` with --eval_data."
                )
            kinds = OVERLAP_KINDS[: OVERLAP_KINDS.index(overlap) + 1]
            places.append(_places(folder / OVERLAP, "overlap", kinds))
    except OtherCheck:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{folder} holds no readable check ({error}): run `flip-hf data check` again.") from None
    found = np.concatenate(places)
    return Unwanted(found, samples, hashlib.sha256(found.tobytes()).hexdigest())


def _check_same(folder: Path, report: JsonObject, source: Source) -> None:
    """Checks that a report is of some data.

    Raises:
        OtherCheck: it is of others.
    """
    checked = {**{name: report[name] for name in ("data", "image_column", "caption_column")}, **report["extent"]}
    now = {"data": source.name, "image_column": source.image_column, "caption_column": source.target_column}
    differing = [
        f"{name}: {checked.get(name)!r} then, {value!r} now"
        for name, value in {**now, **extent_of(source.shards)}.items()
        if checked.get(name) != value
    ]
    if differing:
        raise OtherCheck(
            f"{folder} is a check of other data ({'; '.join(differing)}): run `flip-hf data check` on these."
        )


def _places(path: Path, column: str, kinds: Sequence[str]) -> np.ndarray:
    """Returns the places of the samples in a table of a check that have one of some kinds in a column."""
    listed = pq.read_table(path, columns=[column, "shard", "row"])
    is_meant = np.isin(listed[column].to_numpy().astype(str), kinds)
    return places_of(listed["shard"].to_numpy(), listed["row"].to_numpy())[is_meant]
