"""One function opens pictures: training, evaluation, scripts and page put transparency on the configured background."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flip_hf import FlipProcessor, ZeroShotClassifier
from flip_hf.console.fields import OptionError
from flip_hf.data.decode import open_picture
from flip_hf.data.files import StoredFile
from flip_hf.data.sources import open_source
from flip_hf.demo.model import DemoModel
from flip_hf.demo.search import ImageSearch, Picture
from flip_hf.evaluation.encoder import Encoder, ImageTransform
from flip_hf.evaluation.loading import eval_loader
from flip_hf.evaluation.options import EvaluationOptions
from tests.helpers.arguments import parse
from tests.helpers.trainers import trainer_of

GREEN = (0, 255, 0)
LABELS = ["red circle", "x", "green"]


def phone_picture() -> tuple[Image.Image, Image.Image]:
    """A lying picture with transparent parts and a tag that turns it; and as it is seen on green."""
    rng = np.random.default_rng(0)
    layer = Image.fromarray(rng.integers(0, 256, (40, 64, 4), dtype=np.uint8))
    layer.putalpha(layer.getchannel("A").point(lambda level: 255 * (level > 128)))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    layer.save(buffer, "PNG", exif=exif)
    seen = Image.new("RGB", layer.size, GREEN)
    seen.paste(layer, mask=layer)
    return Image.open(buffer), seen.transpose(Image.Transpose.ROTATE_270)


@pytest.fixture
def on_green(saved, tmp_path):
    """A model that has seen transparent pictures on green, and the phone's picture in a file beside it."""
    processor = FlipProcessor.from_pretrained(saved)
    processor.image_processor.background = list(GREEN)
    processor.save_pretrained(saved)
    opened, seen = phone_picture()
    folder = tmp_path / "pictures" / "test"
    folder.mkdir(parents=True)
    (folder / "phone.png").write_bytes(opened.fp.getvalue())  # pyright: ignore
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "phone.png", "label": 0}))
    return saved, folder / "phone.png", seen


def test_a_picture_is_opened_alike_everywhere(on_green):
    model, path, seen = on_green
    expected = ImageTransform(Encoder.from_pretrained(model).image_processor)(seen)
    classify = ZeroShotClassifier.from_pretrained(model)
    right = classify(seen, LABELS)
    for image in (path, str(path), Image.open(path), phone_picture()[0], open_picture(str(path), GREEN)):
        assert classify(image, LABELS) == right
    plain = classify(Image.open(path).convert("RGB"), LABELS)
    assert plain != right, "else this shows nothing"

    encoder = Encoder.from_pretrained(model)
    assert encoder.transform.background == GREEN
    source = open_source(str(path.parents[1]), split="test", kind="label")
    options = EvaluationOptions(data=str(path.parents[1]), test_split="test")
    described = replace(options.data_sets()[0], class_names=("a", "b"))
    loader = eval_loader(described, source, encoder.transform, Accelerator(cpu=True), batch_size=4, num_workers=0)
    (batch,) = list(loader)
    assert torch.equal(encoder.transform.normalize(batch["images"])[0], expected)

    search = ImageSearch(DemoModel.from_pretrained(model), [Picture(StoredFile(str(path)), "phone")])
    assert torch.allclose(search.encode()[0], encoder.images(expected[None])[0], atol=1e-6)
    shown = search.search("green", 1)[0][0]
    assert np.asarray(shown.convert("RGB"))[0, 0].tolist() == np.asarray(seen)[0, 0].tolist()


@pytest.mark.parametrize("encoded", [True, False])
def test_fine_tuning_sees_it_too(encoded):
    pytest.importorskip("torchvision")
    from flip_hf.evaluation.finetuning.images import eval_transform, make_test_loader
    from flip_hf.evaluation.finetuning.recipe import FineTuneOptions

    opened, seen = phone_picture()
    image = opened.fp.getvalue() if encoded else opened  # pyright: ignore
    options = FineTuneOptions(batch_size=1, num_workers=0, background=GREEN)
    transform = eval_transform(16, options, [0.5] * 3, [0.5] * 3)
    (batch,) = list(make_test_loader([(image, 0)], transform, 2, options, Accelerator(cpu=True)))
    assert torch.equal(batch[0][0], transform(seen))


def test_a_run_trains_on_its_background_and_saves_it(tmp_path):
    """Of these pictures nothing is to be seen but the background."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(64):
        Image.new("RGBA", (40, 40), (255, 255, 255, 0)).save(data / f"{number}.png")
    trainer = trainer_of(tmp_path / "run", data, "reconstruction", "--background", "#00ff00")
    batch = next(iter(trainer.loader))
    pixels = batch["patches"].unflatten(-1, (3, 8, 8))  # (B, K, C, P, P)
    assert (pixels[:, :, 1] == 255).all() and not pixels[:, :, ::2].any()
    trainer.processor.save_pretrained(tmp_path / "saved")
    saved = AutoImageProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    assert ImageTransform(saved).background == GREEN


def test_a_background_that_is_no_colour_ends_the_run_in_a_sentence():
    with pytest.raises(OptionError, match="--background: 'greenish' is not an opaque colour"):
        parse("--train_data", "x", "--background", "greenish")
