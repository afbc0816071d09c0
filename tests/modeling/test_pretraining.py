"""Reconstruction beside the contrast: ViTMAE's numbers, one pass for both losses, no trace in the FlipModel."""

import inspect
import json
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, ViTMAEConfig, ViTMAEForPreTraining

from flip_hf import FlipDecoderConfig, FlipForPreTraining, FlipModel, FlipPreTrainingConfig
from flip_hf.conversion.mae import mae_to_pretraining
from flip_hf.modeling import modeling_flip
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.modeling.resizing_flip import sincos_positions
from flip_hf.training.encoder import recompute_activations
from tests.helpers.models import NUM_PATCHES, PATCH_SIZE, randomize, tiny_config

DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
GIVEN = object()
CLS = {"pooling_type": "cls", "use_pre_layernorm": True}


def build(vision: dict | None = None, **kwargs) -> FlipForPreTraining:
    config = FlipPreTrainingConfig(flip_config=tiny_config(vision=vision), decoder_config=DECODER, **kwargs)
    return randomize(FlipForPreTraining(config)).eval()


@pytest.fixture
def pretraining() -> FlipForPreTraining:
    return build()


def tiny_mae(**kwargs) -> ViTMAEForPreTraining:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = {f"decoder_{name}": value for name, value in DECODER.items()}
    config = ViTMAEConfig(**sizes, **decoder, image_size=32, patch_size=8, **kwargs)
    mae = randomize(ViTMAEForPreTraining(config)).eval()
    mae.decoder.initialize_weights(NUM_PATCHES)  # a new one of Transformers has no positions in its decoder
    return mae


# -- ViTMAE -----------------------------------------------------------------------------------------------------------


def test_the_decoders_positions_are_vitmaes():
    table = tiny_mae().decoder.decoder_pos_embed[0]
    assert (build().decoder.position_embedding.weight - table).abs().max() < 1e-6


def in_our_layout(patches: torch.Tensor) -> torch.Tensor:
    """Pixels (..., P * P * C), as ViTMAE has them, as (..., C * P * P)."""
    return patches.unflatten(-1, (PATCH_SIZE, PATCH_SIZE, 3)).movedim(-1, -3).flatten(-3)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_loss_prediction_and_gradients_are_vitmaes(images, mask_ratio, norm_pix_loss, sort):
    mae = tiny_mae(mask_ratio=mask_ratio, norm_pix_loss=norm_pix_loss)
    ours = mae_to_pretraining(mae, text_config=TEXT)
    assert ours.config.norm_pixel_target is norm_pix_loss and ours.config.flip_config.mask_ratio == mask_ratio
    noise = torch.rand(3, NUM_PATCHES)
    ids_keep = noise.argsort(dim=1)[:, : int(NUM_PATCHES * (1 - mask_ratio))]
    ids_keep = ids_keep.sort(dim=1).values if sort else ids_keep
    expected = mae(images, noise=noise)
    outputs = ours(pixel_values=images, ids_keep=ids_keep, objective="reconstruction")
    assert (outputs.loss - expected.loss).abs() < 1e-5
    assert (outputs.reconstruction - in_our_layout(expected.logits)).abs().max() < 1e-5
    expected.loss.backward()
    outputs.loss.backward()
    theirs = {name: parameter.grad for name, parameter in mae.named_parameters() if parameter.requires_grad}
    # The same conversion carries the gradients over: they take the parameters' places.
    with torch.no_grad():
        for name, parameter in mae.named_parameters():
            parameter.copy_(theirs.get(name, torch.zeros(())))
    gradients = mae_to_pretraining(mae, text_config=TEXT).state_dict()
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            allowed = 1e-5 * max(1.0, gradients[name].abs().max().item())
            assert (parameter.grad - gradients[name]).abs().max() < allowed, name
            assert gradients[name].any() or name.endswith("k_proj.bias"), name
            compared += 1
    assert compared == len(theirs)


# -- one mask, one pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", [{}, CLS])
def test_one_mask_and_one_pass_serve_both_losses(images, texts, vision, monkeypatch):
    model = build(vision).train()
    calls = []
    draw_mask = modeling_flip.draw_mask
    monkeypatch.setattr(modeling_flip, "draw_mask", lambda *args: calls.append("mask") or draw_mask(*args))
    model.flip.vision_model.encoder.register_forward_hook(lambda *args: calls.append("encoder"))
    outputs = model(pixel_values=images, **texts)
    assert calls == ["mask", "encoder"]
    # Each loss is the one of its own objective with this mask.
    alone = {"pixel_values": images, "ids_keep": outputs.ids_keep}
    contrastive = model.flip(**alone, **texts, return_loss=True)
    reconstruction = model(**alone, objective="reconstruction")
    assert torch.equal(outputs.contrastive_loss, contrastive.loss)
    assert torch.equal(outputs.logits_per_image, contrastive.logits_per_image)
    assert torch.equal(outputs.reconstruction, reconstruction.reconstruction)
    assert torch.equal(outputs.loss, contrastive.loss + reconstruction.loss)
    weighted = model(**alone, **texts, reconstruction_weight=0.5)
    assert torch.allclose(weighted.loss, contrastive.loss + 0.5 * reconstruction.loss)


def test_each_objective_computes_only_its_own_parts(pretraining, images, texts):
    alone = {"pixel_values": images, "mask_ratio": 0.5}
    outputs = pretraining(**alone, **texts, objective="contrastive")
    assert torch.equal(outputs.loss, outputs.contrastive_loss)
    assert outputs.reconstruction is None and outputs.reconstruction_loss is None
    outputs = pretraining(**alone, objective="reconstruction", reconstruction_weight=0.5)
    assert torch.equal(outputs.loss, outputs.reconstruction_loss)  # the weight is for a sum
    assert outputs.contrastive_loss is None and outputs.logits_per_image is None
    outputs = pretraining(**alone, **texts, return_loss=False)
    assert outputs.loss is None and outputs.reconstruction.shape == (3, NUM_PATCHES, 3 * PATCH_SIZE**2)
    outputs.loss = torch.zeros(())
    pretraining.config.objective = "contrastive"
    assert pretraining(**alone, **texts).reconstruction is None
    assert all(isinstance(value, (torch.Tensor, tuple)) for value in pretraining(**alone, **texts).to_tuple())


@pytest.mark.parametrize("vision", [{}, CLS])
def test_the_decoder_reads_normalised_tokens(images, vision):
    """With `pooling_type="cls"` the tower's own tokens are not."""
    model = build(vision)
    tokens = []
    model.decoder.token_projection.register_forward_hook(lambda module, args, output: tokens.append(args[0]))
    with torch.no_grad():
        norm = model.flip.vision_model.post_layernorm
        norm.weight.fill_(1), norm.bias.fill_(0)
    model(pixel_values=images, mask_ratio=0.5, objective="reconstruction")
    assert tokens[0].shape == (3, 1 + NUM_PATCHES // 2, 32)
    assert tokens[0].mean(dim=-1).abs().max() < 1e-5
    assert (tokens[0].var(dim=-1, correction=0) - 1).abs().max() < 1e-3


def test_patches_cut_before_give_the_features_of_whole_images(pretraining, images, texts):
    ids_keep = torch.tensor([[1, 5, 6], [0, 2, 15], [7, 8, 9]])
    expected = pretraining(pixel_values=images, ids_keep=ids_keep, **texts)
    patches = cut_patches(images, PATCH_SIZE, ids_keep)
    targets = cut_patches(images, PATCH_SIZE)
    outputs = pretraining(patches=patches, target_patches=targets, ids_keep=ids_keep, **texts)
    assert torch.allclose(outputs.loss, expected.loss) and torch.allclose(
        outputs.reconstruction, expected.reconstruction
    )


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pixel_target", [True, False])
def test_only_dropped_patches_count(images, norm_pixel_target):
    model = build(norm_pixel_target=norm_pixel_target)
    ids_keep = torch.tensor([[6, 1, 5], [0, 2, 15], [7, 8, 9]])
    targets = cut_patches(images, PATCH_SIZE)
    prediction = model.reconstruct(model.flip.vision_model(images, ids_keep=ids_keep).last_hidden_state, ids_keep)
    expected = model.reconstruction_loss(prediction, targets, ids_keep, per_image=True)
    assert torch.allclose(model.reconstruction_loss(prediction, targets, ids_keep), expected.mean())
    for patch, counts in ((5, False), (4, True)):
        changed = targets.clone()
        changed[0, patch] = torch.randn(targets.shape[-1])
        losses = model.reconstruction_loss(prediction, changed, ids_keep, per_image=True)
        assert torch.equal(losses[1:], expected[1:])
        assert torch.equal(losses[0], expected[0]) is not counts


def test_a_perfect_prediction_of_normalised_pixels_has_no_loss(pretraining, images):
    targets = cut_patches(images, PATCH_SIZE)
    ids_keep = torch.arange(4).expand(3, -1)
    perfect = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
    assert pretraining.reconstruction_loss(perfect, targets, ids_keep) < 1e-12
    brighter = 3 * targets + 2  # a patch's brightness and contrast are not to be predicted
    assert pretraining.reconstruction_loss(perfect, brighter, ids_keep) < 1e-9
    assert pretraining.reconstruction_loss(perfect.bfloat16(), targets, ids_keep).dtype == torch.float32


# -- saving -----------------------------------------------------------------------------------------------------------


def test_the_decoder_leaves_no_trace_in_a_saved_flip_model(pretraining, images, texts, tmp_path):
    stock = FlipModel(tiny_config())
    stock.load_state_dict(pretraining.flip.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    pretraining.flip.save_pretrained(tmp_path / "flip")
    assert {p.name for p in (tmp_path / "flip").iterdir()} == {p.name for p in (tmp_path / "stock").iterdir()}
    for path in (tmp_path / "stock").iterdir():
        assert path.read_bytes() == (tmp_path / "flip" / path.name).read_bytes(), path.name
    loaded, report = FlipModel.from_pretrained(tmp_path / "flip", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = {"pixel_values": images, **texts}
    assert torch.equal(loaded(**inputs).logits_per_image, pretraining.flip(**inputs).logits_per_image)


@pytest.fixture
def kept(tmp_path):
    """A model of both objectives, and its folder."""
    model = build(CLS, objective="both", reconstruction_weight=0.25, norm_pixel_target=False)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_saved_model_is_the_same(kept, images, texts):
    model, folder = kept
    loaded, report = FlipForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.config.reconstruction_weight, loaded.config.norm_pixel_target) == (0.25, False)
    inputs = {"pixel_values": images, "ids_keep": torch.arange(4).expand(3, -1), **texts}
    assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)


def test_the_flip_model_of_a_saved_model_can_be_read_alone(kept, images, texts):
    model, folder = kept
    alone, report = FlipModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = {"pixel_values": images, "ids_keep": torch.arange(4).expand(3, -1), **texts}
    assert torch.equal(alone(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_a_saved_model_has_its_code_and_names_it(kept):
    model, folder = kept
    assert type(AutoModelForPreTraining.from_pretrained(folder)) is FlipForPreTraining
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_pretraining_flip.FlipPreTrainingConfig",
        "AutoModelForPreTraining": "pretraining_flip.FlipForPreTraining",
    }
    assert all((folder / f"{name}_flip.py").is_file() for name in ("pretraining", "decoder", "modeling", "masking"))


def test_pre_training_begins_with_a_saved_flip_model(model, images, texts, tmp_path, warnings_logged):
    """The decoder is new, and what is new is reported."""
    model.save_pretrained(tmp_path / "flip")
    loaded: Any = FlipForPreTraining.from_pretrained(
        tmp_path / "flip", decoder_config=DECODER, norm_pixel_target=False, output_loading_info=True
    )
    pretraining, report = loaded
    decoder = {f"decoder.{name}" for name in pretraining.decoder.state_dict()}
    assert set(report["missing_keys"]) == decoder
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert [message for message in warnings_logged if "LOAD REPORT" not in message] == []
    assert pretraining.decoder.layer_norm.weight.shape == (16,) and not pretraining.config.norm_pixel_target
    assert torch.equal(pretraining.decoder.position_embedding.weight, sincos_positions(4, 16))
    for name, tensor in model.state_dict().items():
        assert torch.equal(pretraining.flip.state_dict()[name], tensor), name
    pretraining.save_pretrained(tmp_path / "whole")
    assert "auto_map" not in json.loads((tmp_path / "whole" / "config.json").read_text())["flip_config"]
    again = FlipForPreTraining.from_pretrained(tmp_path / "whole")
    inputs = {"pixel_values": images, "ids_keep": torch.arange(4).expand(3, -1), **texts}
    assert torch.equal(again(**inputs).loss, pretraining(**inputs).loss)


def test_the_images_are_the_first_argument():
    """The main input in Transformers' terms; Trainer and its tests rely on its position."""
    assert list(inspect.signature(FlipForPreTraining.forward).parameters)[1] == FlipForPreTraining.main_input_name


def test_a_configuration_as_a_dict_is_whole(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = FlipForPreTraining.from_flip(FlipModel.from_pretrained(tmp_path), decoder_config=DECODER).config
    fields = config.flip_config.to_dict()
    fields.pop("transformers_version")  # of a configuration within another, Transformers leaves it out
    assert config.to_dict()["flip_config"] == fields and fields["_name_or_path"] == str(tmp_path)
    assert str(tmp_path) not in config.to_json_string()


def test_in_evaluation_patches_are_dropped_where_they_are_reconstructed(pretraining, images, texts):
    """As in MAE: without a mask there would be nothing to reconstruct, and no validation loss."""
    outputs = pretraining.eval()(pixel_values=images, **texts)
    assert outputs.ids_keep.shape == (3, 8) and outputs.reconstruction_loss > 0  # half of them, the configuration's
    assert pretraining(pixel_values=images, **texts, objective="contrastive").ids_keep is None
    torch.manual_seed(0)
    trained = pretraining.train()(pixel_values=images, **texts)
    torch.manual_seed(0)
    assert torch.equal(pretraining.eval()(pixel_values=images, **texts).ids_keep, trained.ids_keep)
    pretraining.config.flip_config.mask_ratio = pretraining.flip.config.mask_ratio = 0
    with pytest.raises(ValueError, match="all 16 patches are visible"):
        pretraining(pixel_values=images, **texts)


def test_a_flip_model_gets_a_new_decoder_and_keeps_its_weights(model, images, texts):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    pretraining = FlipForPreTraining.from_flip(model, decoder_config=DECODER)
    assert pretraining.flip is model and pretraining.config.flip_config is model.config and pretraining.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    pretraining(pixel_values=images, **texts).loss.backward()
    assert all(parameter.grad is not None for parameter in pretraining.parameters())
    half = FlipForPreTraining.from_flip(model.to(torch.bfloat16), decoder_config=DECODER)
    assert half.decoder.dtype == torch.bfloat16


def test_a_new_decoder_starts_as_maes():
    model = FlipForPreTraining(
        FlipPreTrainingConfig(flip_config=tiny_config(), decoder_config={"num_hidden_layers": 1})
    )
    assert FlipDecoderConfig().to_dict().items() >= {"hidden_size": 512, "num_hidden_layers": 8}.items()
    state = model.decoder.state_dict()
    assert torch.equal(state["position_embedding.weight"], sincos_positions(4, 512))
    assert 0.018 < state["mask_token"].std() < 0.022
    bound = (6 / (512 + 192)) ** 0.5
    assert 0.95 * bound < state["pixel_projection.weight"].abs().max() <= bound
    assert not any(state[name].any() for name in state if name.endswith("bias"))


# -- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "mae"}, "objective must be one of contrastive, reconstruction, both, got 'mae'"),
        ({"input_ids": None}, "objective='both' compares images with texts: pass input_ids"),
        ({"mask_ratio": 0}, "all 16 patches are visible"),
        ({"mask_ratio": None, "ids_keep": torch.arange(16).expand(3, -1)}, "all 16 patches are visible"),
        ({"target_patches": torch.zeros(3, 16, 192)}, "with pixel_values, leave it out"),
        (
            {"pixel_values": None, "patches": GIVEN, "ids_keep": GIVEN, "mask_ratio": None},
            "pass target_patches, all patches",
        ),
        (
            {"pixel_values": None, "patches": GIVEN, "ids_keep": GIVEN, "mask_ratio": None, "target_patches": GIVEN},
            "all 16 patches",
        ),
    ],
)
def test_unusable_training_data_are_refused_by_name(pretraining, images, texts, change, message):
    zeros = {"patches": torch.zeros(3, 4, 192), "ids_keep": torch.arange(4).expand(3, -1)}
    zeros["target_patches"] = zeros["patches"]  # only the visible ones
    change = {name: zeros[name] if name in zeros and value is GIVEN else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        pretraining(**{"pixel_values": images, "mask_ratio": 0.5, **texts, **change})


def test_a_tower_that_was_resized_is_refused(pretraining):
    pretraining.flip.resize_position_embeddings(1 + 36)
    with pytest.raises(ValueError, match="resized to 36 patches .* of 16"):
        pretraining(pixel_values=torch.zeros(1, 3, 48, 48), mask_ratio=0.5, objective="reconstruction")


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "mae"},
        {"decoder_config": {"hidden_size": 24, "num_attention_heads": 16}},
        {"decoder_config": {"hidden_size": 6, "num_attention_heads": 2}},
    ],
)
def test_a_wrong_configuration_is_refused(wrong):
    with pytest.raises(StrictDataclassError):
        FlipPreTrainingConfig(**wrong)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(pretraining, images, texts, reentrant):
    pretraining.train()
    inputs = {"pixel_values": images, "ids_keep": torch.arange(4).expand(3, -1), **texts}
    pretraining(**inputs).loss.backward()
    expected = {name: parameter.grad for name, parameter in pretraining.named_parameters()}
    pretraining.zero_grad()
    recompute_activations(pretraining, {"use_reentrant": reentrant})
    runs = []
    pretraining.decoder.layers[0].mlp.register_forward_pre_hook(lambda *args: runs.append(1))
    pretraining(**inputs).loss.backward()
    assert len(runs) == 2  # forward, and again on the way back
    for name, parameter in pretraining.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_near_float32(pretraining, images, texts, autocast):
    inputs = {"pixel_values": images, "ids_keep": torch.arange(4).expand(3, -1), **texts}
    expected = pretraining(**inputs)
    model = pretraining if autocast else pretraining.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(**inputs)
    assert outputs.loss.dtype == outputs.reconstruction_loss.dtype == torch.float32
    assert outputs.reconstruction.dtype == torch.bfloat16
    deviation = (outputs.reconstruction.float() - expected.reconstruction).norm() / expected.reconstruction.norm()
    assert deviation < 3e-2
    assert (outputs.loss - expected.loss).abs() < 3e-2 * expected.loss


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_set_for_the_decoder_too(pretraining, images, attention, recwarn):
    pretraining.set_attn_implementation(attention)
    assert pretraining.decoder.layers[0].self_attn.config._attn_implementation == attention
    assert pretraining.flip.vision_model.config._attn_implementation == attention
    pretraining(pixel_values=images, mask_ratio=0.5, objective="reconstruction")


def test_a_saved_model_does_not_name_its_source_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "private")
    flip = FlipModel.from_pretrained(tmp_path / "private")
    FlipForPreTraining.from_flip(flip, decoder_config=DECODER).save_pretrained(tmp_path / "shown")
    assert "private" not in (tmp_path / "shown" / "config.json").read_text()
