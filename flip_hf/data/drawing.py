"""Draws the pictures of the embedded data: coloured, textured silhouettes on plain backgrounds."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

T = TypeVar("T")
# Bright colours on dark backgrounds give silhouettes one polarity, which small ViTs need.
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
BACKGROUNDS = {"black": (16, 16, 18), "grey": (72, 72, 76), "brown": (72, 46, 28), "navy": (22, 28, 74)}
BACKGROUND_STYLES = ("flat", "shaded", "grainy")


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


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Chooses one of the options, with equal probability."""
    return options[int(rng.integers(len(options)))]


def _polygon(shape: str) -> np.ndarray:
    """Returns the corners of a polygonal shape in the unit disc, (corners, 2)."""
    if shape == "square":
        return np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    if shape == "triangle":
        return np.array([(0, -0.95), (0.95, 0.75), (-0.95, 0.75)])
    if shape == "diamond":
        return np.array([(0, -1), (0.62, 0), (0, 1), (-0.62, 0)])
    if shape == "cross":
        a = 0.32
        b = 0.95
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
    """Draws the coverage of a shape, mode L, antialiased by drawing it at three times the size."""
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


# A few silhouettes recur all the time, and drawing one costs more than the rest of the scene.
_cached_silhouette = lru_cache(maxsize=1024)(_silhouette)


@lru_cache(maxsize=256)
def _pattern(texture: str, side: int) -> Image.Image:
    """Draws a mask of the dark parts of a texture, mode L."""
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
    style = choose(rng, BACKGROUND_STYLES)
    if style == "shaded":
        ramp = np.linspace(-16, 16, side, dtype=np.float32)
        canvas = canvas + (ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None])
    elif style == "grainy":
        canvas = canvas + rng.normal(0, 10, size=(side, side, 1)).astype(np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def draw(rng: np.random.Generator, objects: list[SceneObject], background: str, side: int) -> Image.Image:
    """Draws a picture of the objects, `side` pixels wide and high."""
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


def encode(image: Image.Image) -> bytes:
    """Encodes as JPEG without chroma subsampling, so that small objects keep their colour."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
