"""Plain JPEGs decoded by simplejpeg: the samples are those that Pillow gives, to the bit, whatever is in the file."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from flip_hf.data import plain_jpeg
from flip_hf.data.decode import MAX_IMAGE_PIXELS, RefusedSample, decode_crop, open_image, open_to_crop, upright_size
from flip_hf.data.plain_jpeg import PlainJpeg, is_usable, read_plain
from flip_hf.data.transforms import TrainTransform, random_crop_box
from tests.helpers.photographs import photograph
from tests.helpers.spoiling import spoil

pytest.importorskip("simplejpeg")

SIZES = ((320, 240), (241, 323), (75, 61), (16, 9))
FORMS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "restarts": {"restart_marker_blocks": 3},
    "optimized": {"optimize": True},
    "profile": {"icc_profile": bytes(500)},
    "comment": {"comment": b"a cat"},
}
OTHERS = {
    "progressive": {"progressive": True},
    "exif": {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"},
    "large header": {"icc_profile": bytes(20_000)},
}


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def crop_of(open_it, data: bytes, seed: int, side: int) -> np.ndarray | str:
    """A crop of the picture that is drawn by `seed`, or the reason why there is none."""
    try:
        image = open_it(data)
        box = random_crop_box(*upright_size(image), (0.2, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
        return decode_crop(image, box, side)
    except RefusedSample as refused:
        return refused.reason


@pytest.mark.parametrize("form", FORMS)
def test_crops_are_pillows_at_every_scale(form):
    for size in SIZES:
        data = encoded(photograph(*size), **FORMS[form])
        assert isinstance(open_to_crop(data), PlainJpeg)
        for seed in range(12):
            side = (8, 20, 60, 224)[seed % 4]
            ours, pillows = (crop_of(opened, data, seed, side) for opened in (open_to_crop, open_image))
            assert np.array_equal(ours, pillows)


def test_rows_below_a_crop_are_not_decoded():
    image = open_to_crop(encoded(photograph(320, 240)))
    assert [len(image.pixels(bottom)) for bottom in (240, 200, 100, 1)] == [240, 208, 112, 16]
    assert [len(image.pixels(bottom, 4)) for bottom in (60, 25, 1)] == [60, 28, 4]


def test_spoilt_files_give_the_samples_and_refusals_that_pillow_gives():
    """Some damage is in the header, some in the picture; the end marker is put back, or else Pillow has them all."""
    rng = np.random.default_rng(0)
    sound = [encoded(photograph(90, 70), **options) for options in FORMS.values()]
    kinds = {"plain": 0, "refused": 0}
    for number in range(400):
        data = bytearray(spoil(sound[number % len(sound)], rng, sound)) if number % 2 else bytearray(sound[0])
        for place in rng.integers(2, 700 if number % 3 else len(data), size=3):
            data[place : place + 1] = rng.bytes(1) if rng.random() < 0.7 else b""
        data = bytes(data.removesuffix(b"\xff\xd9") + b"\xff\xd9")
        ours, pillows = (crop_of(opened, data, number, 30) for opened in (open_to_crop, open_image))
        assert ours == pillows if isinstance(ours, str) else np.array_equal(ours, pillows)
        if read_plain(data, MAX_IMAGE_PIXELS):
            kinds["refused" if isinstance(ours, str) else "plain"] += 1
    assert kinds["plain"] > 60 and kinds["refused"] > 5


def test_a_bad_table_after_a_warning_is_not_taken_for_a_picture():
    """libjpeg-turbo reports the error as a warning if there was one before, and leaves the pixels as they were."""
    data = encoded(photograph(90, 70))
    code = data.index(b"\xff\xc4") + 32  # the last of the first table
    first = data.index(b"\xff\xda") + 11  # the first coefficient of the scan
    spoilt = data[:code] + b"\x1f" + data[code + 1 : first] + b"\x05" + data[first + 1 :]
    assert crop_of(open_to_crop, spoilt, 0, 30) == crop_of(open_image, spoilt, 0, 30) == "damaged image"


@pytest.mark.parametrize("form", OTHERS)
def test_other_jpegs_are_pillows(form):
    assert isinstance(open_to_crop(encoded(photograph(90, 70), **OTHERS[form])), Image.Image)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_are_pillows(mode):
    assert isinstance(open_to_crop(encoded(photograph(90, 70).convert(mode))), Image.Image)


def test_files_that_end_elsewhere_and_large_pictures_are_pillows():
    data = encoded(photograph(90, 70))
    for other in (
        data[:-2],
        data + bytes(3),
        data + data,
        data[:400],
        b"",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xff\xd9",
    ):
        assert read_plain(other, 90 * 70) is None
    assert read_plain(data, 90 * 70) and read_plain(data, 90 * 70 - 1) is None
    with pytest.raises(RefusedSample, match="oversized image"):
        open_to_crop(data, 90 * 70 - 1)


def test_samples_are_the_same_without_simplejpeg(monkeypatch):
    data = encoded(photograph(320, 240))
    samples = []
    for module in (plain_jpeg.simplejpeg, None):
        monkeypatch.setattr(plain_jpeg, "simplejpeg", module)
        is_usable.cache_clear()
        assert isinstance(open_to_crop(data), Image.Image) == (module is None)
        samples.append([TrainTransform()(data, np.random.default_rng(seed), 64) for seed in range(4)])
    is_usable.cache_clear()
    assert all(torch.equal(*pair) for pair in zip(*samples, strict=True))


def test_a_decoder_that_rounds_differently_is_not_used(monkeypatch):
    other = partial(plain_jpeg.simplejpeg.decode_jpeg, fastupsample=True)
    monkeypatch.setattr(plain_jpeg.simplejpeg, "decode_jpeg", other)
    is_usable.cache_clear()
    assert not is_usable() and isinstance(open_to_crop(encoded(photograph(90, 70))), Image.Image)
    is_usable.cache_clear()
