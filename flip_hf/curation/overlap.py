"""Finds the samples whose images are also in other data, such as the test split of a benchmark.

CLIP's paper calls this data overlap (Radford et al. 2021, section 5); other names are leakage and contamination.
"""

from dataclasses import dataclass

import numpy as np

from flip_hf.curation.duplicates import MAX_NEIGHBOURS, Kind, Looks, alike_pairs, block_masks, first_equal


@dataclass(frozen=True)
class Overlap:
    """The overlap of N samples with M others.

    Attributes:
        match: (N,), the first of the others that a sample's image equals, or else looks like; -1 for none.
        kind: (N,), `Kind.IMAGE` or `Kind.NEAR`, uint8; `Kind.FIRST` where there is no match.
        other_kind: (M,), the same of the others: what they are to any of the samples.
        is_complete: whether all images that look alike were found; see [`Duplicates`].
    """

    match: np.ndarray
    kind: np.ndarray
    other_kind: np.ndarray
    is_complete: bool


def find_overlap(
    images: np.ndarray, looks: Looks, other_images: np.ndarray, other_looks: Looks, distance: int
) -> Overlap:
    """Compares the images of N samples with those of M others.

    Unlike the groups of [`find_duplicates`], matches are not passed on: both images of each are alike themselves.

    Args:
        images: (N, 2), hashes of the encoded images, uint64.
        looks: their looks.
        other_images: (M, 2), as `images`, of the others.
        other_looks: their looks.
        distance: bits in which the perceptual hashes of images that look alike may differ.
    """
    known = np.flatnonzero(looks.are_known)
    other_known = np.flatnonzero(other_looks.are_known)
    near, is_near, is_complete = _near_matches(looks.take(known), other_looks.take(other_known), distance)
    match = np.full(len(images), -1)
    kind = np.full(len(images), Kind.FIRST, np.uint8)
    other_kind = np.full(len(other_images), Kind.FIRST, np.uint8)
    found = near >= 0
    match[known[found]] = other_known[near[found]]
    kind[known[found]] = Kind.NEAR
    other_kind[other_known[is_near]] = Kind.NEAR
    equal, is_equal = _equal_matches(images, other_images)
    match = np.where(equal >= 0, equal, match)
    kind[equal >= 0] = Kind.IMAGE
    other_kind[is_equal] = Kind.IMAGE
    return Overlap(match, kind, other_kind, is_complete)


def _equal_matches(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first of M others that equals each of N images (N,), or -1, and which of them equal any (M,)."""
    count = len(others)
    both = np.concatenate([others, images])
    first = first_equal(both[:, 0], both[:, 1])
    match = np.where(first[count:] < count, first[count:], -1)
    return match, np.isin(first[:count], match)


def _near_matches(looks: Looks, others: Looks, distance: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Finds among M others those that look like N images.

    Returns:
        The first that looks like each image (N,), -1 for none; which look like any (M,); and whether all were found.
    """
    distinct, node = np.unique(others.first_equal(), return_inverse=True)
    reduced = others.take(distinct)
    none = len(distinct)
    first = np.full(len(looks.hashes), none)
    is_found = np.zeros(none, bool)
    is_complete = True
    for mask in block_masks(none, distance):
        keys = reduced.hashes & mask
        order = np.argsort(keys, kind="stable")
        begin, end = (np.searchsorted(keys[order], looks.hashes & mask, side) for side in ("left", "right"))
        left = np.flatnonzero(begin < end)
        for step in range(MAX_NEIGHBOURS):
            candidates = order[begin[left] + step]
            pairs = alike_pairs(looks, left, reduced, candidates, distance)
            first[left[pairs]] = np.minimum(first[left[pairs]], candidates[pairs])
            is_found[candidates[pairs]] = True
            left = left[begin[left] + step + 1 < end[left]]
            if not len(left):
                break
        is_complete = is_complete and not len(left)
    match = np.where(first < none, np.append(distinct, -1)[first], -1)
    return match, is_found[node], is_complete
