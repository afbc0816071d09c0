"""The image processors against the official evaluation, run in TensorFlow 2.18.1, and against each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from flip_hf import FlipImageProcessor, FlipImageProcessorPil
from flip_hf.modeling.image_processing_flip import legacy_bicubic, legacy_bicubic_tensor, square_crop

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official_eval_preprocess.npz"


@pytest.fixture(scope="module")
def official():
    return dict(np.load(FIXTURE))


@pytest.mark.parametrize("case", [6, 7])
def test_resized_and_normalised_pixels_are_the_official_ones(official, case):
    crop, resized, final = (official[f"{case}/{name}"] for name in ("decoded_crop_u8", "resized", "final"))
    side = resized.shape[0]
    ours = legacy_bicubic(crop.transpose(2, 0, 1), side, side)
    assert np.abs(ours - resized.transpose(2, 0, 1)).max() < 1e-3  # grey levels
    processor = FlipImageProcessorPil(size={"height": side, "width": side})
    pixel_values = processor(Image.fromarray(crop), return_tensors="np")["pixel_values"][0]
    assert pixel_values.dtype == np.float32
    assert np.abs(pixel_values - final.transpose(2, 0, 1)).max() < 1e-5


@pytest.mark.parametrize(
    ("height", "width", "window"),
    # Crop windows of the official code: (top, left, height, width).
    [
        (300, 451, (0, 76, 300, 300)),
        (513, 334, (90, 0, 334, 334)),
        (97, 64, (17, 0, 64, 64)),
        (501, 500, (1, 0, 500, 500)),
    ],
)
def test_the_crop_is_the_whole_short_side_and_rounds_up(height, width, window):
    rows, columns = np.mgrid[:height, :width]
    crop = square_crop(np.stack([rows, columns]))
    assert (crop[0, 0, 0], crop[1, 0, 0], *crop.shape[1:]) == window


def test_values_are_not_clipped():
    stripes = np.zeros((3, 40, 40), dtype=np.uint8)
    stripes[:, :, 20:] = 255
    resized = legacy_bicubic(stripes, 56, 56)
    assert resized.min() < -1 and resized.max() > 256


def pictures() -> list[Image.Image]:
    """Colour, grey and transparent, small and large, two of one size."""
    rng = np.random.default_rng(0)
    shapes = [(50, 70, 3), (20, 10), (40, 41, 4), (50, 70, 3), (1, 5, 3)]
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def test_images_of_all_kinds_in_one_batch_and_again_after_saving(tmp_path):
    processor = FlipImageProcessorPil(size={"height": 32, "width": 32})
    pixel_values = processor(pictures(), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (5, 3, 32, 32)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(loaded) is FlipImageProcessorPil
    assert torch.equal(loaded(pictures(), return_tensors="pt")["pixel_values"], pixel_values)


@pytest.mark.parametrize("size", [(50, 70), (97, 64), (1, 5)])
def test_tensors_are_resized_as_arrays_are(size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    resized = legacy_bicubic_tensor(images, 48, 56)
    assert resized.shape == (2, 3, 48, 56) and resized.dtype == torch.float32
    for image, ours in zip(images, resized, strict=True):
        assert np.abs(ours.numpy() - legacy_bicubic(image.numpy(), 48, 56)).max() < 1e-4  # grey levels


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_tasks_that_need_torchvision_name_it(tmp_path):
    with pytest.raises(ImportError, match="FlipImageProcessor requires the Torchvision library"):
        FlipImageProcessor()
    FlipImageProcessorPil().save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is FlipImageProcessorPil


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
@pytest.mark.parametrize("off", [None, "do_center_crop", "do_resize", "do_rescale", "do_normalize"])
def test_torchvisions_image_processor_gives_pillows_pixels(off, tmp_path):
    FlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    processors = [AutoImageProcessor.from_pretrained(tmp_path, backend=name) for name in ("pil", "torchvision")]
    assert [type(processor) for processor in processors] == [FlipImageProcessorPil, FlipImageProcessor]
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is FlipImageProcessor
    images = pictures() if off != "do_resize" else pictures()[:1]
    options = {"return_tensors": "pt", **({off: False} if off else {})}
    pil, torchvision = (processor(images, **options)["pixel_values"] for processor in processors)
    assert pil.shape == torchvision.shape and pil.dtype == torchvision.dtype == torch.float32
    # Of values up to 280 where they are not rescaled, and to 1,300 where they are only divided by the deviations.
    assert (pil - torchvision).abs().max() < (1e-3 if off == "do_rescale" else 1e-5)


def test_a_published_image_processor_names_the_class_of_each_backend(tmp_path):
    FlipImageProcessorPil().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"]
    names = {"pil": "FlipImageProcessorPil", "torchvision": "FlipImageProcessor"}
    expected = {backend: f"image_processing_flip.{name}" for backend, name in names.items()}
    assert auto_map == {"AutoImageProcessor": expected}
    for name in names.values():
        assert name in (tmp_path / "image_processing_flip.py").read_text()
