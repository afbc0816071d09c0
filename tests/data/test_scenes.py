import io

import numpy as np
import pytest
from PIL import Image

from flip_hf.data.drawing import COLOURS
from flip_hf.data.scenes import (
    CLASS_NAMES,
    TEST_COMBINATIONS,
    TRAIN_COMBINATIONS,
    generate_test,
    generate_train,
    scenes_dataset,
)
from flip_hf.data.sources import open_source
from flip_hf.training.evaluation_data import open_evaluation_data, templates
from flip_hf.training.recipes import parse_arguments
from tests.helpers.programs import ROOT


def test_combinations_of_the_test_are_never_trained_on_and_share_all_their_parts_with_training():
    assert len(TRAIN_COMBINATIONS) == 1312 and len(TEST_COMBINATIONS) == len(set(CLASS_NAMES)) == 256
    assert not set(TRAIN_COMBINATIONS) & set(TEST_COMBINATIONS)
    trained = {pair for combination in TRAIN_COMBINATIONS for pair in combination}
    assert {pair for combination in TEST_COMBINATIONS for pair in combination} <= trained and len(trained) == 64
    assert all(one[0] != other[0] and one[1] != other[1] for one, other in TRAIN_COMBINATIONS + TEST_COMBINATIONS)


def test_captions_name_both_objects_of_a_trained_combination():
    trained = {frozenset(" ".join(pair) for pair in combination) for combination in TRAIN_COMBINATIONS}
    names = {name for combination in trained for name in combination}
    captions = [row["caption"] for row in generate_train([0, 1], 1024, 32, seed=0)]
    for caption in captions:
        assert frozenset(name for name in names if name in caption) in trained, caption
    for relation in ("left of", "right of", "above", "below", " and ", "striped"):
        assert any(relation in caption for caption in captions)
    assert not any("a orange" in text for text in (*captions, *CLASS_NAMES))


def test_pictures_show_the_colours_of_their_class_at_the_place_that_the_caption_says():
    for row in generate_test([0], 64, 96, seed=0):
        pixels = np.array(Image.open(io.BytesIO(row["image"]["bytes"])), dtype=np.int32)
        for colour, _ in TEST_COMBINATIONS[row["label"]]:
            assert (np.abs(pixels - np.array(COLOURS[colour])).max(axis=-1) < 45).mean() > 0.005, row["label"]
    checked = 0
    for row in generate_train([0], 256, 96, seed=0):
        words = row["caption"].rstrip(".").split()
        if "left" not in words:
            continue
        pixels = np.array(Image.open(io.BytesIO(row["image"]["bytes"])), dtype=np.int32)
        first, second = [word for word in words if word in COLOURS]
        columns = [
            np.nonzero(np.abs(pixels - np.array(COLOURS[colour])).max(axis=-1) < 45)[1].mean()
            for colour in (first, second)
        ]
        assert columns[0] < columns[1], row["caption"]
        checked += 1
    assert checked > 10


def test_it_is_a_source_with_a_test_and_prompts_of_its_own():
    train = open_source("scenes")
    test = open_source("scenes", split="test", kind="label")
    assert train.target_column == "caption" and test.class_names == CLASS_NAMES
    data = parse_arguments(["scenes"], ROOT / "flip_hf" / "recipes", "shapes").data
    evaluation = open_evaluation_data(data)
    assert evaluation.images is not None and evaluation.images.name == "scenes"
    assert evaluation.class_names == CLASS_NAMES and templates(data)[0] == "a photo of {}."
    with pytest.raises(ValueError, match="embedded data 'scenes' has the splits"):
        scenes_dataset("validation")
