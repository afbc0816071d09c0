"""Crops, resizes and flips images to uint8 tensors. Normalisation happens on the device, for kept patches only.

Tensors have the shape (3, height, width), as elsewhere, but are views of memory with the channels last, as decoders
write and filters read them: reordering all pixels would take longer than cutting out the patches that are kept.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from flip_hf.data.decode import Box, bounded_shape, decode_crop, open_to_crop, upright_size
from flip_hf.data.rendering import WHITE, Colour


def resize(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resizes (height, width, 3) to (side, side, 3), uint8, antialiased bicubic: within two grey levels of Pillow's, in
    a fifth of the time if the processor has AVX2. Pixels of that size are returned as they are.
    """
    if pixels.shape[:2] == (side, side):  # the filter would copy every pixel
        return pixels
    # A batch is made first: only so does torch see that channels are last, and leaves them there.
    batch = pixels[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, (side, side), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0)


def random_crop_box(
    width: int, height: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draws a box (left, top, right, bottom) with a fraction of the image's area and a log-uniform aspect ratio.

    The first of ten candidates that fits is taken, or else the largest centred square, as in torchvision's
    RandomResizedCrop, which FLIP's own data pipeline follows.
    """
    for _ in range(10 if area[0] < 1 else 0):  # only the whole image has the whole area
        target = rng.uniform(*area) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return centre_square(width, height)


def centre_square(width: int, height: int) -> Box:
    """Returns the largest centred square (left, top, right, bottom)."""
    side = min(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    return left, top, left + side, top + side


@dataclass(frozen=True)
class TrainTransform:
    """The paper's augmentation: a random crop of at least half the area, resized, flipped half of the time.

    Args:
        crop_area: smallest and largest fraction of the area; (0.5, 1) in FLIP's code.
        crop_ratio: smallest and largest aspect ratio.
        flip: probability of a horizontal flip.
        background: colour of transparent parts.
    """

    crop_area: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    background: Colour = WHITE

    def __call__(self, value: object, rng: np.random.Generator, image_size: int) -> torch.Tensor:
        """Transforms an encoded image (see `open_to_crop`) to (3, image_size, image_size), uint8.

        Raises:
            RefusedSample: the image cannot be used.
        """
        image = open_to_crop(value)
        box = random_crop_box(*upright_size(image), self.crop_area, self.crop_ratio, rng)
        crop = torch.from_numpy(decode_crop(image, box, image_size, self.background))
        pixels = resize(crop, image_size).permute(2, 0, 1)
        return pixels.flip(2) if rng.random() < self.flip else pixels


@dataclass(frozen=True)
class EvalTransform:
    """The transform of the saved image processor, equal to the pixel: resize the short side, crop the centre.

    Args:
        image_size: side of the result, in pixels.
    """

    image_size: int

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transforms an image to (3, image_size, image_size), uint8."""
        image = bounded_shape(image)
        short = min(image.size)
        width, height = (int(self.image_size * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left = (width - self.image_size) // 2
        top = (height - self.image_size) // 2
        pixels = np.array(image.crop((left, top, left + self.image_size, top + self.image_size)))
        return torch.from_numpy(pixels).permute(2, 0, 1)
