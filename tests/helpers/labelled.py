"""Small labelled pictures, with the class-label type of the Hub's data sets."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from flip_hf.data.drawing import encode

COLOURS = {"red_square": (220, 40, 40), "green_square": (40, 200, 60), "blue_square": (50, 80, 230)}
FEATURES = Features({"img": Image(), "fine_label": ClassLabel(names=list(COLOURS))})


def labelled_pictures(count: int) -> Dataset:
    """Noise on the colour of each class."""
    rng = np.random.default_rng(count)
    rows = {"img": [], "fine_label": []}
    for number in range(count):
        colour = list(COLOURS.values())[number % 3]
        pixels = (np.array(colour) + rng.integers(-40, 41, (32, 32, 3))).clip(0, 255).astype(np.uint8)
        rows["img"].append({"bytes": encode(PILImage.fromarray(pixels)), "path": None})
        rows["fine_label"].append(number % 3)
    return Dataset.from_dict(rows, features=FEATURES)
