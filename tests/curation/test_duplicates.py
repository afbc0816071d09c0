"""Duplicates are found by their hashes, near ones as surely as by comparing all pairs."""

import io

import numpy as np
import pytest
from PIL import Image

from flip_hf.curation import duplicates
from flip_hf.curation.duplicates import Kind, Looks, find_duplicates, near_groups
from flip_hf.curation.hashing import content_hash, perceptual_hash, quarter_colours
from flip_hf.curation.overlap import find_overlap
from flip_hf.data.shapes import generate_test


def looks_of(hashes: list[int], colours: list[int] | None = None) -> Looks:
    levels = np.repeat(np.array(colours or [0] * len(hashes), np.uint8)[:, None], 12, axis=1)
    return Looks(np.array(hashes, np.uint64), levels, np.ones(len(hashes), bool))


def groups_of(looks: Looks) -> list[list[int]]:
    labels, is_complete = near_groups(looks, 4)
    assert is_complete
    return sorted(np.flatnonzero(labels == label).tolist() for label in np.unique(labels))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rows = list(generate_test([0], 40, image_size=96, seed=0))
    return [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]


@pytest.mark.parametrize("joined", [8, 10**6])
def test_near_groups_are_those_of_comparing_all(joined, monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64).tolist()
    for number in range(200):  # copies with up to seven bits changed, of which four are near
        flips = rng.choice(64, number % 8, replace=False).tolist()
        hashes.append(hashes[number] ^ sum(1 << bit for bit in flips))
    hashes += [hashes[0] ^ 1 << bit for bit in range(40)]
    all_pairs = ((i, j) for j in range(len(hashes)) for i in range(j))
    labels = list(range(len(hashes)))
    for i, j in all_pairs:
        if (hashes[i] ^ hashes[j]).bit_count() <= 4:
            labels = [labels[i] if label == labels[j] else label for label in labels]
    expected = sorted([i for i, label in enumerate(labels) if label == each] for each in set(labels))
    monkeypatch.setattr(duplicates, "_JOINED", joined)
    assert groups_of(looks_of(hashes)) == expected and len(expected) == 375
    monkeypatch.setattr(duplicates, "_MANY", 100)  # three blocks agree, as among many millions
    assert groups_of(looks_of(hashes)) == expected


def test_equal_shades_of_other_colours_are_no_copies():
    assert groups_of(looks_of([5, 5, 5], [100, 105, 112])) == [[0, 1], [2]]


def test_time_is_bounded_where_many_are_similar_but_not_alike(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_NEIGHBOURS", 3)
    looks = looks_of([5] * 9, [0, 50, 100, 150, 1, 51, 101, 151, 200])
    labels, is_complete = near_groups(looks, 4)
    assert not is_complete and len(np.unique(labels)) > 5


def test_thousands_that_look_alike_are_compared_few_times(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_NEIGHBOURS", 20)
    hashes = [1 << 3 * bit | 1 << other for bit in range(8) for other in range(30, 64)]
    compared = []
    differing_bits = duplicates._differing_bits
    monkeypatch.setattr(duplicates, "_differing_bits", lambda a, b: compared.append(len(a)) or differing_bits(a, b))
    assert groups_of(looks_of(hashes)) == [list(range(len(hashes)))]
    assert sum(compared) < 5 * len(hashes)


def test_kinds_of_duplicates_and_their_groups():
    images = np.array([[1, 1], [2, 2], [1, 1], [1, 1], [3, 3], [4, 4], [4, 4]], np.uint64)
    captions = np.array([7, 8, 7, 9, 7, 7, 7], np.uint64)
    looks = looks_of([5, 2**50 - 1, 5, 5, 7, 0, 0])
    looks.are_known[5:] = False  # plain: only equal images are duplicates
    found = find_duplicates(images, captions, looks, 4)
    assert found.kind.tolist() == [Kind.FIRST, Kind.FIRST, Kind.PAIR, Kind.IMAGE, Kind.NEAR, Kind.FIRST, Kind.PAIR]
    assert found.first.tolist() == [0, 1, 0, 0, 0, 5, 5]


def test_the_overlap_is_that_of_comparing_all():
    rng = np.random.default_rng(0)
    others = rng.integers(0, 2**64, 80, dtype=np.uint64).tolist()
    others += others[:10]
    hashes = rng.integers(0, 2**64, 100, dtype=np.uint64).tolist()
    for number in range(100):  # of which five in eight are near
        flips = rng.choice(64, number % 8, replace=False).tolist()
        hashes.append(others[number % 80] ^ sum(1 << bit for bit in flips))
    near = {(i, j) for i, a in enumerate(hashes) for j, b in enumerate(others) if (a ^ b).bit_count() <= 4}
    images = np.arange(2 * len(hashes), dtype=np.uint64).reshape(-1, 2)
    found = find_overlap(images, looks_of(hashes), images[: len(others)] + 1000, looks_of(others), 4)
    assert found.match.tolist() == [min((b for a, b in near if a == i), default=-1) for i in range(len(hashes))]
    assert set(np.flatnonzero(found.other_kind)) == {b for _, b in near} and len(near) > 60
    assert set(found.kind) == {Kind.FIRST, Kind.NEAR} and found.is_complete


def test_an_equal_image_is_matched_before_one_that_looks_alike():
    images = np.array([[1, 1], [2, 2], [3, 3]], np.uint64)
    others = np.array([[7, 7], [1, 1], [3, 3]], np.uint64)
    plain = looks_of([0, 2**50 - 1, 0])
    plain.are_known[2] = False
    found = find_overlap(images, plain, others, looks_of([0, 0, 2**40]), 4)
    assert found.match.tolist() == [1, -1, 2] and found.kind.tolist() == [Kind.IMAGE, Kind.FIRST, Kind.IMAGE]
    assert found.other_kind.tolist() == [Kind.NEAR, Kind.IMAGE, Kind.IMAGE]


def test_a_list_of_too_many_others_is_cut_and_reported(monkeypatch):
    monkeypatch.setattr("flip_hf.curation.overlap.MAX_NEIGHBOURS", 3)
    images = np.zeros((9, 2), np.uint64)
    others = looks_of([5] * 9, [0, 50, 100, 150, 25, 75, 125, 175, 200])
    assert not find_overlap(images[:1], looks_of([5], [200]), images + 1, others, 4).is_complete


def test_no_samples_have_no_overlap():
    none = np.empty((0, 2), np.uint64)
    one = np.ones((1, 2), np.uint64)
    assert find_overlap(none, looks_of([]), one, looks_of([5]), 4).other_kind.tolist() == [Kind.FIRST]
    assert find_overlap(one, looks_of([5]), none, looks_of([]), 4).match.tolist() == [-1]


def test_a_chain_of_near_copies_is_one_group():
    hashes = [0, 0b1111, 0b11111111]  # the last two of four bits each, the first and the last of eight
    images = np.arange(6, dtype=np.uint64).reshape(3, 2)
    assert find_duplicates(images, np.zeros(3, np.uint64), looks_of(hashes), 4).first.tolist() == [0, 0, 0]


def test_no_samples_have_no_duplicates():
    none = np.empty((0, 2), np.uint64)
    found = find_duplicates(none, none[:, 0], looks_of([]), 4)
    assert found.kind.tolist() == [] and found.is_complete


def encoded_again(image: Image.Image, scale: float, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize(("scale", "quality"), [(1.0, 60), (0.5, 90), (1.5, 90)])
def test_copies_share_hash_and_colours_and_other_pictures_do_not(pictures, scale, quality):
    kept = [image for image in pictures if perceptual_hash(image) is not None]
    copies = [encoded_again(image, scale, quality) for image in kept]
    both = [*kept, *copies]
    hashes = [perceptual_hash(image) or 0 for image in both]
    colours = np.array([list(quarter_colours(image)) for image in both], np.uint8)
    groups = groups_of(Looks(np.array(hashes, np.uint64), colours, np.ones(len(both), bool)))
    wanted = [[number, number + len(kept)] for number in range(len(kept))]
    assert sum(pair in groups for pair in wanted) >= 0.95 * len(wanted)
    assert sum(len(group) > 1 and group not in wanted for group in groups) <= 2


def test_a_plain_picture_has_no_perceptual_hash():
    assert perceptual_hash(Image.new("RGB", (50, 50), "white")) is None
    noisy = np.random.default_rng(0).integers(250, 256, (64, 64, 3), dtype=np.uint8)
    assert perceptual_hash(Image.fromarray(noisy)) is None


def test_a_content_hash_has_sixteen_bytes():
    assert len(content_hash(b"")) == 16 and content_hash(b"a") != content_hash(b"b")
