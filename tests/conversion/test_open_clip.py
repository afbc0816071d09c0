"""open_clip to Flip and back: against features recorded from open_clip 3.3, and against the package if installed."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flip_hf import FlipModel
from flip_hf.conversion.open_clip import convert_from_open_clip, flip_to_open_clip, open_clip_to_flip, read_state_dict
from flip_hf.conversion.open_clip_config import config_from_open_clip, config_to_open_clip
from flip_hf.conversion.tables import ConversionError
from tests.helpers.models import randomize, tiny_config


@pytest.fixture
def folder(open_clip_tiny, tmp_path):
    """As open_clip writes it."""
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip_tiny["model_cfg"]}))
    save_file(open_clip_tiny["state_dict"], folder / "open_clip_model.safetensors")
    return folder


def test_features_are_open_clips(open_clip_tiny):
    flip = open_clip_to_flip(open_clip_tiny["state_dict"], open_clip_tiny["model_cfg"])
    images = flip.get_image_features(open_clip_tiny["input/pixel_values"]).pooler_output
    texts = flip.get_text_features(open_clip_tiny["input/input_ids"]).pooler_output
    for ours, theirs in ((images, "out/image_features"), (texts, "out/text_features")):
        assert (ours - open_clip_tiny[theirs]).abs().max() < 1e-5 * max(1, open_clip_tiny[theirs].abs().max())
    assert flip.config.mask_ratio == 0.5 and flip.config.vision_config.num_attention_heads == 4


def test_bfloat16_features_are_near_open_clips_float32_ones(open_clip_tiny):
    flip = open_clip_to_flip(open_clip_tiny["state_dict"], open_clip_tiny["model_cfg"]).to(torch.bfloat16)
    images = flip.get_image_features(open_clip_tiny["input/pixel_values"]).pooler_output
    texts = flip.get_text_features(open_clip_tiny["input/input_ids"]).pooler_output
    for ours, theirs in ((images, "out/image_features"), (texts, "out/text_features")):
        assert (ours.float() - open_clip_tiny[theirs]).norm() < 2e-2 * open_clip_tiny[theirs].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_round_trip_is_bit_identical(open_clip_tiny, dtype):
    source = {name: tensor.to(dtype) for name, tensor in open_clip_tiny["state_dict"].items()}
    again, model_cfg = flip_to_open_clip(open_clip_to_flip(source, open_clip_tiny["model_cfg"]))
    assert again.keys() == source.keys()
    for name, tensor in source.items():
        assert again[name].dtype == dtype and torch.equal(again[name], tensor), name
    assert config_from_open_clip(model_cfg).to_dict() == config_from_open_clip(open_clip_tiny["model_cfg"]).to_dict()


def test_a_training_checkpoint_is_read(open_clip_tiny, folder, tmp_path):
    state_dict = {f"module.{name}": tensor for name, tensor in open_clip_tiny["state_dict"].items()}
    state_dict["module.attn_mask"] = torch.zeros(12, 12)
    torch.save({"epoch": 3, "name": "run", "state_dict": state_dict}, tmp_path / "epoch_3.pt")
    with pytest.raises(ConversionError, match="give --model_config"):
        convert_from_open_clip(str(tmp_path / "epoch_3.pt"))
    (tmp_path / "ViT.json").write_text(json.dumps(open_clip_tiny["model_cfg"]))
    flip = convert_from_open_clip(str(tmp_path / "epoch_3.pt"), model_config=str(tmp_path / "ViT.json")).model
    expected = convert_from_open_clip(str(folder)).model
    assert all(
        torch.equal(a, b) for a, b in zip(flip.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_preprocessing_is_taken_over(folder, open_clip_tiny):
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": open_clip_tiny["model_cfg"], "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    image_processor = convert_from_open_clip(str(folder)).processor
    assert list(image_processor.image_mean) == [0.5] * 3 and image_processor.resample == 2
    assert not image_processor.do_center_crop and dict(image_processor.size) == {"height": 24, "width": 24}


class Code:
    """A pickle that runs something when it is loaded."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_pickled_code_is_not_run(folder, tmp_path, capsys):
    for name, save in (("code.pt", torch.save), ("raw.pt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        save({"state_dict": {"logit_scale": Code()}}, tmp_path / name)
        with pytest.raises(ConversionError, match=f"{name} cannot be read as weights.*never run"):
            read_state_dict(tmp_path / name)
    assert "never be printed" not in capsys.readouterr().out


def test_a_truncated_file_is_refused(folder):
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConversionError, match="cannot be read as weights"):
        convert_from_open_clip(str(folder))


def test_missing_and_surplus_tensors_are_both_named(open_clip_tiny):
    source = dict(open_clip_tiny["state_dict"])
    source["visual.attn_pool.query"] = source.pop("visual.proj")
    with pytest.raises(ConversionError, match=r"Missing: 1 \(visual.proj\). Left over: 1 \(visual.attn_pool.query\)"):
        open_clip_to_flip(source, open_clip_tiny["model_cfg"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, "vision_cfg.timm_model_name = 'vit_base'"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "ResNet"),
        ({"vision_cfg": {"attentional_pool": True}}, "vision_cfg.attentional_pool = True"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type = 'avg'"),
        ({"vision_cfg": {"ls_init_value": 1e-5}}, "vision_cfg.ls_init_value = 1e-05"),
        ({"vision_cfg": {"from_the_future": "yes"}}, "vision_cfg.from_the_future = 'yes'"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "text_cfg.hf_model_name = 'roberta-base'"),
        ({"text_cfg": {"pool_type": "last"}}, "text_cfg.pool_type = 'last'"),
        ({"text_cfg": {"proj_bias": True}}, "text_cfg.proj_bias = True"),
        ({"vision_cfg": {"pool_type": "none"}}, "vision_cfg.pool_type = 'none'"),
        ({"init_logit_bias": "cold"}, "logit_bias_init_value must be a number"),
        ({"multimodal_cfg": {"width": 512}}, "model_cfg.multimodal_cfg"),
    ],
)
def test_other_architectures_are_refused_by_name(open_clip_tiny, changes, message):
    config = json.loads(json.dumps(open_clip_tiny["model_cfg"]))
    for name, value in changes.items():
        config[name] = {**config[name], **value} if name in ("vision_cfg", "text_cfg") else value
    with pytest.raises(ConversionError, match=message):
        config_from_open_clip(config)


def test_a_flip_that_open_clip_has_not_is_refused_with_the_switches():
    with pytest.raises(
        ConversionError, match="must be 'cls', 'patch_mean' or 'attention'; vision_config.patch_embedding_bias"
    ):
        flip_to_open_clip(FlipModel(tiny_config()))


def test_a_file_that_is_no_configuration_is_refused(folder):
    (folder / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 4}}')
    with pytest.raises(ConversionError, match="not a configuration of an open_clip model"):
        convert_from_open_clip(str(folder))
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ConversionError, match="has no open_clip_config.json"):
        convert_from_open_clip(str(folder))


LIKE_OPEN_CLIP = {"pooling_type": "cls", "patch_embedding_bias": False, "position_embedding_type": "learned"}
VARIANTS = {
    "clip": ({"causal": True, "pooling_type": "argmax"}, {"use_pre_layernorm": True}),
    "quick_gelu": (
        {"causal": True, "pooling_type": "eos", "eos_token_id": 7, "hidden_act": "quick_gelu"},
        {"use_pre_layernorm": True, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    ),
    # CLIPA's way: bidirectional text over its padding, tanh-GELU, fixed positions, no norm before the blocks.
    "clipa": (
        {"attend_to_padding": True, "pooling_type": "first"},
        {"position_embedding_type": "sincos2d", "hidden_act": "gelu"},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_installed_open_clip_computes_the_same(variant, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    text, vision = VARIANTS[variant]
    flip = randomize(
        FlipModel(tiny_config(text={**text, "intermediate_size": 64}, vision={**LIKE_OPEN_CLIP, **vision}))
    ).eval()
    state_dict, model_cfg = flip_to_open_clip(flip)
    theirs = open_clip.CLIP(**model_cfg).eval()
    theirs.load_state_dict(state_dict)
    images = torch.randn(3, 3, 32, 32)
    ids = torch.randint(8, 600, (3, 16))
    ids[:, 9:] = 0
    ids[:, 8] = 7 if variant == "quick_gelu" else 599
    with torch.no_grad():
        for ours, expected in (
            (flip.get_image_features(images).pooler_output, theirs.encode_image(images)),
            (flip.get_text_features(ids[:, :9] if variant == "clipa" else ids).pooler_output, theirs.encode_text(ids)),
        ):
            assert (ours - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    again = open_clip_to_flip(theirs.state_dict(), model_cfg)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), flip.state_dict().values(), strict=True))
    assert config_to_open_clip(again.config) == model_cfg
    save_file(state_dict, tmp_path / "weights.safetensors")
    assert load_file(tmp_path / "weights.safetensors").keys() == state_dict.keys()
