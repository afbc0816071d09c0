import io

import numpy as np
import pytest
from PIL import Image

from flip_hf.data.shapes import (
    CLASS_NAMES,
    COLOURS,
    SHAPES,
    TEST_PAIRS,
    TRAIN_PAIRS,
    generate_test,
    generate_train,
    held_out,
    shapes_dataset,
)


def test_unseen_pairs_are_spread_evenly():
    assert len(TRAIN_PAIRS) == 40 and len(TEST_PAIRS) == 24 and not set(TRAIN_PAIRS) & set(TEST_PAIRS)
    for names, position in ((COLOURS, 0), (SHAPES, 1)):
        counts = [sum(pair[position] == name for pair in TEST_PAIRS) for name in names]
        assert counts == [3] * 8


def test_no_caption_names_an_unseen_pair_and_every_seen_one_is_named():
    captions = [row["caption"] for row in generate_train([0, 1, 2, 3], 2048, 64, seed=0)]
    assert not [c for c in captions if any(f"{name}" in c for name in CLASS_NAMES)]
    for colour, shape in TRAIN_PAIRS:
        assert any(f"{colour} {shape}" in caption for caption in captions)
    assert len(set(captions)) > 1200  # varied wording


def test_a_sample_depends_on_its_number_and_the_seed_alone():
    alone = next(iter(generate_train([1], 2048, 64, seed=3)))
    in_stream = list(generate_train([0, 1], 2048, 64, seed=3))[512]
    other = next(iter(generate_train([1], 2048, 64, seed=4)))
    assert alone == in_stream and alone != other


def test_test_images_show_their_class_in_its_colour():
    for row in generate_test([0], 48, 96, seed=0):
        colour, shape = TEST_PAIRS[row["label"]]
        assert held_out(colour, shape)
        pixels = np.array(Image.open(io.BytesIO(row["image"]["bytes"])), dtype=np.int32)
        assert pixels.shape == (96, 96, 3)
        assert (np.abs(pixels - np.array(COLOURS[colour])).max(axis=-1) < 40).mean() > 0.01


def test_it_streams_in_shards():
    train = shapes_dataset("train", num_samples=1300)
    test = shapes_dataset("test")
    assert train.num_shards == 3 and sum(1 for _ in train) == 1300
    assert test.features["label"].names == list(CLASS_NAMES)
    assert isinstance(next(iter(train))["image"]["bytes"], bytes)


@pytest.mark.parametrize(
    "bad", [{"split": "dev"}, {"split": "train", "num_samples": 0}, {"split": "test", "image_size": 8}]
)
def test_bad_requests_are_refused(bad):
    with pytest.raises(ValueError):
        shapes_dataset(**bad)
