"""The numbers of others: the official JAX model's, Transformers' CLIPModel's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from flip_hf import FlipConfig, FlipModel
from flip_hf.conversion.clip import clip_to_flip
from flip_hf.losses import contrastive_loss
from flip_hf.modeling.modeling_flip import sincos_positions
from tests.conftest import randomize

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official_flip_tiny.npz"

# Names of the official tree, and what they are here.
BLOCK = {
    "LayerNorm_0": "layer_norm1",
    "LayerNorm_1": "layer_norm2",
    "MultiHeadDotProductAttention_0/query": "self_attn.q_proj",
    "MultiHeadDotProductAttention_0/key": "self_attn.k_proj",
    "MultiHeadDotProductAttention_0/value": "self_attn.v_proj",
    "MultiHeadDotProductAttention_0/out": "self_attn.out_proj",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
}
TOP = {
    "logit_scale": "logit_scale",
    "img_mlp1/kernel": "visual_projection.weight",
    "txt_mlp1/kernel": "text_projection.weight",
    "img_encoder/cls": "vision_model.embeddings.class_embedding",
    "img_encoder/embedding/kernel": "vision_model.embeddings.patch_embedding.weight",
    "img_encoder/embedding/bias": "vision_model.embeddings.patch_embedding.bias",
    "img_encoder/posembed_encoder/pos_embedding": "vision_model.embeddings.position_embedding.weight",
    "txt_encoder/token_embedding/embedding": "text_model.embeddings.token_embedding.weight",
    "txt_encoder/posembed_encoder/pos_embedding": "text_model.embeddings.position_embedding.weight",
}
NORMS = {"img_encoder": "vision_model.post_layernorm", "txt_encoder": "text_model.final_layer_norm"}


def our_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    tower, _, block, *rest = name.split("/")
    kind = "bias" if rest[-1] == "bias" else "weight"
    if block == "encoder_norm":
        return f"{NORMS[tower]}.{kind}"
    ours = "vision_model" if tower == "img_encoder" else "text_model"
    return f"{ours}.encoder.layers.{int(block[-2:])}.{BLOCK['/'.join(rest[:-1])]}.{kind}"


def our_tensor(name: str, value: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(value)
    if name.endswith("embedding/kernel"):
        return tensor.permute(3, 2, 0, 1)  # HWIO to OIHW
    if name.endswith("kernel"):
        return tensor.T
    return tensor.flatten() if name.endswith("cls") else tensor.squeeze(0) if "pos_embedding" in name else tensor


@pytest.fixture(scope="module")
def official():
    return dict(np.load(FIXTURE))


@pytest.fixture
def flip(official) -> FlipModel:
    config = FlipConfig(
        text_config={
            **{"vocab_size": 500, "hidden_size": 64, "intermediate_size": 256},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "attend_to_padding": True},
        },
        vision_config={
            **{"image_size": 64, "hidden_size": 96, "intermediate_size": 384},
            **{"num_hidden_layers": 3, "num_attention_heads": 4},
        },
        projection_dim=48,
    )
    model = FlipModel(config).eval()
    names = [name.removeprefix("param/") for name in official if name.startswith("param/")]
    model.load_state_dict({our_name(n): our_tensor(n, official[f"param/{n}"]) for n in names})  # strict: all, once
    return model


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


def test_gradients_of_a_masked_step_are_the_official_ones(flip, inputs, official):
    flip(**inputs, ids_keep=torch.from_numpy(official["mask50/ids_keep"]), return_loss=True).loss.backward()
    names = [name.removeprefix("mask50/grad/") for name in official if name.startswith("mask50/grad/")]
    assert len(names) == len(list(flip.named_parameters())) + 1  # and the table of fixed positions, whose is zero
    for name in names:
        expected = official[f"mask50/grad/{name}"]
        if our_name(name).startswith("vision_model.embeddings.position_embedding"):
            assert not expected.any()
            continue
        gradient = flip.get_parameter(our_name(name)).grad
        allowed = 1e-5 * max(1.0, float(np.abs(expected).max()))
        assert (gradient - our_tensor(name, expected)).abs().max().item() < allowed, name


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


def test_the_sincos_table_is_the_official_one(official):
    table = torch.from_numpy(official["param/img_encoder/posembed_encoder/pos_embedding"])[0]
    assert (sincos_positions(4, 96) - table).abs().max() < 2e-6  # theirs is computed in float32


# -- CLIP -------------------------------------------------------------------------------------------------------------


def tiny_clip(eos_token_id: int) -> CLIPModel:
    size = {"intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"vocab_size": 100, "hidden_size": 48, "max_position_embeddings": 20, "eos_token_id": eos_token_id}
    vision = {"hidden_size": 64, "image_size": 48, "patch_size": 16}
    config = CLIPConfig(
        text_config={**size, **text, "bos_token_id": 98, "pad_token_id": 99},
        vision_config={**size, **vision},
        projection_dim=40,
    )
    return randomize(CLIPModel(config), std=0.05).eval()


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
    flip = clip_to_flip(clip)
    for model in (clip, flip):
        model.set_attn_implementation(attention)
    if not with_mask:
        del clip_inputs["attention_mask"]
    expected, outputs = (model(**clip_inputs, return_loss=True) for model in (clip, flip))
    assert (outputs.logits_per_image - expected.logits_per_image).abs().max() < 1e-5
    assert (outputs.loss - expected.loss).abs() < 1e-5
    for tower in ("text_model_output", "vision_model_output"):
        ours, theirs = outputs[tower].last_hidden_state, expected[tower].last_hidden_state
        real = clip_inputs["attention_mask"].bool() if with_mask and tower == "text_model_output" else slice(None)
        assert (ours[real] - theirs[real]).abs().max() < 2e-5


def test_clip_gradients_are_clips(clip_inputs):
    clip = tiny_clip(99)
    flip = clip_to_flip(clip, mask_ratio=0).train()
    clip.train()
    for model in (clip, flip):
        model(**clip_inputs, return_loss=True).loss.backward()
    for name, parameter in clip.named_parameters():
        ours = flip.get_parameter(name.replace("pre_layrnorm", "pre_layernorm")).grad
        assert (ours - parameter.grad).abs().max() < 1e-5 * max(1, parameter.grad.abs().max()), name


def test_interpolated_positions_are_clips():
    clip = tiny_clip(99)
    images = torch.randn(2, 3, 80, 64)
    ours = clip_to_flip(clip).get_image_features(images, interpolate_pos_encoding=True).pooler_output
    theirs = clip.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    assert (ours - theirs).abs().max() < 1e-5
