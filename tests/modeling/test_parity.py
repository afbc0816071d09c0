"""The numbers of others: the official JAX model's, Transformers' CLIPModel's."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from flip_hf import FlipModel
from flip_hf.conversion.official import entries_of, read_official
from flip_hf.conversion.t5x import T5XCheckpoint
from flip_hf.losses import contrastive_loss
from flip_hf.modeling.resizing_flip import sincos_positions
from tests.helpers.models import tiny_clip

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def official():
    return dict(np.load(FIXTURES / "official_flip_tiny.npz"))


@pytest.fixture(scope="module")
def checkpoint() -> T5XCheckpoint:
    return T5XCheckpoint(FIXTURES / "official_flip_tiny.zip")


@pytest.fixture
def flip() -> FlipModel:
    return read_official(FIXTURES / "official_flip_tiny.zip", vision_heads=4, text_heads=4)


@pytest.fixture
def inputs(official):
    pixel_values = torch.from_numpy(official["input/image"]).permute(0, 3, 1, 2)
    return {"pixel_values": pixel_values, "input_ids": torch.from_numpy(official["input/txt"]).long()}


def deviation(ours: torch.Tensor, official: np.ndarray) -> float:
    return (ours.detach() - torch.from_numpy(np.asarray(official))).abs().max().item()


def test_features_loss_and_temperature_are_the_official_ones(flip, inputs, official):
    outputs = flip(**inputs, return_loss=True)
    assert deviation(outputs.image_embeds, official["out/z_img"]) < 5e-6
    assert deviation(outputs.text_embeds, official["out/z_txt"]) < 5e-6
    assert deviation(outputs.loss, official["out/loss"]) < 1e-5
    assert deviation(1 / flip.get_logit_scale(), official["out/tau"]) < 1e-6
    tokens = outputs.vision_model_output.last_hidden_state
    assert tokens.shape == official["inter/img_encoder_norm"].shape
    # The official evaluation shuffles the patches; their mean does not know.
    assert deviation(tokens.mean(1), official["inter/img_encoder_norm"].mean(1)) < 5e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["mask50", "mask75"])
def test_masked_features_and_loss_are_the_official_ones(flip, inputs, official, case, attention):
    flip.set_attn_implementation(attention)
    ids_keep = torch.from_numpy(official[f"{case}/ids_keep"])
    outputs = flip(**inputs, ids_keep=ids_keep, return_loss=True)
    assert deviation(outputs.image_embeds, official[f"{case}/z_img"]) < 5e-6
    assert deviation(outputs.loss, official[f"{case}/loss"]) < 1e-5
    tokens = outputs.vision_model_output.last_hidden_state
    assert deviation(tokens, official[f"{case}/encoder_out"]) < 2e-5


ON_A_GPU = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="needs a GPU"),
)


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours.float().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("attention", ["eager", "sdpa", ON_A_GPU])
def test_bfloat16_features_are_near_the_official_ones(flip, inputs, official, attention):
    device = "cuda" if attention == "flash_attention_2" else "cpu"
    flip.set_attn_implementation(attention)
    flip.to(device, torch.bfloat16)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with torch.no_grad():
        outputs = flip(**inputs)
        masked = flip(**inputs, ids_keep=torch.from_numpy(official["mask75/ids_keep"]).to(device))
    for ours, name in ((outputs, "out"), (masked, "mask75")):
        assert ours.image_embeds.dtype == torch.bfloat16
        assert relative(ours.image_embeds, torch.from_numpy(official[f"{name}/z_img"])) < 2e-2
    assert relative(outputs.text_embeds, torch.from_numpy(official["out/z_txt"])) < 2e-2


@pytest.mark.long
def test_flex_attention_gives_the_official_features(flip, inputs, official):
    flip.set_attn_implementation("flex_attention")
    with torch.no_grad():
        outputs = flip(**inputs)
    assert deviation(outputs.image_embeds, official["out/z_img"]) < 5e-6
    assert deviation(outputs.text_embeds, official["out/z_txt"]) < 5e-6


def test_gradients_of_a_masked_step_are_the_official_ones(flip, inputs, official, checkpoint):
    flip(**inputs, ids_keep=torch.from_numpy(official["mask50/ids_keep"]), return_loss=True).loss.backward()
    names = [name.removeprefix("mask50/grad/") for name in official if name.startswith("mask50/grad/")]
    assert len(names) == len(list(flip.named_parameters())) + 1  # and the table of fixed positions, whose is zero
    entries = {entry.theirs: entry for entry in entries_of(checkpoint)}
    for name in names:
        expected = official[f"mask50/grad/{name}"]
        (ours,) = entries[name].targets
        if ours.startswith("vision_model.embeddings.position_embedding"):
            assert not expected.any()
            continue
        (expected_here,) = entries[name].layout.to_ours(torch.from_numpy(expected))
        allowed = 1e-5 * max(1.0, float(np.abs(expected).max()))
        assert (flip.get_parameter(ours).grad - expected_here).abs().max().item() < allowed, name


def test_the_clip_of_the_temperature_is_the_official_one(flip, inputs, official):
    for i, value in enumerate(official["tau_cases/logit_scale"]):
        with torch.no_grad():
            flip.logit_scale.fill_(float(value))
        flip.zero_grad()
        outputs = flip(**inputs, return_loss=True)
        outputs.loss.backward()
        assert deviation(1 / flip.get_logit_scale(), official["tau_cases/tau"][i : i + 1]) < 1e-6
        assert outputs.loss.item() == pytest.approx(official["tau_cases/loss"][i].item(), rel=1e-5)
        expected = official["tau_cases/grad_logit_scale"][i].item()
        assert flip.logit_scale.grad.item() == pytest.approx(expected, abs=2e-5)


def test_the_training_loss_is_the_official_one(flip, inputs, official):
    outputs = flip(**inputs)
    loss, _ = contrastive_loss(outputs.image_embeds, outputs.text_embeds, flip.get_logit_scale())
    assert deviation(loss, official["out/loss"]) < 1e-5


def test_the_sincos_table_is_the_official_one(checkpoint):
    table = checkpoint["img_encoder/posembed_encoder/pos_embedding"][0]
    assert (sincos_positions(4, 96) - table).abs().max() < 2e-6  # theirs is computed in float32


# -- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clip_inputs():
    """Texts of mixed lengths, ending with the highest id and padded with it, as CLIP's tokenizer does."""
    input_ids = torch.full((5, 15), 99)
    for row, length in enumerate((3, 15, 7, 5, 2)):
        input_ids[row, : length - 1] = torch.randint(3, 98, (length - 1,))
    attention_mask = (torch.arange(15) < torch.tensor([3, 15, 7, 5, 2])[:, None]).long()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(5, 3, 48, 48),
    }


@pytest.mark.parametrize("eos_token_id", [99, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_clip_weights_give_clips_logits(clip_inputs, eos_token_id, attention, with_mask):
    clip = tiny_clip(eos_token_id)
    flip = FlipModel.from_clip(clip)
    for model in (clip, flip):
        model.set_attn_implementation(attention)
    if not with_mask:
        del clip_inputs["attention_mask"]
    expected, outputs = (model(**clip_inputs, return_loss=True) for model in (clip, flip))
    assert (outputs.logits_per_image - expected.logits_per_image).abs().max() < 1e-5
    assert (outputs.loss - expected.loss).abs() < 1e-5
    for tower in ("text_model_output", "vision_model_output"):
        ours = outputs[tower].last_hidden_state
        theirs = expected[tower].last_hidden_state
        real = clip_inputs["attention_mask"].bool() if with_mask and tower == "text_model_output" else slice(None)
        assert (ours[real] - theirs[real]).abs().max() < 2e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_embeddings_are_near_clips_float32_ones(clip_inputs, attention):
    clip = tiny_clip(99)
    expected = clip(**clip_inputs)
    flip = FlipModel.from_clip(clip.to(torch.bfloat16))
    flip.set_attn_implementation(attention)
    with torch.no_grad():
        outputs = flip(**clip_inputs)
    for name in ("image_embeds", "text_embeds"):
        assert relative(outputs[name], expected[name].detach()) < 2e-2


def test_clip_gradients_are_clips(clip_inputs):
    clip = tiny_clip(99)
    flip = FlipModel.from_clip(clip, mask_ratio=0).train()
    clip.train()
    for model in (clip, flip):
        model(**clip_inputs, return_loss=True).loss.backward()
    for name, parameter in clip.named_parameters():
        ours = flip.get_parameter(name.replace("pre_layrnorm", "pre_layernorm")).grad
        assert (ours - parameter.grad).abs().max() < 1e-5 * max(1, parameter.grad.abs().max()), name


def test_interpolated_positions_are_clips():
    clip = tiny_clip(99)
    images = torch.randn(2, 3, 80, 64)
    ours = FlipModel.from_clip(clip).get_image_features(images, interpolate_pos_encoding=True).pooler_output
    theirs = clip.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    assert (ours - theirs).abs().max() < 1e-5
