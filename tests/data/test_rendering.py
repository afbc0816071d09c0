"""Whatever mode a picture has, what is decoded is what a viewer shows."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from flip_hf.data.decode import RefusedSample, decode_crop, decode_image, open_image, open_picture
from flip_hf.data.rendering import WHITE, as_shown, background_of, read_colour
from flip_hf.data.transforms import TrainTransform

LEVELS = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (40, 1))
GREY = np.repeat(LEVELS[..., None], 3, axis=2)
RED = (255, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes], side: int = 2) -> bytes:
    """A PNG of depths and chunks that Pillow does not write."""
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def tiff(values: np.ndarray, photometric: int = 1, bits: int | None = None, kind: int = 1) -> bytes:
    """A TIFF of one channel, of numbers and tags that Pillow does not write; `kind` is its SampleFormat."""
    height, width = values.shape
    data = values.tobytes()
    bits = bits or 8 * values.itemsize
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in {**tags, 339: kind}.items()]
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", 10) + b"".join(entries) + bytes(4)


def pixels(value, **options) -> np.ndarray:
    return np.asarray(decode_image(value, **options))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------

SIXTEEN = LEVELS.astype(np.uint16) * 257
FRACTIONS = (LEVELS / 255).astype(np.float32)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(SIXTEEN)),
        encoded(Image.fromarray(SIXTEEN), "TIFF"),
        b"P5 48 40 65535\n" + SIXTEEN.astype(">u2").tobytes(),
        tiff(65535 - SIXTEEN, photometric=0),
        tiff(SIXTEEN.astype(np.int32), kind=2),
        tiff(SIXTEEN.astype(np.uint32)),
        tiff(LEVELS.astype(np.uint32) * 0x01010101),  # most are negative where they are read as signed
        tiff(LEVELS.astype(np.int32), kind=2),
        *(tiff(FRACTIONS * np.float32(white), kind=3) for white in (1, 255, 65535, 3e9)),
        tiff(1 - FRACTIONS, photometric=0, kind=3),
    ],
    ids=[
        "png",
        "tiff",
        "pgm",
        "inverted",
        "i32",
        "u32",
        "u32 whole",
        "i32 of 8",
        "f 1",
        "f 255",
        "f 65535",
        "f",
        "f inv",
    ],
)
def test_numbers_are_scaled_by_their_range(data):
    """And a training sample is the same as what evaluation sees."""
    found = pixels(data)
    assert np.abs(found.astype(int) - GREY).max() <= 1 and found.min() == 0 and found.max() == 255
    assert np.array_equal(np.asarray(decode_crop(open_image(data), (3, 5, 43, 35), 8)), found[5:35, 3:43])


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I", "F"])
def test_pictures_that_pillow_has_opened_are_scaled_alike(mode):
    image = Image.fromarray(SIXTEEN.astype(np.int32) if mode == "I" else SIXTEEN)
    if mode in ("I;16B", "I;16L"):
        image = Image.frombytes(mode, image.size, SIXTEEN.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    image = Image.fromarray(SIXTEEN.astype(np.float32)) if mode == "F" else image
    assert image.mode == mode and np.array_equal(np.asarray(open_picture(image)), GREY)


def test_every_number_of_sixteen_bits_has_the_nearest_grey_level():
    image = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
    expected = np.rint(np.arange(65536) / 257).reshape(256, 256)
    assert np.array_equal(np.asarray(as_shown(image))[..., 0], expected)
    dark = Image.fromarray(np.full((4, 4), 4095, np.uint16))  # the range is the file's, not the darkest picture's
    assert np.asarray(as_shown(dark)).max() == 16


def test_twelve_bits_of_a_tiff_are_its_range():
    pairs = np.zeros((2, 3), np.uint8)
    pairs[:] = (0xFF, 0xF0, 0x00)  # 4095 and 0
    data = bytearray(tiff(pairs, bits=12))
    data[-4 - 120 + 8 : -4 - 120 + 12] = struct.pack("<I", 2)  # two pixels a row
    assert pixels(bytes(data))[..., 0].tolist() == [[255, 0], [255, 0]]


def test_nan_pixels_are_black_and_values_beyond_the_range_are_clipped():
    values = np.array([[0, 0.5, 1], [np.nan, np.inf, -np.inf], [-0.5, 1.25, 1.0]], np.float32)
    shown = np.asarray(as_shown(Image.fromarray(values)))[..., 0]
    assert shown.tolist() == [[0, 128, 255], [0, 255, 0], [0, 255, 255]]
    for nothing in (np.nan, -1.0, 0.0):
        assert np.asarray(as_shown(Image.fromarray(np.full((2, 2), nothing, np.float32)))).max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Alpha
# ---------------------------------------------------------------------------------------------------------------------


def logo(hidden: int = 0) -> tuple[Image.Image, np.ndarray]:
    """A black bar, half of it translucent, on transparent ground of a colour that nobody sees; and as seen on white."""
    alpha = np.zeros((40, 48), np.uint8)
    alpha[10:20, 10:38] = 255
    alpha[20:30, 10:38] = 128
    colours = np.where(alpha[..., None] > 0, 0, hidden).repeat(3, 2).astype(np.uint8)
    expected = np.full((40, 48, 3), 255, np.uint8)
    expected[10:20, 10:38] = 0
    expected[20:30, 10:38] = 127
    return Image.fromarray(np.dstack([colours, alpha])), expected


@pytest.mark.parametrize("hidden", [0, 99])
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("WEBP", "RGBA", {"lossless": True, "exact": True}),
        ("TIFF", "RGBA", {}),
        ("TGA", "RGBA", {}),
        ("ICO", "RGBA", {"sizes": [(48, 40)]}),
        ("PNG", "P", {}),
    ],
)
def test_transparent_parts_show_the_background(kind, mode, options, hidden):
    image, on_white = logo(hidden)
    data = encoded(image.quantize(8) if mode == "P" else image.convert(mode), kind, **options)
    assert np.abs(pixels(data).astype(int) - on_white).max() <= 1
    red = pixels(data, background=RED).astype(int)
    assert np.abs(red[..., 0] - on_white[..., 0]).max() <= 1 and red[..., 1:].max() == 0
    whole = TrainTransform((1.0, 1.0), flip=0, background=RED)(data, np.random.default_rng(0), 40)
    assert np.abs(whole.permute(1, 2, 0).numpy().astype(int) - red[:, 4:44]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_pictures_with_alpha_that_pillow_has_opened(mode):
    image, on_white = logo()
    image = image.convert("LA") if mode in ("LA", "La") else image
    image = image if mode in ("RGBA", "LA") else image.convert(mode)
    assert image.mode == mode and np.abs(np.asarray(open_picture(image)).astype(int) - on_white).max() <= 1


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(np.array([[0, 9], [9, 0]], np.uint8)), transparency=9),
        encoded(Image.fromarray(np.array([[[0] * 3, [9] * 3], [[9] * 3, [0] * 3]], np.uint8)), transparency=(9, 9, 9)),
        encoded(Image.fromarray(np.array([[0, 9], [9, 0]], np.uint8)).convert("P"), "GIF", transparency=9),
        png(1, 0, b"\0\x40\0\x80", (b"tRNS", b"\0\1")),
        png(2, 0, b"\0\x20\0\x80", (b"tRNS", b"\0\2")),
        png(4, 0, b"\0\x09\0\x90", (b"tRNS", b"\0\x09")),
        png(16, 0, b"\0" + b"\0\0\x09\0" + b"\0" + b"\x09\0\0\0", (b"tRNS", b"\x09\0")),
        png(16, 2, b"\0" + b"\0" * 6 + b"\x09\0" * 3 + b"\0" + b"\x09\0" * 3 + b"\0" * 6, (b"tRNS", b"\x09\0" * 3)),
    ],
    ids=["grey", "colour", "gif", "1 bit", "2 bits", "4 bits", "16 bits", "48 bits"],
)
def test_one_transparent_colour_shows_the_background(data):
    assert pixels(data)[..., 0].tolist() == [[0, 255], [255, 0]]
    assert pixels(data, background=RED)[..., 1].max() == 0
    image = decode_image(data)
    assert np.array_equal(np.asarray(open_picture(image)), np.asarray(image)), "what is decoded is seen as it is"


def test_an_unused_fourth_byte_is_no_alpha_channel():
    """Of 32-bit TGA and BMP files that leave it zero; of a PNG it means that nothing is to be seen."""
    image = Image.fromarray(np.dstack([GREY, np.zeros((40, 48), np.uint8)]))
    assert np.array_equal(pixels(encoded(image, "TGA")), GREY)
    assert (pixels(encoded(image)) == 255).all()


# ---------------------------------------------------------------------------------------------------------------------
# Colours
# ---------------------------------------------------------------------------------------------------------------------


def test_other_colour_spaces_are_converted():
    patches = np.array([[(200, 40, 40), (60, 200, 80), (70, 80, 190)], [WHITE, (0, 0, 0), (90, 120, 200)]], np.uint8)
    image = Image.fromarray(patches).resize((48, 32), Image.Resampling.NEAREST)
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    for data in (encoded(lab, "TIFF"), encoded(image.convert("CMYK"), "TIFF")):
        assert np.abs(pixels(data).astype(int) - np.asarray(image)).max() <= 6
    for mode in ("HSV", "YCbCr", "CMYK"):
        assert np.abs(np.asarray(open_picture(image.convert(mode))).astype(int) - np.asarray(image)).max() <= 6


def test_opaque_pictures_are_unchanged():
    """To the bit, so that data that were right train as before."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    for mode in ("RGB", "L", "P", "1", "CMYK", "RGBA", "LA"):
        for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP"):
            try:
                data = encoded(picture.convert(mode), kind)
            except (OSError, KeyError):
                continue  # a format that has not this mode
            expected = Image.open(io.BytesIO(data)).convert("RGB")
            assert np.array_equal(pixels(data), np.asarray(expected)), (mode, kind)


@pytest.mark.parametrize("colour", ["white", "#fff", "#ffffff", "rgb(255,255,255)"])
def test_a_background_is_read(colour):
    assert read_colour(colour) == WHITE


@pytest.mark.parametrize("colour", ["", "wite", "#ffffff80", "255"])
def test_a_background_that_is_no_opaque_colour_is_named(colour):
    with pytest.raises(ValueError, match=f"{colour!r} is not an opaque colour"):
        read_colour(colour)


def test_the_background_of_an_image_processor():
    class Processor:
        background: object = None

    processor = Processor()
    assert background_of(object()) == background_of(processor) == WHITE
    processor.background = [1, 2, 3]
    assert background_of(processor) == (1, 2, 3)
    for wrong in ("white", [1, 2], [0.5, 0.5, 0.5], [300, 0, 0]):
        processor.background = wrong
        with pytest.raises(ValueError, match="background is"):
            background_of(processor)


def test_a_picture_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(Image.fromarray(GREY))[:-60])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ValueError, match="cut.png cannot be used: damaged"):
        open_picture(image)
    with pytest.raises(RefusedSample, match="damaged image"):
        decode_image((tmp_path / "cut.png").read_bytes())
