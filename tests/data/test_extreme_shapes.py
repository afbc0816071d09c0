"""Pictures of extreme shape: what they need does not grow with their shape, and other pictures stay what they were."""

import io

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flip_hf.data.decode import MAX_ASPECT, bounded_shape, decode_image
from flip_hf.data.transforms import EvalTransform, TrainTransform
from flip_hf.evaluation.encoder import ImageTransform
from flip_hf.modeling.image_processing_flip import FlipImageProcessorPil

SIDE = 32
SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
FIXED = {"size": {"height": SIDE, "width": SIDE}}


def stripes(width: int, height: int) -> Image.Image:
    """Bands of colour that change slowly along the long side."""
    along = np.linspace(0, 60, max(width, height))
    bands = np.stack([128 + 100 * np.sin(along + phase) for phase in range(3)], axis=-1).astype(np.uint8)
    pixels = np.broadcast_to(bands, (min(width, height), *bands.shape))
    return Image.fromarray(np.ascontiguousarray(pixels if width > height else pixels.transpose(1, 0, 2)))


def unbounded(image: Image.Image) -> np.ndarray:
    """The whole picture, resized, of which the central square is kept."""
    width, height = (int(SIDE * side / min(image.size)) for side in image.size)
    left = (width - SIDE) // 2
    top = (height - SIDE) // 2
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))[top : top + SIDE, left : left + SIDE]


def processors() -> list:
    made: list = [CLIPImageProcessorPil(**SQUARE)]
    made += [FlipImageProcessorPil(do_center_crop=crops, **FIXED) for crops in (True, False)]
    for kind, options in ((CLIPImageProcessor, SQUARE), (SiglipImageProcessor, FIXED)):
        try:
            made.append(kind(**options))
        except ImportError:  # torchvision is not here
            continue
    return made


@pytest.mark.parametrize("size", [(2000, 40), (40, 2000), (1999, 41), (999, 7), (7, 1000)])
def test_the_centre_is_unchanged(size):
    image = stripes(*size)
    found = EvalTransform(SIDE)(image).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - unbounded(image)).max() <= 3  # of 256; the places of pixels differ by rounding


@pytest.mark.parametrize("size", [(48, 40), (40 * MAX_ASPECT, 40), (5, 5 * MAX_ASPECT), (1, 1)])
def test_other_shapes_are_left_alone(size):
    image = stripes(*size)
    assert bounded_shape(image) is image
    assert np.array_equal(EvalTransform(SIDE)(image).permute(1, 2, 0).numpy(), unbounded(image))


@pytest.mark.parametrize("size", [(8_000_000, 1), (1, 2_000_000), (400_000, 4)])
def test_the_longest_pictures_are_used(size):
    """Whole, resized to 224 pixels on the short side, the first one would take 1.6 terabytes."""
    buffer = io.BytesIO()
    Image.new("1", size, 1).save(buffer, "PNG")
    image = decode_image(buffer.getvalue())
    assert (EvalTransform(224)(image) == 255).all()
    assert (TrainTransform()(buffer.getvalue(), np.random.default_rng(0), 224) == 255).all()
    transform = ImageTransform(CLIPImageProcessorPil())
    assert transform(image).shape == transform(np.asarray(image)).shape == (3, 224, 224)


@pytest.mark.parametrize("processor", processors(), ids=lambda p: f"{type(p).__name__} {p.do_center_crop}")
@pytest.mark.parametrize("size", [(2000, 40), (40, 2000)])
def test_the_image_transform_equals_each_processor(processor, size):
    """To a few grey levels where it cuts the centre out, and to the bit where it squeezes the whole picture."""
    image = stripes(*size)
    alone = processor(images=image, return_tensors="pt")["pixel_values"][0]
    found = ImageTransform(processor)(image)
    assert found.shape == (3, SIDE, SIDE)
    squeezes = "shortest_edge" not in dict(processor.size)
    assert (found - alone).abs().max() <= (0 if squeezes else 0.06)


@pytest.mark.parametrize("processor", processors(), ids=lambda p: f"{type(p).__name__} {p.do_center_crop}")
@pytest.mark.parametrize("height", [1, 2, 3, 4])
def test_a_low_picture_is_not_taken_for_one_with_its_channels_first(processor, height):
    red = Image.new("RGB", (8, height), "red")
    expected = ImageTransform(processor)(Image.new("RGB", (8, 8), "red"))
    for image in (red, np.asarray(red)):
        assert (ImageTransform(processor)(image) - expected).abs().max() < 1e-5
