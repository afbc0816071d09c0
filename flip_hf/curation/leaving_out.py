"""Leave the duplicates that a check has found out of the shards."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_hf.console.files import read_text
from flip_hf.curation.check import REPORT
from flip_hf.curation.findings import places_of
from flip_hf.curation.listing import DUPLICATES
from flip_hf.data.extent import extent_of
from flip_hf.data.sources import Source

# Each kind includes those before it.
DuplicateKind = Literal["pair", "image", "near"]
DUPLICATE_KINDS: tuple[DuplicateKind, ...] = get_args(DuplicateKind)


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


def read_unwanted(folder: Path, kind: DuplicateKind, source: Source) -> Unwanted:
    """Reads the surplus samples that a check has found.

    Args:
        folder: the folder of the check.
        kind: surplus of which kind: samples that repeat an image with its captions, an image, or its looks.
        source: the data.

    Raises:
        ValueError: there is no check, or it is of other data.
    """
    try:
        report = json.loads(read_text(folder / REPORT, "the report of a check"))
        listed = pq.read_table(folder / DUPLICATES)
        checked = {**{name: report[name] for name in ("data", "image_column", "caption_column")}, **report["extent"]}
        samples = int(report["samples"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError, pa.ArrowException) as error:
        raise ValueError(f"{folder} holds no readable check ({error}): run `flip-hf data check` again.") from None
    now = {"data": source.name, "image_column": source.image_column, "caption_column": source.target_column}
    differing = [
        f"{name}: {checked.get(name)!r} then, {value!r} now"
        for name, value in {**now, **extent_of(source.shards)}.items()
        if checked.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} is a check of other data ({'; '.join(differing)}): run `flip-hf data check` on these."
        )
    kinds = DUPLICATE_KINDS[: DUPLICATE_KINDS.index(kind) + 1]
    is_surplus = np.isin(listed["surplus"].to_numpy().astype(str), kinds)
    places = places_of(listed["shard"].to_numpy(), listed["row"].to_numpy())[is_surplus]
    return Unwanted(places, samples, hashlib.sha256(places.tobytes()).hexdigest())
