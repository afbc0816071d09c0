"""JPEGs without their end: what every viewer shows is used, and what is a part of a picture is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from flip_hf.data import jpeg_end
from flip_hf.data.decode import RefusedSample, decode_crop, decode_image, open_image
from tests.helpers.hostile_pictures import jpeg_of_scans
from tests.helpers.photographs import photograph

FORMS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 1},
    "restarts a row": {"restart_marker_rows": 1},
    "4:4:4": {"subsampling": 0},
    "optimized": {"optimize": True},
}


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return photograph(400, 300)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("form", FORMS)
def test_without_its_end_marker_a_picture_is_whole(picture, form, mode):
    data = encoded(picture.convert(mode), **FORMS[form])
    expected = np.asarray(decode_image(data))
    for cut in (data[:-2], data[:-1], data[:-2] + bytes(500)):
        assert np.array_equal(np.asarray(decode_image(cut)), expected)
    small = decode_crop(open_image(data[:-2]), (0, 0, 400, 300), 100)
    assert small.shape == (150, 200, 3)
    assert np.array_equal(small, decode_crop(open_image(data), (0, 0, 400, 300), 100))


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_that_lacks_a_part_is_refused(picture, form):
    """Whatever part it is: the decoder itself would fill it with grey, and say nothing."""
    data = encoded(picture, **FORMS[form])
    for share in (0.3, 0.5, 0.6, 0.8, 0.9, 0.95):
        cut = data[: int(share * len(data))]
        for part in (cut, cut + bytes(5000)):
            with pytest.raises(RefusedSample, match="damaged image"):
                decode_image(part)


def test_a_few_blocks_may_be_missing(picture):
    data = encoded(picture)
    whole, cut = (np.asarray(decode_image(value)).astype(int) for value in (data, data[:-6]))
    changed = (whole != cut).any(axis=2)
    assert 0 < changed.mean() <= jpeg_end.MAX_MISSING and not changed[:280].any()


def test_slow_searches_are_skipped(monkeypatch):
    """Scans of 600 megapixels together are decoded once; without an end, not three times."""
    monkeypatch.setattr(jpeg_end, "_pixels", None)
    data = jpeg_of_scans(6, 10_000)[:-2]
    with pytest.raises(RefusedSample, match="oversized image|damaged image"):
        open_image(data[:-2])
    data = jpeg_of_scans(12, 7000)[:-2]
    with pytest.raises(RefusedSample, match="damaged image"):
        decode_image(data)


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_first_picture_of_a_phone_is_decoded_at_its_scale(picture, orientation):
    """MPO: a JPEG with others behind it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    alone = encoded(picture, exif=exif)
    buffer = io.BytesIO()
    others = [picture.rotate(180), picture.resize((80, 60))]
    picture.save(buffer, "MPO", quality=85, exif=exif, save_all=True, append_images=others)
    data = buffer.getvalue()
    assert open_image(data).format == "MPO"
    box = (0, 0, 400, 300) if orientation == 1 else (0, 0, 300, 400)
    crop = decode_crop(open_image(data), box, 70)
    assert min(crop.shape[:2]) == 75
    assert np.array_equal(crop, decode_crop(open_image(alone), box, 70))
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(decode_image(alone)))
