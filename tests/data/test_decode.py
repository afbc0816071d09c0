import io
import struct

import numpy as np
import pytest
from PIL import Image

from flip_hf.data.decode import RefusedSample, choose_caption, decode_image
from flip_hf.data.files import StoredFile

RNG = np.random.default_rng(0)


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", **options})
    return buffer.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_bytes_dictionaries_and_files_are_decoded(picture, tmp_path):
    data = encoded(picture, format="PNG")
    (tmp_path / "a.png").write_bytes(data)
    for value in (data, {"bytes": data, "path": None}, StoredFile(str(tmp_path / "a.png"))):
        assert np.array_equal(np.array(decode_image(value)), np.array(picture))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_every_mode_becomes_rgb(picture, mode):
    image = picture.convert("L").convert("I").convert(mode) if mode == "I;16" else picture.convert("L").convert(mode)
    assert decode_image(encoded(image, format="PNG")).mode == "RGB"


def test_exif_turns_the_image_and_broken_exif_does_not_lose_it(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode_image(encoded(picture, exif=exif)).size == (40, 60)
    broken = b"Exif\x00\x00II*\x00" + struct.pack("<I", 999_999) + b"\xff" * 20
    assert decode_image(encoded(picture, exif=broken)).size == (60, 40)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing image"),
        (b"", "empty image"),
        ({"bytes": None, "path": None}, "missing image"),
        ({"bytes": None, "path": "/nowhere/at/all.jpg"}, "image is a path, not bytes"),
        (StoredFile("/nowhere/at/all.jpg"), "unreadable image file"),
        (17, "image column holds no image"),
        (b"this is no image", "not an image"),
    ],
)
def test_files_that_are_no_image_are_refused_by_reason(value, reason):
    with pytest.raises(RefusedSample) as caught:
        decode_image(value)
    assert caught.value.reason == reason


def test_truncated_and_oversized_images_are_refused(picture):
    data = encoded(picture)
    with pytest.raises(RefusedSample, match="damaged image"):
        decode_image(data[: len(data) // 2])
    with pytest.raises(RefusedSample, match="oversized image"):
        decode_image(data, max_pixels=60 * 40 - 1)
    # A header that claims 60,000 x 60,000 pixels: refused before memory is spent on it.
    huge = bytearray(encoded(picture, format="PNG"))
    huge[16:24] = struct.pack(">II", 60_000, 60_000)
    with pytest.raises(RefusedSample, match="oversized image|not an image"):
        decode_image(bytes(huge))


def test_captions_are_checked():
    assert choose_caption("a cat", RNG) == "a cat"
    assert choose_caption(b"a cat", RNG) == "a cat"
    assert {choose_caption(["a", "b"], RNG) for _ in range(50)} == {"a", "b"}
    for value, reason in ((None, "missing"), ("  ", "empty"), (3.5, "not text"), ([], "not text"), ([None], "missing")):
        with pytest.raises(RefusedSample, match=reason):
            choose_caption(value, RNG)


@pytest.mark.parametrize("unusable", ["", "  ", None, 3.5, float("nan"), b"\xff", "\ud800", ["a"]])
def test_one_of_the_usable_captions_is_drawn(unusable):
    """Each as likely as the others, and the same from the same state."""
    values = ["a", unusable, "b", unusable, b"c"]
    rng = np.random.default_rng(0)
    drawn = [choose_caption(values, rng) for _ in range(3000)]
    assert all(900 < drawn.count(caption) < 1100 for caption in "abc") and set(drawn) == set("abc")
    again = np.random.default_rng(0)
    assert [choose_caption(values, again) for _ in range(50)] == drawn[:50]
    with pytest.raises(RefusedSample):
        choose_caption([unusable, unusable], rng)


def test_a_list_of_usable_captions_takes_one_number_of_the_generator():
    """So that data without such gaps train as they did."""
    ours = np.random.default_rng(0)
    plain = np.random.default_rng(0)
    captions = ["a", "b", "c", "d", "e"]
    drawn = [choose_caption(captions, ours) for _ in range(50)]
    assert drawn == [captions[int(plain.integers(5))] for _ in range(50)]
    assert ours.random() == plain.random()
