"""Pictures that go to the device as bytes become the numbers that the image processor makes of them, to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flip_hf.evaluation.colours import _looked_up_at_once, looked_up
from flip_hf.evaluation.encoder import ImageTransform

SQUARE = {"height": 32, "width": 32}
PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
    "siglip": SiglipImageProcessorPil(size=SQUARE),
    "vit": ViTImageProcessor(size=SQUARE),
    "unusual": CLIPImageProcessorPil(
        size={"shortest_edge": 40},
        crop_size=SQUARE,
        rescale_factor=1 / 127.5,
        image_mean=[0.9, 1.1, 1],
        image_std=[2] * 3,
    ),
}


def pictures() -> list[Image.Image | np.ndarray]:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 32), (50, 33), (7, 90), (1, 1))]
    return [*map(Image.fromarray, noise), noise[1], Image.fromarray(noise[0][..., 0])]


@pytest.mark.parametrize("name", PROCESSORS)
def test_bytes_become_the_image_processors_own_numbers(name):
    transform = ImageTransform(PROCESSORS[name])
    pixels = torch.stack([transform.pixels(picture) for picture in pictures()])
    assert pixels.dtype == torch.uint8
    assert torch.equal(transform.normalize(pixels), torch.stack([transform(picture) for picture in pictures()]))


class Gamma(CLIPImageProcessorPil):
    """Does something else to a whole picture after its bytes were resized."""

    def normalize(self, image, mean, std, **kwargs):
        return super().normalize(image / max(image.max(), 1e-3), mean, std, **kwargs)


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, do_normalize=False),
        Gamma(size={"shortest_edge": 32}, crop_size=SQUARE),
    ],
    ids=["not normalised", "of its own"],
)
def test_other_image_processors_make_the_numbers_themselves(processor):
    transform = ImageTransform(processor)
    for picture in pictures():
        pixels = transform.pixels(picture)
        assert pixels.dtype == torch.float32
        assert torch.equal(transform.normalize(pixels[None])[0], transform(picture))


@pytest.mark.parametrize("look_up", [looked_up, _looked_up_at_once], ids=["here", "on another device"])
def test_the_numbers_are_those_of_the_table(look_up):
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    table = torch.randn(3, 256)
    expected = torch.stack([table[channel][pixels[:, channel].long()] for channel in range(3)], dim=1)
    assert torch.equal(look_up(pixels, table), expected)
