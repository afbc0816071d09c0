"""The embedded data set: procedural scenes with captions, made by a seeded generator.

It lets a fresh clone train and be evaluated without a download, and is read like any other data. A scene has one to
three objects, each with a shape, colour, texture, size and place, on one of several backgrounds; the caption names
some of these in varied words. Of the 64 colour-shape pairs, 24 never occur in training (each colour and each shape
misses three); naming the pair in images of these is the zero-shot test, at a chance of 1 in 24.
"""

import math
from collections.abc import Iterator

import numpy as np

from flip_hf.data.drawing import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE_WORDS,
    SIZES,
    TEXTURES,
    SceneObject,
    choose,
    draw,
    encode,
)
from flip_hf.data.embedded import SAMPLES_PER_SHARD, EmbeddedData, numbers

NUM_OBJECTS = np.array([0.6, 0.3, 0.1])  # how often a scene has one, two, three objects
ARTICLE_OPENINGS = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "this is {}", "there is {}")

# Templates for zero-shot classification, matching the openings of captions.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "this is a {}.")

NUM_SAMPLES = {"train": 64 * SAMPLES_PER_SHARD, "test": 480}
_TEST_OFFSETS = (0, 3, 5)  # each colour meets three shapes only in the test, and vice versa


def held_out(colour: str, shape: str) -> bool:
    """Returns whether this pair never occurs in training."""
    return (tuple(COLOURS).index(colour) + SHAPES.index(shape)) % len(SHAPES) in _TEST_OFFSETS


PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
TRAIN_PAIRS = tuple(pair for pair in PAIRS if not held_out(*pair))
TEST_PAIRS = tuple(pair for pair in PAIRS if held_out(*pair))
CLASS_NAMES = tuple(f"{colour} {shape}" for colour, shape in TEST_PAIRS)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------


def _draw_object(rng: np.random.Generator, pair: tuple[str, str], others: list[SceneObject]) -> SceneObject | None:
    """Draws an object that does not touch the others, or returns None if there is no place for it."""
    texture = "plain" if rng.random() < 0.6 else choose(rng, TEXTURES[1:])
    size = choose(rng, tuple(SIZES))
    if others and size == "large":
        size = "small"
    diameter = float(rng.uniform(*SIZES[size]))
    for _ in range(8):
        x, y = (float(v) for v in rng.uniform(diameter / 2, 1 - diameter / 2, size=2))
        if all(math.hypot(x - o.x, y - o.y) > 0.5 * (diameter + o.diameter) for o in others):
            return SceneObject(*pair, texture, size, x, y, diameter)
    return None


def _draw_scene(rng: np.random.Generator, pairs: tuple[tuple[str, str], ...], max_objects: int) -> list[SceneObject]:
    objects: list[SceneObject] = []
    count = int(rng.choice(max_objects, p=NUM_OBJECTS[:max_objects] / NUM_OBJECTS[:max_objects].sum())) + 1
    for _ in range(count):
        candidate = _draw_object(rng, choose(rng, pairs), objects)
        if candidate is not None:
            objects.append(candidate)
    return objects


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


def _place(obj: SceneObject) -> str:
    row = "top" if obj.y < 0.4 else "bottom" if obj.y > 0.6 else ""
    column = "left" if obj.x < 0.4 else "right" if obj.x > 0.6 else ""
    return f"at the {row} {column}".replace("  ", " ").rstrip() if row or column else "in the middle"


def _name(rng: np.random.Generator, obj: SceneObject) -> str:
    """Names the object with an article and a random choice of its attributes."""
    words = []
    if rng.random() < 0.3:
        words.append(choose(rng, SIZE_WORDS[obj.size]))
    if obj.texture != "plain" and rng.random() < 0.5:
        words.append(obj.texture)
    words += [obj.colour, obj.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _relation(first: SceneObject, second: SceneObject) -> str:
    dx = second.x - first.x
    dy = second.y - first.y
    if abs(dy) > abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"


def _caption(rng: np.random.Generator, objects: list[SceneObject], background: str) -> str:
    names = [_name(rng, obj) for obj in objects]
    if len(objects) == 1:
        body = names[0] if rng.random() < 0.75 else f"{names[0]} {_place(objects[0])}"
    elif len(objects) == 2 and rng.random() < 0.5:
        body = f"{names[0]} {_relation(*objects)} {names[1]}"
    else:
        body = ", ".join(names[:-1]) + f" and {names[-1]}"
    if rng.random() < 0.2:
        body += f" on a {background} background"
    text = choose(rng, ARTICLE_OPENINGS).format(body)
    return text + ("." if rng.random() < 0.5 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def generate_train(shards: list[int], num_samples: int, image_size: int, seed: int) -> Iterator[dict]:
    """Yields `{"image": {"bytes", "path"}, "caption"}` for the given shards; a sample depends only on its number."""
    for index in numbers(shards, num_samples):
        rng = np.random.default_rng((seed, 0, index))
        objects = _draw_scene(rng, TRAIN_PAIRS, max_objects=3)
        background = choose(rng, tuple(BACKGROUNDS))
        image = encode(draw(rng, objects, background, image_size))
        yield {
            "image": {"bytes": image, "path": f"train-{index:07d}.jpg"},
            "caption": _caption(rng, objects, background),
        }


def generate_test(shards: list[int], num_samples: int, image_size: int, seed: int) -> Iterator[dict]:
    """Yields `{"image": {"bytes", "path"}, "label"}`of one object of a held-out pair, classes in turn."""
    for index in numbers(shards, num_samples):
        rng = np.random.default_rng((seed, 1, index))
        label = index % len(TEST_PAIRS)
        objects = _draw_scene(rng, (TEST_PAIRS[label],), max_objects=1)
        image = encode(draw(rng, objects, choose(rng, tuple(BACKGROUNDS)), image_size))
        yield {"image": {"bytes": image, "path": f"test-{index:07d}.jpg"}, "label": label}


DATA = EmbeddedData(
    name="shapes",
    generators={"train": generate_train, "test": generate_test},
    num_samples=NUM_SAMPLES,
    class_names=CLASS_NAMES,
    templates=TEMPLATES,
)
shapes_dataset = DATA.load
