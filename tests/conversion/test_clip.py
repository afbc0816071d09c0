"""CLIPModel to FlipModel and back. Logits, losses and gradients are compared in tests/modeling/test_parity.py."""

import pytest
import torch
from transformers import AutoModel, CLIPModel, CLIPTextModelWithProjection, ViTMAEConfig, ViTMAEModel

from flip_hf import FlipModel
from tests.helpers.models import randomize, tiny_clip, tiny_config

CLIP_TEXT = {"causal": True, "pooling_type": "eos", "eos_token_id": 599}
CLIP_VISION = {"pooling_type": "cls", "use_pre_layernorm": True, "patch_embedding_bias": False}


def assert_identical(first: torch.nn.Module, second: torch.nn.Module) -> None:
    one = first.state_dict()
    two = second.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eos_token_id", [99, 2])
def test_the_round_trip_is_bit_identical(dtype, eos_token_id):
    clip = tiny_clip(eos_token_id).to(dtype)
    again = FlipModel.from_clip(clip).to_clip()
    assert_identical(clip, again)
    for part in ("text_config", "vision_config"):
        theirs = getattr(clip.config, part).to_dict()
        ours = getattr(again.config, part).to_dict()
        for fields in (theirs, ours):  # CLIPModel reads the composite's; and only a model made with one notes a dtype
            del fields["projection_dim"], fields["dtype"]
        assert theirs == ours
    assert again.config.projection_dim == clip.config.projection_dim


def test_a_folder_is_taken_and_given_back(tmp_path):
    clip = tiny_clip(99)
    clip.save_pretrained(tmp_path / "clip")
    flip = FlipModel.from_clip(str(tmp_path / "clip"), mask_ratio=0.75)
    assert flip.config.mask_ratio == 0.75 and not flip.training
    flip.to_clip().save_pretrained(tmp_path / "again")
    assert "flip" not in (tmp_path / "again" / "config.json").read_text().lower()
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]
    loaded = AutoModel.from_pretrained(tmp_path / "again")
    assert type(loaded) is CLIPModel
    assert_identical(clip, loaded)


def test_a_subfolder_is_taken(tmp_path):
    clip = tiny_clip(99)
    clip.save_pretrained(tmp_path / "pipeline" / "clip")
    flip = FlipModel.from_clip(str(tmp_path / "pipeline"), subfolder="clip")
    assert_identical(clip, flip.to_clip())


def test_the_weights_are_copied():
    clip = tiny_clip(99)
    flip = FlipModel.from_clip(clip)
    again = flip.to_clip()
    with torch.no_grad():
        flip.visual_projection.weight.zero_()
    assert clip.visual_projection.weight.any() and again.visual_projection.weight.any()


def test_a_model_that_is_configured_like_clip_can_be_exported():
    """Fixed positions and a clipped temperature do not stand in the way: they become plain numbers."""
    config = tiny_config(text=CLIP_TEXT, vision={**CLIP_VISION, "position_embedding_type": "sincos2d"})
    flip = randomize(FlipModel(config)).eval()
    with torch.no_grad():
        flip.logit_scale.fill_(5)  # above ln(100)
    ids = torch.randint(1, 599, (2, 6))
    ids[:, -1] = 599
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
    ours = flip(**inputs)
    theirs = flip.to_clip()(**inputs)
    assert (ours.logits_per_image - theirs.logits_per_image).abs().max() < 2e-5
    assert theirs.logits_per_image.abs().max() <= 100 + 1e-4


@pytest.mark.parametrize(
    ("fields", "switch"),
    [
        ({"text": {"causal": False}}, "text_config.causal is False, CLIP's is True"),
        ({"text": {"pooling_type": "mean"}}, "text_config.pooling_type is 'mean', CLIP's is 'eos' or 'argmax'"),
        ({"text": {"eos_token_id": 2}}, "text_config.eos_token_id is 2"),
        ({"vision": {"pooling_type": "mean"}}, "vision_config.pooling_type is 'mean'"),
        ({"vision": {"use_pre_layernorm": False}}, "vision_config.use_pre_layernorm is False"),
        ({"vision": {"patch_embedding_bias": True}}, "vision_config.patch_embedding_bias is True"),
        ({"projection_bias": True}, "projection_bias is True"),
    ],
)
def test_the_switch_in_the_way_of_an_export_is_named(fields, switch):
    fields = {
        "text": {**CLIP_TEXT, **fields.pop("text", {})},
        "vision": {**CLIP_VISION, **fields.pop("vision", {})},
        **fields,
    }
    with pytest.raises(ValueError, match=switch.replace("[", r"\[")) as error:
        FlipModel(tiny_config(**fields)).to_clip()
    assert str(error.value).count(";") == 1  # that switch alone; the other semicolon is the sentence's


def test_models_other_than_clip_are_refused(tmp_path):
    ViTMAEModel(ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "mae"
    )
    with pytest.raises(ValueError, match="type 'vit_mae'"):
        FlipModel.from_clip(str(tmp_path / "mae"))
    CLIPTextModelWithProjection(tiny_clip(99).config.text_config).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="type 'clip_text_model'"):
        FlipModel.from_clip(str(tmp_path / "text"))


def test_an_incomplete_clip_is_refused(tmp_path):
    clip = tiny_clip(99)
    state_dict = clip.state_dict()
    state_dict["surplus"] = torch.zeros(1)
    del state_dict["vision_model.post_layernorm.bias"]
    clip.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match=r"missing \['vision_model.post_layernorm.bias'\], left over \['surplus'\]"):
        FlipModel.from_clip(str(tmp_path))


def test_a_clip_trains_on_half_of_its_patches_and_converts_back(tmp_path):
    """Two hundred pairs: the picture shows which of eight patches is bright, the caption says it."""
    torch.manual_seed(0)
    tiny_clip(99).save_pretrained(tmp_path / "clip")
    flip = FlipModel.from_clip(str(tmp_path / "clip"), mask_ratio=0.5).train()
    classes = torch.arange(200) % 8
    pixel_values = 0.3 * torch.randn(200, 3, 48, 48)
    colours = torch.randn(8, 3, 1, 1)
    pixel_values += colours[classes]
    input_ids = torch.stack([torch.full((200,), 98), 10 + classes, 20 + classes, torch.full((200,), 99)], dim=1)
    optimizer = torch.optim.AdamW(flip.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        rows = torch.stack([(classes == label).nonzero()[torch.randint(25, ())] for label in range(8)]).flatten()
        outputs = flip(input_ids[rows], pixel_values[rows], return_loss=True)
        assert outputs.ids_keep.shape == (8, 4)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    flip.eval()
    flip.to_clip().save_pretrained(tmp_path / "shipped")
    clip = CLIPModel.from_pretrained(tmp_path / "shipped")
    with torch.no_grad():
        theirs = clip(input_ids[:16], pixel_values[:16])
        ours = flip(input_ids[:16], pixel_values[:16])
    assert (theirs.image_embeds - ours.image_embeds).abs().max() < 1e-6
    assert (theirs.text_embeds - ours.text_embeds).abs().max() < 1e-6
