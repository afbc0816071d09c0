"""Files that ask for gigabytes or hours are refused from their bytes; sound ones of every kind are not."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from flip_hf.data.bounds import BudgetedBytes
from flip_hf.data.decode import FORMATS, RefusedSample, decode_image
from tests.helpers import hostile_pictures


@pytest.mark.parametrize("name", hostile_pictures.HOSTILE)
def test_pictures_that_ask_for_too_much_are_refused(name):
    reason, make = hostile_pictures.HOSTILE[name]
    with pytest.raises(RefusedSample) as caught:
        decode_image(make())
    assert caught.value.reason == reason


def test_an_avif_with_overlapping_exif_is_refused():
    """It is read when the file is opened; here the entries are written in after encoding."""
    block = hostile_pictures.directory(60_000, 4_000_000)
    harmless = b"II*\0\x08\0\0\0\0\0" + block[10:]
    data = hostile_pictures.encoded("AVIF", exif=harmless)
    assert decode_image(data).size == (256, 256)
    with pytest.raises(RefusedSample, match="oversized metadata"):
        decode_image(data.replace(harmless, block))


@pytest.mark.parametrize("kind", FORMATS)
def test_sound_pictures_of_every_format_equal_pillows(kind):
    data = hostile_pictures.encoded(kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert decode_image(data).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"progressive": True, "icc_profile": bytes(300_000), "comment": b"x" * 60_000}),
        ("JPEG", {"restart_marker_blocks": 1, "subsampling": 0}),
        ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}),
        ("PNG", {"icc_profile": bytes(300_000), "exif": b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0" + bytes(200_000)}),
        ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"compression": "tiff_adobe_deflate", "tiffinfo": {278: 1}}),
        ("TIFF", {"big_tiff": True}),
        ("GIF", {"comment": b"x" * 60_000, "save_all": True, "append_images": [Image.new("L", (256, 256))] * 50}),
        ("WEBP", {"save_all": True, "append_images": [Image.new("RGB", (256, 256))] * 50}),
    ],
)
def test_metadata_frames_and_strips_of_usual_number_do_no_harm(kind, options):
    assert decode_image(hostile_pictures.encoded(kind, **options)).size == (256, 256)


def test_scans_in_a_thumbnail_are_not_counted():
    """Nor is what looks like one in a profile; only so many bytes before the picture are looked at more closely."""
    thumbnail = hostile_pictures.jpeg_of_scans(20, 8) + b"\xff\xda" * 600
    assert decode_image(hostile_pictures.jpeg(hostile_pictures.segment(0xE5, thumbnail))).size == (256, 256)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_as_pillow_turns_them(kind, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind, exif=exif.tobytes())
    found = decode_image(buffer.getvalue())
    assert found.tobytes() == ImageOps.exif_transpose(Image.open(buffer)).convert("RGB").tobytes()
    assert ImageOps.exif_transpose(found).size == found.size  # and not once more by whoever comes next


def test_an_eps_does_not_reach_ghostscript(tmp_path, monkeypatch):
    """A stand-in on the path would leave a file."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n[ $1 = --version ] && echo 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RefusedSample, match="not an image"):
        decode_image(hostile_pictures.EPS)
    assert not (tmp_path / "called").exists()


def test_decoding_ends_at_its_deadline():
    data = hostile_pictures.encoded("JPEG")
    late = BudgetedBytes(data, seconds=-1)
    with pytest.raises(RefusedSample, match="slow to decode"):
        Image.open(late)
    in_time = Image.open(BudgetedBytes(data, seconds=1e9))
    assert in_time.convert("RGB").tobytes() == decode_image(data).tobytes()
