"""A model as MAE leaves it, and data that any tower can tell apart."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from flip_hf import FlipForPreTraining, FlipPreTrainingConfig
from tests.helpers.models import DECODER, randomize, tiny_config

UNUSED_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "grey": (0.5, 0.5, 0.5)}


@pytest.fixture
def pretraining(tmp_path):
    """A model and its folder, as pre-training by reconstruction alone leaves them."""
    flip = tiny_config(text=UNUSED_TEXT, vision={"image_size": 16, "patch_size": 4})
    config = FlipPreTrainingConfig(flip_config=flip, decoder_config=DECODER, objective="reconstruction")
    model = randomize(FlipForPreTraining(config)).eval()
    folder = tmp_path / "pretraining"
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model, folder


@pytest.fixture
def colours(tmp_path):
    """Options that name 160 plain images of four colours, 60 of them to test with: what every crop shows."""
    folder = tmp_path / "colours"
    rng = np.random.default_rng(0)
    for split, count in {"train": 100, "test": 60}.items():
        (folder / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            shade = rng.integers(0, 100, 3) + 130 * np.array(list(COLOURS.values())[number % 4])
            Image.new("RGB", (16, 16), tuple(shade.astype(int).tolist())).save(folder / split / f"{number}.png")
            rows.append(json.dumps({"file_name": f"{number}.png", "label": number % 4}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    return "--data", folder, "--class_names", tmp_path / "names.txt"
