"""Finds duplicates among many images by their hashes: equal pairs, equal images, and images that look alike.

Two hashes of 64 bits that differ in at most `distance` of them agree in two of `distance + 2` blocks of bits at least.
So the hashes are sorted once by each choice of two blocks, and only those that agree there are compared, not all pairs
(Manku et al. 2007, "Detecting near-duplicates for web crawling").
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

_BITS = 64
# Blocks that must agree; one more where hashes are so many that two would leave long lists to compare.
_AGREEING = 2
_MANY = 2**24
# Hashes of a list of those that agree in the chosen blocks with which a hash is compared.
MAX_NEIGHBOURS = 512
# Pairs that are held are at most one for this many images, and those of one step.
_JOINED = 8
# Levels of 255 by which the colours of images that look alike may differ: encoding again changes them by three.
MAX_LEVELS = 6
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)


class Kind(IntEnum):
    """What a sample is to the first sample of its group."""

    FIRST = 0
    """The first itself, or alone."""
    PAIR = 1
    """It has the same image and captions as an earlier sample."""
    IMAGE = 2
    """It has the same image as an earlier sample."""
    NEAR = 3
    """Its image looks like an earlier sample's."""

    @property
    def word(self) -> str:
        """The kind as tables have it."""
        return self.name.lower()


@dataclass(frozen=True)
class Duplicates:
    """The duplicates among N samples.

    Attributes:
        first: (N,), the first sample of each sample's group: its own number if it is the first, or alone.
        kind: (N,), a [`Kind`] each, uint8.
        is_complete: whether all images that look alike were found; False if some lists were longer than
            [`MAX_NEIGHBOURS`].
    """

    first: np.ndarray
    kind: np.ndarray
    is_complete: bool


@dataclass(frozen=True)
class Looks:
    """The looks of N images.

    Attributes:
        hashes: (N,), perceptual hashes, uint64.
        colours: (N, C), colours of their parts, uint8; C is a multiple of four.
        are_known: (N,), bool, False where an image has no structure to compare.
    """

    hashes: np.ndarray
    colours: np.ndarray
    are_known: np.ndarray

    def take(self, numbers: np.ndarray) -> "Looks":
        """Returns those of some images."""
        return Looks(self.hashes[numbers], self.colours[numbers], self.are_known[numbers])

    def first_equal(self) -> np.ndarray:
        """Returns, for each image (N,), the number of the first one with the same hash and colours."""
        colours = np.ascontiguousarray(self.colours).view(np.uint32)  # four levels a key, to sort by fewer
        return first_equal(self.hashes, *colours.T)


def find_duplicates(images: np.ndarray, captions: np.ndarray, looks: Looks, distance: int) -> Duplicates:
    """Groups samples by their hashes.

    Args:
        images: (N, 2), hashes of the encoded images, uint64.
        captions: (N,), hashes of the captions, uint64.
        looks: the looks of the images.
        distance: bits in which the perceptual hashes of images that look alike may differ.
    """
    first_image = first_equal(images[:, 0], images[:, 1])
    first_pair = first_equal(first_image, captions)
    group = first_image.copy()
    known = np.flatnonzero(looks.are_known)
    distinct, node = np.unique(looks.take(known).first_equal(), return_inverse=True)
    alike, is_complete = near_groups(looks.take(known[distinct]), distance)
    # Equal images have equal looks, so that their groups never fall apart.
    group[known] = known[first_equal(alike[node])]
    own = np.arange(len(images))
    kind = np.full(len(images), Kind.FIRST, np.uint8)
    for value, first in ((Kind.NEAR, group), (Kind.IMAGE, first_image), (Kind.PAIR, first_pair)):
        kind[first != own] = value
    return Duplicates(group, kind, is_complete)


def first_equal(*keys: np.ndarray) -> np.ndarray:
    """Returns, for each of N rows of keys (N,), the number of the first row that equals it."""
    count = len(keys[0])
    order = np.lexsort(keys)  # stable, so that the first of equal rows comes first
    differs = np.zeros(count, bool)
    for key in keys:
        differs[1:] |= key[order[1:]] != key[order[:-1]]
    starts = np.flatnonzero(differs | (np.arange(count) == 0))
    found = np.empty(count, np.int64)
    found[order] = np.repeat(order[starts], np.diff(np.append(starts, count)))
    return found


def near_groups(looks: Looks, distance: int) -> tuple[np.ndarray, bool]:
    """Groups the images that look alike, or are linked by others that do.

    Args:
        looks: the looks of N images.
        distance: maximum number of bits in which their hashes differ; their colours differ by [`MAX_LEVELS`] at most.

    Returns:
        A label for each image (N,), equal for those of a group, and whether all that look alike were found.
    """
    in_order = np.argsort(looks.hashes, kind="stable")
    groups = np.arange(len(looks.hashes))
    is_complete = True
    for mask in block_masks(len(looks.hashes), distance):
        keys = looks.hashes[in_order] & mask
        by_key = np.argsort(keys, kind="stable")  # equal keys stay sorted by the whole hash: near ones are neighbours
        order = in_order[by_key]
        groups[order], is_whole = _join_neighbours(looks.take(order), keys[by_key], groups[order], distance)
        is_complete = is_complete and is_whole
    return groups, is_complete


def block_masks(count: int, distance: int) -> Iterator[np.uint64]:
    """Yields masks of bits such that hashes that differ in at most `distance` bits agree under one of them at least.

    Args:
        count: number of hashes that are compared with each of others.
        distance: the maximum number of bits.
    """
    agreeing = _AGREEING + (count > _MANY)
    for chosen in itertools.combinations(_blocks(distance + agreeing), agreeing):
        yield np.bitwise_or.reduce(np.array(chosen, np.uint64))


def _blocks(count: int) -> list[int]:
    """Divides the bits of a hash into blocks, as masks."""
    edges = [_BITS * number // count for number in range(count + 1)]
    return [(1 << end) - (1 << begin) for begin, end in itertools.pairwise(edges)]


def _join_neighbours(looks: Looks, keys: np.ndarray, groups: np.ndarray, distance: int) -> tuple[np.ndarray, bool]:
    """Joins the groups of images that look alike among images with equal keys, which are sorted.

    Pairs are joined before they are as many as the images, and lists that have become one group are left: thousands of
    frames of one scene would take gigabytes and minutes.
    """
    run = np.cumsum(np.diff(keys, prepend=keys[:1]) != 0)
    found: list[np.ndarray] = []
    held = 0
    left = np.flatnonzero(_has_several(groups, run)[run])
    for step in range(1, MAX_NEIGHBOURS + 1):
        left = left[left < len(keys) - step]
        left = left[run[left] == run[left + step]]
        apart = left[groups[left] != groups[left + step]]
        near = apart[alike_pairs(looks, apart, looks, apart + step, distance)]
        found.append(np.stack([groups[near], groups[near + step]], axis=1))
        held += len(near)
        if held > len(keys) // _JOINED:
            groups = _join(groups, np.concatenate(found))
            left = left[_has_several(groups, run)[run[left]]]
            found = []
            held = 0
        if not len(left):
            break
    return _join(groups, np.concatenate(found or [np.empty((0, 2), np.int64)])), not len(left)


def _join(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns the labels (N,) of groups after those of some pairs of labels (E, 2) are joined."""
    labels, nodes = np.unique(pairs, return_inverse=True)
    if not len(labels):
        return groups
    ends = nodes.reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(pairs), np.uint8), (ends[0], ends[1])), shape=(len(labels), len(labels)))
    _, first, component = np.unique(
        connected_components(graph, directed=False)[1], return_index=True, return_inverse=True
    )
    renamed = np.arange(len(groups))
    renamed[labels] = labels[first[component]]
    return renamed[groups]


def _has_several(groups: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Returns for each run of images whether it has several groups."""
    starts = np.flatnonzero(np.diff(run, prepend=-1))
    return np.minimum.reduceat(groups, starts) != np.maximum.reduceat(groups, starts)


def alike_pairs(
    looks: Looks, numbers: np.ndarray, others: Looks, other_numbers: np.ndarray, distance: int
) -> np.ndarray:
    """Returns which of P pairs look alike: places in `numbers` (P,) of `looks` and `other_numbers` (P,) of `others`."""
    bits = _differing_bits(looks.hashes[numbers], others.hashes[other_numbers])
    near = np.flatnonzero(bits <= distance)
    colours = looks.colours[numbers[near]].astype(np.int16)
    levels = np.abs(colours - others.colours[other_numbers[near]]).max(axis=1, initial=0)
    return near[levels <= MAX_LEVELS]


def _differing_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the number of bits in which hashes (N,) and (N,) differ."""
    differing = (a ^ b).view(np.uint8).reshape(-1, _BITS // 8)
    return _ONES[differing].sum(axis=1)
