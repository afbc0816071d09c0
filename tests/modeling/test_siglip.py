"""SigLIP as a FlipModel: Transformers' numbers and gradients, there and back bit for bit, and masked training."""

import json

import pytest
import torch
from transformers import AutoModel, Siglip2Config, SiglipConfig, SiglipModel

from flip_hf import FlipForImageClassification, FlipForPreTraining, FlipModel
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.modeling.siglip_flip import flip_config_from_siglip, siglip_config_from_flip
from flip_hf.training.optimization import is_decayed
from tests.helpers.models import DECODER, randomize, tiny_config, tiny_siglip

PAD = 1
LENGTHS = (12, 7, 1, 3)


@pytest.fixture
def siglip() -> SiglipModel:
    torch.manual_seed(0)
    return tiny_siglip()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Four pairs, texts of mixed lengths padded to the context, as SigLIP needs them."""
    torch.manual_seed(1)
    input_ids = torch.randint(2, 100, (len(LENGTHS), 12))
    for row, length in zip(input_ids, LENGTHS, strict=True):
        row[length:] = PAD
    return {"input_ids": input_ids, "pixel_values": torch.randn(len(LENGTHS), 3, 48, 48)}


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return (ours - expected).abs().max().item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_numbers_and_gradients_are_siglips(inputs, attention):
    torch.manual_seed(0)
    siglip = tiny_siglip(attention=attention)
    flip = FlipModel.from_siglip(siglip, mask_ratio=0.5)
    assert flip.config._attn_implementation == attention and flip.config.mask_ratio == 0.5
    ours = flip(**inputs, return_loss=True)
    expected = siglip(**inputs, return_loss=True)
    for name in ("logits_per_image", "image_embeds", "text_embeds", "loss"):
        assert difference(ours[name], expected[name]) < 1e-5, name
    ours.loss.backward()
    expected.loss.backward()
    gradients = {name.replace("text_model.head", "text_projection"): p.grad for name, p in siglip.named_parameters()}
    assert gradients.keys() == dict(flip.named_parameters()).keys()
    for name, parameter in flip.named_parameters():
        assert difference(parameter.grad, gradients[name]) < 1e-5 * max(1.0, gradients[name].abs().max().item()), name


def test_features_are_siglips(siglip, inputs):
    flip = FlipModel.from_siglip(siglip)
    ours = flip.get_image_features(inputs["pixel_values"])
    expected = siglip.get_image_features(inputs["pixel_values"])
    assert difference(ours.pooler_output, expected.pooler_output) < 1e-5
    assert difference(ours.last_hidden_state, expected.last_hidden_state) < 1e-5
    ours = flip.get_text_features(inputs["input_ids"])
    expected = siglip.get_text_features(inputs["input_ids"])
    assert difference(ours.pooler_output, expected.pooler_output) < 1e-5


def test_texts_that_are_not_padded_are_padded_to_the_context(siglip, inputs):
    """SiglipModel itself would pool another position, and give other features."""
    flip = FlipModel.from_siglip(siglip)
    short = inputs["input_ids"][1:2, : LENGTHS[1]]
    expected = siglip.get_text_features(inputs["input_ids"][1:2]).pooler_output
    assert difference(flip.get_text_features(short).pooler_output, expected) < 1e-5
    mask = torch.ones_like(short)  # which tokenizers return, and SigLIP ignores
    assert difference(flip.get_text_features(short, attention_mask=mask).pooler_output, expected) < 1e-5
    assert difference(siglip.get_text_features(short).pooler_output, expected) > 1e-2


def test_there_and_back_is_the_same_to_the_bit(siglip, inputs, tmp_path):
    siglip.save_pretrained(tmp_path / "siglip")
    flip = FlipModel.from_siglip(str(tmp_path / "siglip"))
    flip.save_pretrained(tmp_path / "flip")
    back = AutoModel.from_pretrained(tmp_path / "flip").to_siglip()
    assert type(back) is SiglipModel and not back.training
    theirs = siglip.state_dict()
    assert back.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.state_dict().items())
    assert torch.equal(back(**inputs).logits_per_image, siglip(**inputs).logits_per_image)
    not_kept = {"dtype": None, "architectures": None}
    config = siglip_config_from_flip(flip_config_from_siglip(siglip.config)).to_dict()
    assert {**config, **not_kept} == {**siglip.config.to_dict(), **not_kept}


def test_masked_images_are_those_of_the_patches_kept(siglip, inputs):
    flip = FlipModel.from_siglip(siglip, mask_ratio=0.5)
    ids_keep = torch.tensor([[0, 2, 4, 7], [1, 3, 5, 8], [0, 1, 2, 3], [8, 7, 6, 5]])
    masked = flip.get_image_features(inputs["pixel_values"], ids_keep=ids_keep)
    assert masked.last_hidden_state.shape == (4, 4, 64)
    patches = cut_patches(inputs["pixel_values"], 16, ids_keep)
    assert torch.equal(flip.get_image_features(patches=patches, ids_keep=ids_keep).pooler_output, masked.pooler_output)
    # Independently: SigLIP's own blocks and head on the embeddings of these patches.
    vision = siglip.vision_model
    embedded = vision.embeddings(inputs["pixel_values"])
    kept = embedded.gather(1, ids_keep[:, :, None].expand(-1, -1, embedded.shape[2]))
    hidden = vision.post_layernorm(vision.encoder(inputs_embeds=kept).last_hidden_state)
    assert difference(masked.pooler_output, vision.head(hidden)) < 1e-5
    assert flip.train().get_image_features(inputs["pixel_values"]).ids_keep.shape == (4, 4)


def test_other_image_sizes_are_siglips(siglip):
    pixel_values = torch.randn(2, 3, 80, 64)
    flip = FlipModel.from_siglip(siglip)
    ours = flip.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output
    expected = siglip.get_image_features(pixel_values, interpolate_pos_encoding=True).pooler_output
    assert difference(ours, expected) < 1e-5
    flip.resize_position_embeddings(25)
    assert flip.config.vision_config.image_size == 80
    assert flip.get_image_features(torch.randn(1, 3, 80, 80)).last_hidden_state.shape == (1, 25, 64)
    with pytest.raises(
        ValueError, match=r"26 is not the number of positions of a square image: \(side in patches\)\^2\."
    ):
        flip.resize_position_embeddings(26)


def test_a_side_that_is_no_multiple_of_the_patch_is_siglips():
    """As of SigLIP so400m/14 at 384 pixels: the last pixels are not seen."""
    torch.manual_seed(0)
    siglip = tiny_siglip(image_size=52)
    pixel_values = torch.randn(2, 3, 52, 52)
    flip = FlipModel.from_siglip(siglip)
    assert flip.config.vision_config.num_patches == 9
    flip.resize_position_embeddings(9)  # its own number: nothing changes
    ours = flip.get_image_features(pixel_values).pooler_output
    assert difference(ours, siglip.get_image_features(pixel_values).pooler_output) < 1e-5
    assert flip.to_siglip().config.vision_config.image_size == 52


def test_a_classifier_and_a_decoder_take_its_tower(siglip, inputs, tmp_path):
    flip = FlipModel.from_siglip(siglip, mask_ratio=0.5)
    flip.save_pretrained(tmp_path)
    classifier = FlipForImageClassification.from_pretrained(tmp_path)
    assert classifier.vision_model.head is None  # as in SiglipForImageClassification
    logits = classifier(inputs["pixel_values"]).logits
    tokens = siglip.vision_model(inputs["pixel_values"]).last_hidden_state
    assert difference(logits, classifier.classifier(tokens.mean(dim=1))) < 1e-5
    model = FlipForPreTraining.from_flip(flip, decoder_config=DECODER, objective="both").train()
    outputs = model(**inputs)
    assert outputs.reconstruction.shape == (4, 9, 3 * 16 * 16) and outputs.ids_keep.shape == (4, 4)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weight_decay_reaches_no_bias(siglip):
    names = [name for name, _ in FlipModel.from_siglip(siglip).named_parameters()]
    biases = [name for name in names if "bias" in name]
    assert "vision_model.head.attention.in_proj_bias" in biases
    assert not any(is_decayed(name) for name in biases) and is_decayed("vision_model.head.attention.in_proj_weight")


def test_the_mean_of_patches_leaves_the_class_token_out():
    """CLIPA's and MAE's pooling: the mean of the patches, then the last LayerNorm."""
    torch.manual_seed(0)
    flip = randomize(FlipModel(tiny_config(vision={"pooling_type": "patch_mean"}))).eval()
    vision = flip.vision_model
    pixel_values = torch.randn(2, 3, 32, 32)
    outputs = vision(pixel_values)
    assert outputs.last_hidden_state.shape == (2, 17, 32)
    expected = vision.post_layernorm(outputs.last_hidden_state[:, 1:].mean(dim=1))
    assert torch.equal(outputs.pooler_output, expected)


def test_checkpoints_of_another_kind_are_refused(siglip, tmp_path):
    Siglip2Config().save_pretrained(tmp_path / "naflex")
    with pytest.raises(ValueError, match="is a NaFlex checkpoint of SigLIP 2.*use the checkpoint of the same size"):
        FlipModel.from_siglip(str(tmp_path / "naflex"))
    FlipModel(tiny_config()).config.save_pretrained(tmp_path / "flip")
    with pytest.raises(ValueError, match="is a checkpoint of type 'flip'; from_siglip takes SiglipModel"):
        FlipModel.from_siglip(str(tmp_path / "flip"))
    siglip.save_pretrained(tmp_path / "incomplete")
    config = json.loads((tmp_path / "incomplete" / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 4
    (tmp_path / "incomplete" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is not a complete SiglipModel: missing \['vision_model.encoder.layers.3"):
        FlipModel.from_siglip(str(tmp_path / "incomplete"))
    with pytest.raises(ValueError, match="has no attention pooling"):
        flip_config_from_siglip(SiglipConfig(vision_config={"vision_use_head": False}))


def test_a_model_of_another_kind_is_not_exported():
    with pytest.raises(ValueError, match="text_config.pooling_type is 'first', SigLIP's is 'last'; .*have a bias"):
        FlipModel(tiny_config()).to_siglip()
    with pytest.raises(ValueError, match="vision_config.use_projection is False, CLIP's is True"):
        FlipModel.from_siglip(tiny_siglip()).to_clip()
    assert siglip_config_from_flip(flip_config_from_siglip(SiglipConfig())).to_dict() == SiglipConfig().to_dict()
