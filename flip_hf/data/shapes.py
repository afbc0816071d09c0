"""The embedded data set: procedural scenes with captions, made by a seeded generator.

It exists so that a fresh clone trains and is measured without a download, and it enters the library through the same
door as any other data. A scene has one to three objects, each with a shape, colour, texture, size and place, on one of
several backgrounds; the caption names some of these in varied words. Of the 64 colour-shape pairs, 24 never occur in
training (each colour and each shape misses three); naming the pair in images of these is the zero-shot test, at a
chance of 1 in 24.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

# Bright colours on dark backgrounds: the silhouette always has the same polarity, which small ViTs need.
COLOURS = {
    "red": (235, 55, 55),
    "green": (60, 200, 85),
    "blue": (80, 125, 255),
    "yellow": (245, 225, 60),
    "purple": (175, 80, 230),
    "orange": (250, 145, 40),
    "cyan": (70, 225, 230),
    "pink": (250, 150, 195),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": (0.36, 0.44), "medium-sized": (0.50, 0.60), "large": (0.68, 0.84)}  # diameter / image side
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium-sized": ("medium-sized",),
    "large": ("large", "big", "huge"),
}
NUM_OBJECTS = np.array([0.6, 0.3, 0.1])  # how often a scene has one, two, three objects
BACKGROUNDS = {"black": (16, 16, 18), "grey": (72, 72, 76), "brown": (72, 46, 28), "navy": (22, 28, 74)}
BACKGROUND_STYLES = ("flat", "shaded", "grainy")
ARTICLE_OPENINGS = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "this is {}", "there is {}")

# One template for each way in which a caption may open, for zero-shot classification.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "this is a {}.")

SAMPLES_PER_SHARD = 512
NUM_SAMPLES = {"train": 64 * SAMPLES_PER_SHARD, "test": 480}
_TEST_OFFSETS = (0, 3, 5)  # each colour meets three shapes only in the test, and the reverse


def held_out(colour: str, shape: str) -> bool:
    """Whether this pair never occurs in training."""
    return (tuple(COLOURS).index(colour) + SHAPES.index(shape)) % len(SHAPES) in _TEST_OFFSETS


PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
TRAIN_PAIRS = tuple(pair for pair in PAIRS if not held_out(*pair))
TEST_PAIRS = tuple(pair for pair in PAIRS if held_out(*pair))
CLASS_NAMES = tuple(f"{colour} {shape}" for colour, shape in TEST_PAIRS)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; `x`, `y` (centre) and `diameter` are fractions of the image side."""

    colour: str
    shape: str
    texture: str
    size: str
    x: float
    y: float
    diameter: float


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------


def _choose(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _draw_object(rng: np.random.Generator, pair: tuple[str, str], others: list[SceneObject]) -> SceneObject | None:
    """An object that keeps clear of the others, or None if no place was found."""
    texture = "plain" if rng.random() < 0.6 else _choose(rng, TEXTURES[1:])
    size = _choose(rng, tuple(SIZES))
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
        candidate = _draw_object(rng, _choose(rng, pairs), objects)
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
    """The object with article and a random choice of its attributes."""
    words = []
    if rng.random() < 0.3:
        words.append(_choose(rng, SIZE_WORDS[obj.size]))
    if obj.texture != "plain" and rng.random() < 0.5:
        words.append(obj.texture)
    words += [obj.colour, obj.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _relation(first: SceneObject, second: SceneObject) -> str:
    dx, dy = second.x - first.x, second.y - first.y
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
    text = _choose(rng, ARTICLE_OPENINGS).format(body)
    return text + ("." if rng.random() < 0.5 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def _polygon(shape: str) -> np.ndarray:
    """Corners of a polygonal shape in the unit disc, (corners, 2)."""
    if shape == "square":
        return np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    if shape == "triangle":
        return np.array([(0, -0.95), (0.95, 0.75), (-0.95, 0.75)])
    if shape == "diamond":
        return np.array([(0, -1), (0.62, 0), (0, 1), (-0.62, 0)])
    if shape == "cross":
        a, b = 0.32, 0.95
        return np.array(
            [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        )
    if shape == "star":
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    t = np.linspace(0, 2 * math.pi, 40)  # heart
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1) / 17


def _silhouette(shape: str, diameter: int) -> Image.Image:
    """The shape's coverage, mode L, antialiased by drawing it at three times the size."""
    side = 3 * diameter
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        if shape == "ring":
            inset = 0.28 * side
            pen.ellipse((inset, inset, side - 1 - inset, side - 1 - inset), fill=0)
    else:
        pen.polygon([tuple(p) for p in ((_polygon(shape) + 1) * side / 2).tolist()], fill=255)
    return mask.reduce(3)


# The same few silhouettes come up again and again; drawing one costs more than the rest of the scene.
_cached_silhouette = lru_cache(maxsize=1024)(_silhouette)


@lru_cache(maxsize=256)
def _pattern(texture: str, side: int) -> Image.Image:
    """Where a texture is dark, mode L."""
    y, x = np.mgrid[:side, :side]
    period = max(4, round(side / 3.5))
    if texture == "striped":
        dark = (x + y) % period < period / 2
    elif texture == "dotted":
        dark = ((x % period) - period / 2) ** 2 + ((y % period) - period / 2) ** 2 < (0.32 * period) ** 2
    else:
        dark = ((2 * x // period) + (2 * y // period)) % 2 == 0
    return Image.fromarray(dark.astype(np.uint8) * 255)


def _jitter(rng: np.random.Generator, colour: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    values = np.clip(np.array(colour) + rng.integers(-amount, amount + 1, size=3), 0, 255)
    return int(values[0]), int(values[1]), int(values[2])


def _draw_background(rng: np.random.Generator, name: str, side: int) -> Image.Image:
    colour = np.array(_jitter(rng, BACKGROUNDS[name], 14), dtype=np.float32)
    canvas = np.broadcast_to(colour, (side, side, 3))
    style = _choose(rng, BACKGROUND_STYLES)
    if style == "shaded":
        ramp = np.linspace(-16, 16, side, dtype=np.float32)
        canvas = canvas + (ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None])
    elif style == "grainy":
        canvas = canvas + rng.normal(0, 10, size=(side, side, 1)).astype(np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _draw(rng: np.random.Generator, objects: list[SceneObject], background: str, side: int) -> Image.Image:
    image = _draw_background(rng, background, side)
    for obj in objects:
        diameter = max(6, round(obj.diameter * side))
        colour = _jitter(rng, COLOURS[obj.colour], 12)
        mask = _cached_silhouette(obj.shape, diameter)
        fill = Image.new("RGB", mask.size, colour)
        if obj.texture != "plain":
            dark = tuple(int(0.65 * c) for c in colour)
            fill.paste(dark, mask=_pattern(obj.texture, mask.size[0]))
        image.paste(fill, (round(obj.x * side - diameter / 2), round(obj.y * side - diameter / 2)), mask)
    return image


def _encode(image: Image.Image) -> bytes:
    """JPEG without chroma subsampling: small objects keep their colour."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def generate_train(shards: list[int], num_samples: int, image_size: int, seed: int) -> Iterator[dict]:
    """Yields `{"image": {"bytes", "path"}, "caption"}` for the given shards; a sample depends on its number alone."""
    for shard in shards:
        for index in range(shard * SAMPLES_PER_SHARD, min((shard + 1) * SAMPLES_PER_SHARD, num_samples)):
            rng = np.random.default_rng((seed, 0, index))
            objects = _draw_scene(rng, TRAIN_PAIRS, max_objects=3)
            background = _choose(rng, tuple(BACKGROUNDS))
            image = _encode(_draw(rng, objects, background, image_size))
            yield {
                "image": {"bytes": image, "path": f"train-{index:07d}.jpg"},
                "caption": _caption(rng, objects, background),
            }


def generate_test(shards: list[int], num_samples: int, image_size: int, seed: int) -> Iterator[dict]:
    """Yields `{"image": {"bytes", "path"}, "label"}`: one object of a held-out pair, classes in turn."""
    for shard in shards:
        for index in range(shard * SAMPLES_PER_SHARD, min((shard + 1) * SAMPLES_PER_SHARD, num_samples)):
            rng = np.random.default_rng((seed, 1, index))
            label = index % len(TEST_PAIRS)
            objects = _draw_scene(rng, (TEST_PAIRS[label],), max_objects=1)
            image = _encode(_draw(rng, objects, _choose(rng, tuple(BACKGROUNDS)), image_size))
            yield {"image": {"bytes": image, "path": f"test-{index:07d}.jpg"}, "label": label}


def shapes_dataset(split: str, *, num_samples: int | None = None, image_size: int = 64, seed: int = 0):
    """The embedded data set as a `datasets.IterableDataset`, its images as undecoded JPEG.

    It is drawn once and then read from the `datasets` cache, like any data set that was downloaded.

    Args:
        split: `"train"` (columns image, caption) or `"test"` (columns image, label; the classes are `CLASS_NAMES`).
        num_samples: how many samples; they lie in shards of 512. By default 32,768 and 480.
        image_size: side of the square images, in pixels; at least 32.
        seed: another seed gives other scenes.

    Raises:
        ValueError: an unknown split, no samples, or images too small for the objects to be told apart.
    """
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    if split not in ("train", "test"):
        raise ValueError(f"The embedded data set has the splits 'train' and 'test', not {split!r}.")
    num_samples = NUM_SAMPLES[split] if num_samples is None else num_samples
    if num_samples < 1 or image_size < 32:
        raise ValueError(f"num_samples must be >= 1 and image_size >= 32, got {num_samples} and {image_size}.")
    image = ImageFeature(decode=False)
    target = {"caption": Value("string")} if split == "train" else {"label": ClassLabel(names=list(CLASS_NAMES))}
    num_shards = math.ceil(num_samples / SAMPLES_PER_SHARD)
    dataset = Dataset.from_generator(
        generate_train if split == "train" else generate_test,
        features=Features({"image": image, **target}),
        gen_kwargs={
            "shards": list(range(num_shards)),
            "num_samples": num_samples,
            "image_size": image_size,
            "seed": seed,
        },
    )
    return dataset.to_iterable_dataset(num_shards=num_shards)  # pyright: ignore[reportAttributeAccessIssue]
