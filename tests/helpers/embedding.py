"""`flip-hf embed` in this process, and what its files hold."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from flip_hf.commands.embed import main

SMALL = ("--batch_size", "4", "--rows_per_file", "8")


def embedded(model: Path, data: Path | str, out: Path, *more: object) -> dict:
    """What the command says of its files."""
    main([*map(str, (model, data, out, *SMALL, "--workers", "0", *more))])
    return json.loads((out / "embeddings.json").read_text())


def features_of(folder: Path, column: str = "image_features") -> np.ndarray:
    """The features of all files, in their order."""
    tables = [pq.read_table(path).column(column).to_pylist() for path in sorted(folder.glob("part-*.parquet"))]
    return np.array([vector for table in tables for vector in table])
