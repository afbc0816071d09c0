"""Draws the method in one figure: `python docs/figures/method.py` writes method.svg beside itself."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from flip_hf.data.shapes import shapes_dataset
from flip_hf.modeling.masking_flip import random_masking

# Letters as outlines: the same picture everywhere. No date and no random ids: the same file from the same code.
matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "flip_hf", "font.size": 10})
INK = "#222222"
GREY = "#6b6b6b"
PALE = "#eeeeee"
IMAGE_FILL = "#dbe7f6"
TEXT_FILL = "#fbe8d0"
GRID = 6
PIXELS = 120


def a_scene() -> tuple[np.ndarray, str]:
    """An image of the embedded test data (P, P, 3) and a caption for it."""
    *_, row = shapes_dataset("test", image_size=PIXELS, num_samples=2)
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")), "a red diamond"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, fill: str) -> None:
    """A rounded box with its text in the middle."""
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=INK, linewidth=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from one point to the other."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.2))


def note(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    """A line of explanation, centred below a point."""
    axes.text(x, y, text, **{"ha": "center", "va": "top", "color": GREY, "fontsize": 9, **style})


def draw_patches(axes: Axes, image: np.ndarray, corner: tuple[float, float], side: float, kept: set[int]) -> None:
    """An image in its grid of patches; those that are not kept are left blank."""
    pixels = PIXELS // GRID
    step = side / GRID
    x, y = corner
    for index in range(GRID * GRID):
        row, column = divmod(index, GRID)
        left = x + column * step
        bottom = y + side - (row + 1) * step
        if index in kept:
            patch = image[row * pixels : (row + 1) * pixels, column * pixels : (column + 1) * pixels]
            axes.imshow(patch, extent=(left, left + step, bottom, bottom + step), interpolation="nearest", zorder=1)
        place = Rectangle(
            (left, bottom), step, step, facecolor="none" if index in kept else PALE, edgecolor="white", lw=0.6
        )
        axes.add_patch(place)


def draw_contrast(axes: Axes, x: float, y: float, side: float) -> None:
    """Similarities of all images of a batch with all texts; pairs lie on the diagonal."""
    count = 5
    step = side / 5
    for row in range(count):
        for column in range(count):
            fill = "#4b78b8" if row == column else PALE
            corner = (x + column * step, y + side - (row + 1) * step)
            axes.add_patch(Rectangle(corner, step, step, facecolor=fill, edgecolor="white"))
    note(axes, x + side / 2, y - 0.12, "every image with every text;\npairs on the diagonal should win")


def main() -> None:
    """Draws training above, use below."""
    image, caption = a_scene()
    torch.manual_seed(3)
    kept = set(random_masking(1, GRID * GRID, 0.5, "cpu")[0].tolist())
    every = set(range(GRID * GRID))
    figure = Figure(figsize=(10, 5.2), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    title = {"fontsize": 11, "fontweight": "bold", "color": INK, "va": "center"}

    axes.text(0.3, 7.35, "Training", **title)
    draw_patches(axes, image, (0.3, 4.7), 2.0, every)
    note(axes, 1.3, 4.58, "an image, cut into patches")
    arrow(axes, (2.5, 5.7), (3.1, 5.7))
    draw_patches(axes, image, (3.3, 4.7), 2.0, kept)
    note(axes, 4.3, 4.58, "half of them or more\nare dropped at random")
    arrow(axes, (5.5, 5.7), (6.1, 5.7))
    box(axes, 6.2, 5.1, 2.9, 1.2, "image encoder (ViT)\nvisible patches alone", IMAGE_FILL)
    arrow(axes, (9.2, 5.7), (10.9, 5.3))
    axes.text(4.3, 3.3, f"“{caption}”", ha="center", va="center", color=INK, style="italic")
    arrow(axes, (5.5, 3.3), (6.1, 3.3))
    box(axes, 6.2, 2.8, 2.9, 1.0, "text encoder", TEXT_FILL)
    arrow(axes, (9.2, 3.3), (10.9, 4.3))
    draw_contrast(axes, 11.1, 3.9, 1.8)
    note(axes, 12.0, 6.4, "contrastive loss", color=INK, fontsize=10)
    note(axes, 7.65, 6.95, "no decoder, nothing is reconstructed")

    axes.plot((0.3, 13.7), (2.35, 2.35), color="#cccccc", linewidth=1)
    axes.text(0.3, 2.05, "At test time", **title)
    draw_patches(axes, image, (3.55, 0.3), 1.5, every)
    arrow(axes, (5.3, 1.05), (6.1, 1.05))
    box(axes, 6.2, 0.5, 2.9, 1.1, "the same image encoder\nthe whole image", IMAGE_FILL)
    arrow(axes, (9.2, 1.05), (10.0, 1.05))
    labels = ("a red diamond", "a blue square", "a green star")
    for place, (label, width) in enumerate(zip(labels, (1.5, 0.35, 0.2), strict=True)):
        height = 1.45 - 0.4 * place
        axes.text(10.2, height, label, va="center", color=INK)
        axes.add_patch(Rectangle((12.0, height - 0.11), width, 0.22, facecolor="#4b78b8" if place == 0 else "#b9c6d8"))

    axes.set(xlim=(0, 14), ylim=(0, 7.7), aspect="equal")
    axes.set_axis_off()
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
