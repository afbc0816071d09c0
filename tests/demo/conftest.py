"""A tiny model with texts and a decoder, and a folder of pictures of which not all are sound."""

import io

import pytest
from PIL import Image

from flip_hf import FlipForPreTraining, FlipPreTrainingConfig
from flip_hf.training.models import make_processor
from tests.helpers.models import DECODER, randomize, tiny_config

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (60, 80, 230), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """The folder of a FlipForPreTraining that was trained on both objectives."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    config = tiny_config()
    model = FlipForPreTraining(FlipPreTrainingConfig(flip_config=config, decoder_config=DECODER))
    randomize(model).save_pretrained(folder)
    make_processor(config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four sound pictures, one of them in a subfolder, a text and a photo that was cut short."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for name, colour in COLOURS.items():
        image = Image.new("RGB", (48, 40), colour)
        image.save(folder / ("sub" if name == "white" else ".") / f"{name}.PNG")
    (folder / "text.jpg").write_text("no image")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (folder / "cut.jpeg").write_bytes(buffer.getvalue()[:900])
    (folder / "notes.txt").write_text("not looked at")
    return folder
