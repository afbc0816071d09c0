"""A FAISS index over all features of a folder: exact, or approximate for millions of pictures."""

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from flip_hf.console.files import file_digest, replacing
from flip_hf.retrieval.folder import INDEX
from flip_hf.retrieval.options import IndexKind
from flip_hf.retrieval.parts import READ_ROWS, read_features

# Links of a vector in the graph; more find more and take more memory.
_HNSW_LINKS = 32
# Vectors that each cell's centre is learned from, and cells that a search looks into.
_IVF_SAMPLES = 64
_IVF_PROBES = 16


def require_faiss() -> Any:
    """Imports FAISS.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return import_module("faiss")


def build_index(folder: Path, names: Sequence[str], width: int, kind: IndexKind) -> dict[str, str]:
    """Builds the index of all image features, in the order of the files, and writes it; it is in memory meanwhile.

    Args:
        folder: the folder.
        names: its files of features.
        width: E.
        kind: `flat`, exact; `hnsw`, a graph; or `ivf`, cells.

    Returns:
        `kind`, `file` and `sha256`.
    """
    faiss = require_faiss()
    paths = [folder / name for name in names]
    index = _empty_index(faiss, paths, width, kind)
    for path in tqdm(paths, desc=f"{kind} index", unit="file"):
        for features in read_features(path, width):
            index.add(features.astype(np.float32))
    with replacing(folder / INDEX) as path:
        try:
            faiss.write_index(index, str(path))
        except RuntimeError as error:  # FAISS has no other
            raise OSError(f"{path} cannot be written: {error}") from error
    return {"kind": kind, "file": INDEX, "sha256": file_digest(folder / INDEX)}


def _empty_index(faiss: Any, paths: Sequence[Path], width: int, kind: IndexKind) -> Any:
    if kind == "hnsw":
        return faiss.IndexHNSWFlat(width, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    sample = _spread_features(paths, READ_ROWS * 4, width)
    cells = max(1, min(4 * math.isqrt(len(sample)), len(sample) // _IVF_SAMPLES))
    index = faiss.index_factory(width, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(cells, _IVF_PROBES)
    index.cp.min_points_per_centroid = 1
    index.train(sample)
    return index


def _spread_features(paths: Sequence[Path], count: int, width: int) -> np.ndarray:
    """Draws features (at most about `count`, E), float32, evenly from all files."""
    share = max(1, count // max(1, len(paths)))
    rng = np.random.default_rng(0)
    drawn = [np.empty((0, width), np.float32)]
    for path in paths:
        features = np.concatenate([np.empty((0, width), np.float16), *read_features(path, width)])
        chosen = np.sort(rng.permutation(len(features))[:share])
        drawn.append(features[chosen].astype(np.float32))
    return np.concatenate(drawn)


def has_index(folder: Path, about: dict[str, str] | None, kind: str) -> bool:
    """Returns whether a folder has an index of a kind, whose file is the one that `embeddings.json` names."""
    path = folder / INDEX
    if about is None or about["kind"] != kind or not path.is_file():
        return False
    return file_digest(path) == about["sha256"]


def open_index(folder: Path, about: dict[str, str], size: tuple[int, int]) -> Any:
    """Opens a folder's index, after a look at its bytes: FAISS trusts what it reads.

    Args:
        folder: the folder.
        about: what `embeddings.json` says of the index.
        size: numbers of features and of their elements that it must have.

    Raises:
        ModuleNotFoundError: FAISS is not installed.
        ValueError: the file is not the one that `embeddings.json` names.
    """
    faiss = require_faiss()
    path = folder / INDEX
    if has_index(folder, about, about["kind"]):
        try:
            index = faiss.read_index(str(path))
        except RuntimeError:  # FAISS has no other
            index = None
        if index is not None and (index.ntotal, index.d) == size:
            return index
    raise ValueError(
        f"{path} is missing or not the index of these features: build it again with `flip-hf embed ... --index "
        f"{about['kind']}`, or search with --exact."
    )
