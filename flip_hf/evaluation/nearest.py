"""The nearest of many vectors to a few, exactly, in memory for one block of them."""

from collections.abc import Iterable

import numpy as np


def nearest(queries: np.ndarray, blocks: Iterable[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the vectors with the largest inner products; of equal ones the first.

    Args:
        queries: (Q, E), float32.
        blocks: all N vectors, in blocks (n, E) of any float type.
        count: how many to find for each query.

    Returns:
        The products (Q, K), best first, and the numbers (Q, K) of the vectors, with K = min(count, N).
    """
    scores = np.empty((len(queries), 0), np.float32)
    numbers = np.empty((len(queries), 0), np.int64)
    begin = 0
    for block in blocks:
        found = queries @ block.astype(np.float32, copy=False).T  # (Q, n)
        scores = np.concatenate([scores, found], axis=1)
        own = np.arange(begin, begin + len(block))
        numbers = np.concatenate([numbers, np.broadcast_to(own, found.shape)], axis=1)
        begin += len(block)
        kept = _best(scores, count)
        scores = np.take_along_axis(scores, kept, axis=1)
        numbers = np.take_along_axis(numbers, kept, axis=1)
    return scores, numbers


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Returns the columns (Q, K) of the largest scores (Q, n), best first; of equal ones the first."""
    if count < scores.shape[1]:
        # Most columns are far from the best: only those that reach the last of them are sorted.
        edge = np.partition(scores, -count, axis=1)[:, -count]
        candidates = np.flatnonzero((scores >= edge[:, None]).any(axis=0))
    else:
        candidates = np.arange(scores.shape[1])
    order = np.argsort(-scores[:, candidates], axis=1, kind="stable")[:, :count]
    return candidates[order]
