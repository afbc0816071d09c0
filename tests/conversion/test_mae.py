"""ViTMAE's encoder as a Flip vision tower, and with its decoder; numbers of both are in test_pretraining.py, too."""

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from flip_hf import FlipForPreTraining, FlipVisionModel
from flip_hf.conversion.mae import convert_from_mae, mae_to_pretraining, mae_to_vision_tower
from flip_hf.conversion.tables import ConversionError
from tests.helpers.models import randomize

TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}


@pytest.fixture
def mae() -> ViTMAEForPreTraining:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = ViTMAEConfig(**sizes, **decoder, image_size=32, patch_size=8, mask_ratio=0.75)
    return randomize(ViTMAEForPreTraining(config)).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tokens_are_maes_on_the_same_patches(mae, images, attention):
    mae.set_attn_implementation(attention)
    tower = mae_to_vision_tower(mae)
    tower.set_attn_implementation(attention)
    noise = torch.rand(3, 16)
    expected = mae.vit(images, noise=noise).last_hidden_state  # (3, 1 + 4, 32), patches in the order of their noise
    ids_keep = noise.argsort(dim=1)[:, :4]
    ours = tower(images, ids_keep=ids_keep).last_hidden_state
    assert (ours - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_bfloat16_tokens_are_near_maes_float32_ones(mae, images):
    noise = torch.rand(3, 16)
    expected = mae.vit(images, noise=noise).last_hidden_state
    tower = mae_to_vision_tower(mae.to(torch.bfloat16))
    assert tower.dtype == torch.bfloat16
    ours = tower(images, ids_keep=noise.argsort(dim=1)[:, :4]).last_hidden_state.float()
    assert (ours - expected).norm() < 2e-2 * expected.norm()


def test_a_folder_of_either_class_becomes_a_tower(mae, images, tmp_path):
    mae.save_pretrained(tmp_path / "pretraining")
    mae.vit.save_pretrained(tmp_path / "encoder")
    expected = mae_to_vision_tower(mae)(images).last_hidden_state
    for name in ("pretraining", "encoder"):
        convert_from_mae(str(tmp_path / name), mask_ratio=0.75).save(tmp_path / f"flip-{name}")
        tower = FlipVisionModel.from_pretrained(tmp_path / f"flip-{name}")
        assert tower.config.mask_ratio == 0.75
        assert torch.equal(tower(images).last_hidden_state, expected)


def test_the_weights_are_copied(mae):
    tower = mae_to_vision_tower(mae)
    with torch.no_grad():
        tower.post_layernorm.weight.zero_()
    assert mae.vit.layernorm.weight.any()


def test_weights_that_make_no_tower_are_refused(mae, tmp_path):
    with pytest.raises(ConversionError, match="qkv_bias=False"):
        mae_to_vision_tower(ViTMAEModel(ViTMAEConfig(**{**mae.config.to_dict(), "qkv_bias": False})))
    state_dict = mae.state_dict()
    del state_dict["vit.layernorm.bias"]
    mae.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ConversionError, match="missing .*layernorm.bias"):
        convert_from_mae(str(tmp_path))


def test_with_its_decoder_every_tensor_becomes_one_of_the_pretraining_model(mae, images, tmp_path):
    mae.save_pretrained(tmp_path / "mae")
    convert_from_mae(str(tmp_path / "mae"), mask_ratio=0.5, decoder=True, text_config=TEXT).save(tmp_path / "flip")
    card = (tmp_path / "flip" / "README.md").read_text()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "flip").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    assert "the text tower is a new one, not trained" in card
    model = FlipForPreTraining.from_pretrained(tmp_path / "flip")
    assert model.config.flip_config.mask_ratio == 0.5
    theirs = mae.state_dict()
    ours = model.state_dict()
    seen = {name: tensor for name, tensor in ours.items() if name.startswith(("flip.vision_model.", "decoder."))}
    assert len(seen) == len(theirs)
    sums = [sorted(tensor.double().sum().item() for tensor in tensors.values()) for tensors in (seen, theirs)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-6)
    assert mae_to_pretraining(mae.to(torch.bfloat16), text_config=TEXT).dtype == torch.bfloat16


def test_an_encoder_alone_has_no_decoder_to_convert(mae, tmp_path):
    mae.vit.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="missing .*decoder.mask_token"):
        convert_from_mae(str(tmp_path), decoder=True)
