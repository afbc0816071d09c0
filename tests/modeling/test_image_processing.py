"""FlipImageProcessor against the official evaluation, run in TensorFlow 2.18.1."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from flip_hf import FlipImageProcessor
from flip_hf.modeling.image_processing_flip import legacy_bicubic, square_crop

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
    processor = FlipImageProcessor(size={"height": side, "width": side})
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


def test_images_of_all_kinds_in_one_batch_and_again_after_saving(tmp_path):
    processor = FlipImageProcessor(size={"height": 32, "width": 32})
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 256, (20, 10), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 256, (40, 41, 4), dtype=np.uint8)),
    ]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (3, 3, 32, 32)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is FlipImageProcessor
    assert torch.equal(loaded(images, return_tensors="pt")["pixel_values"], pixel_values)
