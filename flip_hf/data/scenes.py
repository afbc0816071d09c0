"""The harder embedded data set: two objects, to be distinguished from 255 combinations that were never seen together.

While `shapes` is nearly learned in minutes on a CPU, this data set leaves room to compare ways of training.
Each picture has two objects, side by side or one above the other, of different colours and shapes; its caption names
both, in either order. Of the 1,568 combinations, 256 never occur in training; naming the combination is the zero-shot
test, at a chance of 1 in 256. Most wrong answers share a colour or a shape with the right one: two colours and two
shapes have to be seen. Which goes with which matters less, as few of the 256 have the same four.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from flip_hf.data.drawing import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, SceneObject, choose, draw, encode
from flip_hf.data.embedded import SAMPLES_PER_SHARD, EmbeddedData, numbers
from flip_hf.data.shapes import ARTICLE_OPENINGS

Pair = tuple[str, str]
Combination = tuple[Pair, Pair]

NUM_SAMPLES = {"train": 128 * SAMPLES_PER_SHARD, "test": 2048}
DIAMETERS = (0.36, 0.46)  # of the image side
NUM_CLASSES = 256
TEMPLATES = ("a photo of {}.", "a picture of {}.", "this is {}.")

_OBJECTS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_COMBINATIONS: tuple[Combination, ...] = tuple(
    (one, other) for one, other in combinations(_OBJECTS, 2) if one[0] != other[0] and one[1] != other[1]
)
# Every sixth, so that colours and shapes are about equally frequent on both sides.
TEST_COMBINATIONS = _COMBINATIONS[::6][:NUM_CLASSES]
TRAIN_COMBINATIONS = tuple(sorted(set(_COMBINATIONS) - set(TEST_COMBINATIONS)))


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


CLASS_NAMES = tuple(f"{_article(' '.join(one))} and {_article(' '.join(other))}" for one, other in TEST_COMBINATIONS)


def _place(rng: np.random.Generator, pairs: Combination) -> tuple[list[SceneObject], str]:
    """Places the two objects, and returns them, the left or upper one first, with the words for their arrangement."""
    first, second = pairs if rng.random() < 0.5 else pairs[::-1]
    beside = rng.random() < 0.5
    objects = []
    for pair, middle in ((first, 0.26), (second, 0.74)):
        diameter = float(rng.uniform(*DIAMETERS))
        along = middle + float(rng.uniform(-0.02, 0.02))
        across = float(rng.uniform(diameter / 2, 1 - diameter / 2))
        texture = "plain" if rng.random() < 0.6 else choose(rng, TEXTURES[1:])
        x, y = (along, across) if beside else (across, along)
        objects.append(SceneObject(*pair, texture, "", x, y, diameter))
    return objects, "left of" if beside else "above"


def _name(rng: np.random.Generator, obj: SceneObject) -> str:
    texture = f"{obj.texture} " if obj.texture != "plain" and rng.random() < 0.3 else ""
    return _article(f"{texture}{obj.colour} {obj.shape}")


def _caption(rng: np.random.Generator, objects: list[SceneObject], relation: str) -> str:
    names = [_name(rng, obj) for obj in objects]
    if rng.random() < 0.4:
        opposite = {"left of": "right of", "above": "below"}[relation]
        body = f"{names[0]} {relation} {names[1]}" if rng.random() < 0.5 else f"{names[1]} {opposite} {names[0]}"
    else:
        body = " and ".join(names if rng.random() < 0.5 else names[::-1])
    return choose(rng, ARTICLE_OPENINGS).format(body) + ("." if rng.random() < 0.5 else "")


def _picture(rng: np.random.Generator, objects: list[SceneObject], side: int, path: str) -> dict:
    image = encode(draw(rng, objects, choose(rng, tuple(BACKGROUNDS)), side))
    return {"image": {"bytes": image, "path": path}}


def generate_train(shards: list[int], num_samples: int, image_size: int, seed: int) -> Iterator[dict]:
    """Yields `{"image": {"bytes", "path"}, "caption"}` for the given shards; a sample depends only on its number."""
    for index in numbers(shards, num_samples):
        rng = np.random.default_rng((seed, 2, index))
        objects, relation = _place(rng, choose(rng, TRAIN_COMBINATIONS))
        row = _picture(rng, objects, image_size, f"train-{index:07d}.jpg")
        yield {**row, "caption": _caption(rng, objects, relation)}


def generate_test(shards: list[int], num_samples: int, image_size: int, seed: int) -> Iterator[dict]:
    """Yields `{"image": {"bytes", "path"}, "label"}`of held-out combinations, in turn."""
    for index in numbers(shards, num_samples):
        rng = np.random.default_rng((seed, 3, index))
        objects, _ = _place(rng, TEST_COMBINATIONS[index % NUM_CLASSES])
        yield {**_picture(rng, objects, image_size, f"test-{index:07d}.jpg"), "label": index % NUM_CLASSES}


DATA = EmbeddedData(
    name="scenes",
    generators={"train": generate_train, "test": generate_test},
    num_samples=NUM_SAMPLES,
    class_names=CLASS_NAMES,
    templates=TEMPLATES,
)
scenes_dataset = DATA.load
