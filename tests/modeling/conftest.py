"""Fixtures: what Transformers logs, a picture, folders of each kind of model."""

import logging

import numpy as np
import pytest
from PIL import Image

from flip_hf import (
    FlipForImageClassification,
    FlipForPreTraining,
    FlipImageProcessorPil,
    FlipPreTrainingConfig,
    FlipTextModelWithProjection,
    FlipVisionModel,
)
from tests.helpers.models import tiny_config


@pytest.fixture
def warnings_logged():
    """The messages of level WARNING and above that Transformers logs; its loggers do not reach pytest's."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def image(tmp_path) -> Image.Image:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    return image


@pytest.fixture
def folders(saved, processor, tmp_path):
    """A full model, its parts, a classifier, a model with a decoder, an official image processor, each as saved."""
    names = ("classifier", "tower", "pretraining", "texts", "official")
    classifier, tower, pretraining, texts, official = (tmp_path / name for name in names)
    decoder = {"hidden_size": 16, "num_hidden_layers": 1}
    FlipForPreTraining(FlipPreTrainingConfig(flip_config=tiny_config(), decoder_config=decoder)).save_pretrained(
        pretraining
    )
    FlipForImageClassification(tiny_config(num_labels=3)).save_pretrained(classifier)
    processor.save_pretrained(classifier)
    FlipVisionModel.from_pretrained(saved).save_pretrained(tower)
    processor.image_processor.save_pretrained(tower)
    FlipTextModelWithProjection.from_pretrained(saved).save_pretrained(texts)
    FlipImageProcessorPil().save_pretrained(official)
    paths = {"full": saved, "classifier": classifier, "tower": tower, "pretraining": pretraining}
    paths |= {"texts": texts, "official": official}
    return {name: str(path) for name, path in paths.items()}
