"""JPEGs decoded at a fraction of their size: never smaller than the crop needs, and close to the plain path."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from flip_hf.data.decode import RefusedSample, decode_crop, open_to_crop, upright_size
from flip_hf.data.transforms import TrainTransform, random_crop_box, resize
from tests.helpers.photographs import photograph


def jpeg(image: Image.Image, orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, exif=exif, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return photograph(640, 480)


def plain(data: bytes, box: tuple, side: int) -> np.ndarray:
    """The crop of the whole image, resized by Pillow."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB").crop(box)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).astype(int)


def ours(data: bytes, box: tuple, side: int) -> np.ndarray:
    pixels = torch.from_numpy(decode_crop(open_to_crop(data), box, side))
    return resize(pixels, side).numpy().astype(int)


@pytest.mark.parametrize(
    ("box", "side", "size"),
    [
        ((0, 0, 640, 480), 224, (320, 240)),
        ((10, 20, 458, 468), 224, (224, 224)),  # 448 pixels: just enough at a half
        ((10, 20, 456, 468), 224, (446, 448)),
        ((100, 100, 612, 480), 112, (256, 190)),
        ((32, 0, 480, 448), 112, (112, 112)),
        ((0, 0, 640, 480), 32, (80, 60)),
        ((0, 0, 100, 100), 224, (100, 100)),
    ],
)
def test_the_scale_is_the_smallest_that_the_crop_allows(picture, box, side, size):
    assert decode_crop(open_to_crop(jpeg(picture)), box, side).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("crop", [(3, 5, 303, 405), (16, 32, 464, 480)], ids=["whole", "half"])
def test_every_orientation_gives_the_crop_of_the_upright_image(picture, orientation, crop):
    """At full size to the pixel; at a half, close: the other orientations are far from it."""
    data = jpeg(picture, orientation)
    assert upright_size(open_to_crop(data)) == ((480, 640) if orientation > 4 else (640, 480))
    image = decode_crop(open_to_crop(data), crop, 224)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).crop(crop)
    if crop[0] == 3:
        assert np.array_equal(image, np.asarray(expected))
    else:
        assert image.shape == (224, 224, 3)
        difference = image.astype(int) - np.asarray(expected.reduce(2))
        assert np.abs(difference).mean() < 2


def test_at_full_size_only_the_rounding_differs_from_pillow(picture):
    data = jpeg(picture)
    for box in ((5, 7, 405, 400), (0, 80, 300, 480), (101, 53, 201, 103)):
        difference = np.abs(ours(data, box, 224) - plain(data, box, 224))
        assert difference.max() <= 1 and difference.mean() < 0.25


@pytest.mark.parametrize(("side", "mean"), [(224, 1.5), (112, 1.5), (56, 2.0)])
def test_scaled_decoding_is_close_to_the_plain_path(picture, side, mean):
    """In grey levels of 256, over random crops of the official recipe; the boxes are moved to whole pixels in both."""
    rng = np.random.default_rng(0)
    data = jpeg(picture)
    differences = []
    for _ in range(12):
        box = random_crop_box(640, 480, (0.8, 1.0), (3 / 4, 4 / 3), rng)
        box = tuple(8 * round(edge / 8) for edge in box)
        differences.append(np.abs(ours(data, box, side) - plain(data, box, side)))
    difference = np.stack(differences)
    assert 0 < difference.mean() < mean and difference.max() <= 16


def test_truncated_pictures_are_refused_at_every_scale(picture):
    data = jpeg(picture)
    for side in (300, 224, 112, 56):
        for share in (0.3, 0.6, 0.95):
            with pytest.raises(RefusedSample, match="damaged image"):
                TrainTransform((1.0, 1.0))(data[: int(share * len(data))], np.random.default_rng(0), side)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_are_scaled_too(picture, mode):
    image = decode_crop(open_to_crop(jpeg(picture.convert(mode))), (0, 0, 640, 480), 224)
    assert image.shape == (240, 320, 3)


def test_other_formats_are_decoded_whole(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    crop = decode_crop(open_to_crop(buffer.getvalue()), (3, 5, 603, 405), 32)
    assert np.array_equal(crop, np.asarray(picture)[5:405, 3:603])


def test_a_mirrored_sample_is_the_mirrored_crop(picture):
    kept, mirrored = (
        TrainTransform((0.5, 1.0), flip=flip)(jpeg(picture), np.random.default_rng(3), 64) for flip in (0.0, 1.0)
    )
    assert torch.equal(kept, mirrored.flip(2)) and not torch.equal(kept, mirrored)


@pytest.mark.parametrize("side", [32, 64, 100])
def test_pixels_of_the_right_size_are_what_the_filter_makes_of_them(side):
    """So they need not be filtered."""
    noise = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    extremes = 255 * (noise > 127).to(torch.uint8)
    for pixels in (noise, extremes):
        filtered = torch.nn.functional.interpolate(pixels[None], (side, side), mode="bicubic", antialias=True)[0]
        assert torch.equal(resize(pixels.permute(1, 2, 0), side).permute(2, 0, 1), filtered)
