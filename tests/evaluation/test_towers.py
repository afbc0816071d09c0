"""Vision towers alone, as MAE leaves them: how they are read, and what they can be asked for."""

import pytest
import torch
from threadpoolctl import threadpool_limits
from transformers import SiglipConfig, SiglipModel, ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

from flip_hf import FlipModel
from flip_hf.conversion.mae import convert_from_mae
from flip_hf.evaluation.clip_benchmark import load_flip
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.finetuning.model import make_classifier
from tests.helpers.evaluating import evaluated
from tests.helpers.models import DECODER, randomize, tiny_clip

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [False, True])
def test_a_converted_vitmae_has_the_class_token_that_maes_probe_sees(images, tmp_path, decoder):
    sizes = {f"decoder_{name}": value for name, value in DECODER.items()}
    mae = randomize(ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **sizes, image_size=32, patch_size=8))).eval()
    mae.save_pretrained(tmp_path / "mae")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "mae")
    convert_from_mae(str(tmp_path / "mae"), decoder=decoder).save(tmp_path / "flip")
    encoder = Encoder.from_pretrained(tmp_path / "flip")
    assert not encoder.knows_texts and encoder.num_patches == 16
    mae.config.mask_ratio = 0.0
    with torch.no_grad():
        tokens = mae.vit(images).last_hidden_state  # (B, 1 + L, D), all patches in some order
    assert torch.allclose(encoder.class_token(images), tokens[:, 0], atol=1e-5)
    assert torch.allclose(encoder.trunk(images), tokens.mean(dim=1), atol=1e-5)
    with pytest.raises(ValueError, match="ViTMAEModel, .*`flip-hf convert vit-mae`"):
        Encoder.from_pretrained(tmp_path / "mae")


def test_class_tokens_of_other_models(model, processor, images):
    tower = model.vision_model
    assert torch.equal(Encoder(model, processor).class_token(images), tower(images).last_hidden_state[:, 0])
    clip = tiny_clip(99).eval()
    pixels = torch.randn(2, 3, 48, 48)
    expected = clip.vision_model.post_layernorm(clip.vision_model(pixels).last_hidden_state[:, 0])
    for same in (clip, FlipModel.from_clip(clip)):
        assert torch.allclose(Encoder(same, processor).class_token(pixels), expected, atol=1e-5)
    config = SiglipConfig(text_config=SIZES, vision_config={**SIZES, "image_size": 32, "patch_size": 8})
    with pytest.raises(ValueError, match="SiglipModel has no class token.*--probe flip"):
        Encoder(SiglipModel(config), processor).class_token(images)


def test_a_folder_that_lacks_weights_is_refused(pretraining, tmp_path):
    model, folder = pretraining
    weights = {name: tensor for name, tensor in model.state_dict().items() if "vision_model.encoder" not in name}
    model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(ValueError, match="has no weights for .* FlipForPreTraining"):
        Encoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="no complete vision tower: missing .*flip.vision_model.encoder"):
        make_classifier(folder, 10)


def test_fine_tuning_begins_with_the_tower_and_a_new_head(pretraining):
    model, folder = pretraining
    expected = model.flip.vision_model.state_dict()
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("decoder.")}
    for _ in range(2):  # whole, and without what it does not need
        classifier = make_classifier(folder, 10)
        found = classifier.vision_model.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert {name for name in classifier.state_dict() if not name.startswith("vision_model.")} == {
            "classifier.weight",
            "classifier.bias",
        }
        model.save_pretrained(folder, state_dict=weights)


# -- what it is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [("zero-shot",), ("masked",), ("linear-probe", "retrieval")])
def test_tasks_with_texts_end_before_the_data_are_opened(pretraining, tmp_path, tasks):
    data = ["--datasets", "flickr30k", "cifar10", "--data_dir", tmp_path / "nowhere"]
    with pytest.raises(SystemExit) as ended:
        evaluated(tmp_path, pretraining[1], "--tasks", *tasks, *data)
    assert str(ended.value).startswith(f"error: {tasks[-1]}: ") and str(pretraining[1]) in str(ended.value)
    assert "has no texts. Use --tasks linear-probe few-shot fine-tune." in str(ended.value)


def test_clip_benchmark_wants_texts(pretraining):
    with pytest.raises(ValueError, match="only a vision tower; `flip-hf evaluate` can probe it"):
        load_flip(str(pretraining[1]))


def test_probes_see_the_trained_tower(pretraining, colours, tmp_path):
    argv = ["--tasks", "linear-probe", "few-shot", *colours, "--shots", 1, "--repeats", 1]
    with threadpool_limits(1):
        report = evaluated(tmp_path / "out", pretraining[1], *argv)
    linear, few = report["results"]
    assert linear["metrics"]["top1"] > 0.9 and linear["samples"] == 60 and report["skipped"] == {}  # chance: 0.25
    assert few["metrics"]["1-shot"] > 0.5
