"""A FlipModel with a bias of its logits: SigLIP's loss, its parameters, its configuration, saving and loading."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from flip_hf import FlipConfig, FlipModel, FlipTextModelWithProjection, FlipVisionModel
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.open_clip import flip_to_open_clip
from tests.helpers.contrast import dense_sigmoid_loss, make_batch, make_model
from tests.helpers.models import randomize, tiny_clip, tiny_config


@pytest.fixture
def biased() -> FlipModel:
    return randomize(make_model(bias=-10).float()).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return {name: x.float() if x.is_floating_point() else x for name, x in make_batch().items()}


def test_the_bias_is_added_to_the_logits_and_the_loss_is_siglips(biased, inputs):
    outputs = biased(**inputs, return_loss=True)
    cosines = outputs.image_embeds @ outputs.text_embeds.T
    logits = cosines * biased.get_logit_scale() + biased.logit_bias
    torch.testing.assert_close(outputs.logits_per_image, logits)
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.T)
    embeds = (outputs.image_embeds.double(), outputs.text_embeds.double())
    of_logits = (biased.get_logit_scale().double(), biased.logit_bias.double())
    assert outputs.loss.item() == pytest.approx(dense_sigmoid_loss(*embeds, *of_logits)[0].item(), rel=1e-5)


def test_a_bias_is_one_more_parameter_and_nothing_else():
    plain = FlipModel(tiny_config())
    biased = FlipModel(tiny_config(logit_bias_init_value=-10))
    assert plain.logit_bias is None and biased.logit_bias.shape == (1,) and biased.logit_bias.item() == -10
    assert set(biased.state_dict()) == set(plain.state_dict()) | {"logit_bias"}


def test_a_bias_is_saved_and_loaded(biased, inputs, tmp_path):
    biased.save_pretrained(tmp_path)
    loaded, report = FlipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded.logit_bias, biased.logit_bias) and loaded.logit_bias.item() != -10
    assert torch.equal(loaded(**inputs).logits_per_image, biased(**inputs).logits_per_image)


@pytest.mark.parametrize("model_class", [FlipVisionModel, FlipTextModelWithProjection])
def test_a_tower_of_a_model_with_a_bias_loads_silently(model_class, biased, tmp_path):
    biased.save_pretrained(tmp_path)
    _, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_a_checkpoint_without_a_bias_gets_its_start(tmp_path):
    FlipModel(tiny_config()).save_pretrained(tmp_path)
    config = FlipConfig.from_pretrained(tmp_path, logit_bias_init_value=-7.5)
    loaded, report = FlipModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert set(report["missing_keys"]) == {"logit_bias"} and loaded.logit_bias.item() == -7.5


@pytest.mark.parametrize("wrong", [float("nan"), -1001, "none"])
def test_a_bias_that_cannot_be_is_refused(wrong):
    with pytest.raises(StrictDataclassError, match="logit_bias_init_value"):
        FlipConfig(logit_bias_init_value=wrong)


def test_clip_has_no_bias_and_open_clip_has():
    clip_like = FlipModel.from_clip(tiny_clip(99))
    clip_like.config.logit_bias_init_value = -10
    with pytest.raises(ValueError, match="logit_bias_init_value is -10, CLIP's is None"):
        clip_like.to_clip()
    with pytest.raises(ConversionError, match=r"Missing: 1 \(logit_bias\)"):
        flip_to_open_clip(clip_like)  # the configuration has it, the model was made without
    state_dict, model_cfg = flip_to_open_clip(FlipModel(clip_like.config))
    assert state_dict["logit_bias"].item() == model_cfg["init_logit_bias"] == -10
