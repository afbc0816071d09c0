"""open_clip's CLIPA and SigLIP to Flip and back: features recorded from open_clip 3.3, and the package if installed."""

import contextlib
import copy
import functools
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from flip_hf import FlipConfig, FlipModel
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.open_clip import (
    convert_from_open_clip,
    flip_to_open_clip,
    open_clip_to_flip,
    read_state_dict,
    write_open_clip,
)
from flip_hf.conversion.open_clip_config import config_from_open_clip, config_to_open_clip
from flip_hf.conversion.timm_siglip import NAMES, SIZES, TOWERS, Size
from tests.helpers.models import randomize, tiny_config, tiny_siglip

PATCH_MEAN = {"pooling_type": "patch_mean", "patch_embedding_bias": False, "position_embedding_type": "learned"}
LAST = {"pooling_type": "last", "attend_to_padding": True, "intermediate_size": 64}


def test_features_and_logits_are_open_clips(family):
    flip = open_clip_to_flip(family["state_dict"], family["model_cfg"])
    with torch.no_grad():
        outputs = flip(input_ids=family["input/input_ids"], pixel_values=family["input/pixel_values"])
        images = flip.get_image_features(family["input/pixel_values"]).pooler_output
        texts = flip.get_text_features(family["input/input_ids"]).pooler_output
    for name, ours in (
        ("image_features", images),
        ("text_features", texts),
        ("logits_per_image", outputs.logits_per_image),
    ):
        theirs = family[f"out/{name}"]
        assert (ours - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max()), name


def test_the_round_trip_is_bit_identical(family):
    again, model_cfg = flip_to_open_clip(open_clip_to_flip(family["state_dict"], family["model_cfg"]))
    assert again.keys() == family["state_dict"].keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in family["state_dict"].items())
    assert config_from_open_clip(model_cfg).to_dict() == config_from_open_clip(family["model_cfg"]).to_dict()
    kept = family["model_cfg"].keys() - {"vision_cfg", "text_cfg"}
    assert {name: model_cfg[name] for name in kept} == {name: family["model_cfg"][name] for name in kept}


def test_folders_go_there_and_back(family, tmp_path):
    source = tmp_path / "open_clip"
    source.mkdir()
    config = {"model_cfg": family["model_cfg"], "preprocess_cfg": {"mean": [0.5] * 3, "resize_mode": "squash"}}
    (source / "open_clip_config.json").write_text(json.dumps(config))
    save_file(family["state_dict"], source / "open_clip_model.safetensors")
    convert_from_open_clip(str(source)).save(tmp_path / "flip")
    (tmp_path / "again").mkdir()
    write_open_clip(str(tmp_path / "flip"), tmp_path / "again")
    again = load_file(tmp_path / "again" / "open_clip_model.safetensors")
    assert again.keys() == family["state_dict"].keys()
    assert all(torch.equal(tensor, family["state_dict"][name]) for name, tensor in again.items())
    written = json.loads((tmp_path / "again" / "open_clip_config.json").read_text())
    assert written["preprocess_cfg"]["mean"] == [0.5] * 3 and written["preprocess_cfg"]["resize_mode"] == "squash"
    plain = read_state_dict(source / "open_clip_model.safetensors")
    assert not any(name.startswith("text.") for name in plain)


@pytest.mark.parametrize("family", ["siglip"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_224"}}, "'vit_base_patch16_224', which FLIP does not"),
        ({"vision_cfg": {"timm_model_name": 7}}, "timm_model_name = 7, which FLIP does not"),
        ({"vision_cfg": {"timm_pool": "avg"}}, "timm_pool = 'avg', which FLIP does not support.*'map' alone"),
        ({"vision_cfg": {"timm_proj": "linear"}}, "timm_proj = 'linear', which FLIP does not support.*'none' alone"),
        (
            {"vision_cfg": {"image_size": 384}},
            "image_size = 384, but vit_so400m_patch16_siglip_256 takes .* of 256 pixels",
        ),
        ({"embed_dim": 20}, "embed_dim = 20, but vit_so400m_patch16_siglip_256 has no projection: .* have 16 numbers"),
        ({"text_cfg": {"proj_type": "none"}}, "text_cfg.proj_type = 'none', which FLIP does not support"),
        ({"text_cfg": {"no_causal_mask": False}}, "text_cfg.pool_type = 'last' with causal attention"),
        ({"text_cfg": {"proj_bias": "yes"}}, "text_cfg.proj_bias must be true or false"),
        ({"init_logit_bias": [-10]}, "logit_bias_init_value must be a number"),
    ],
)
def test_what_siglip_does_not_have_is_refused_by_name(family, changes, message):
    model_cfg = copy.deepcopy(family["model_cfg"])
    for name, value in changes.items():
        model_cfg[name] = {**model_cfg[name], **value} if isinstance(value, dict) else value
    with pytest.raises(ConversionError, match=message):
        config_from_open_clip(model_cfg)


@pytest.mark.parametrize("family", ["siglip"], indirect=True)
def test_an_incomplete_pooling_is_refused_by_name(family):
    source = dict(family["state_dict"])
    query = source.pop("visual.trunk.attn_pool.q.weight")
    pattern = r"Missing: 1 \(visual.trunk.attn_pool.in_proj_weight\). Left over: 1 \(visual.trunk.attn_pool.kv.weight\)"
    with pytest.raises(ConversionError, match=pattern):
        open_clip_to_flip(source, family["model_cfg"])
    source["visual.trunk.attn_pool.q.weight"] = torch.cat([query, query])
    source["visual.trunk.attn_pool.kv.weight"] = query
    with pytest.raises(ConversionError, match="Left over: 2"):
        open_clip_to_flip(source, family["model_cfg"])


def test_the_configuration_of_every_tower_goes_there_and_back():
    for name, (size, patch_size, image_size) in NAMES.items():
        vision_cfg = {"timm_model_name": name, "image_size": image_size, "timm_pool": "map", "timm_proj": "none"}
        text_cfg = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        config = config_from_open_clip(
            {"embed_dim": SIZES[size].hidden_size, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
        )
        assert config.vision_config.num_positions == (image_size // patch_size) ** 2, name
        written = config_to_open_clip(config)
        assert written["vision_cfg"] == vision_cfg and written["text_cfg"]["proj_bias"]
        assert config_from_open_clip(written).to_dict() == config.to_dict()


def test_sizes_and_activations_that_timm_has_not_are_refused(monkeypatch):
    flip = FlipModel.from_siglip(tiny_siglip(image_size=256))
    with pytest.raises(ConversionError, match="the sizes must be those of one of timm's towers"):
        flip_to_open_clip(flip)
    monkeypatch.setitem(SIZES, "base", Size(64, 3, 4, 96))
    with pytest.raises(ConversionError, match="hidden_act must be 'gelu', as in vit_base_patch16_siglip_256"):
        flip_to_open_clip(flip)
    flip.config.vision_config.layer_norm_eps = 1e-5
    with pytest.raises(ConversionError, match="in vision_config, layer_norm_eps must be 1e-06; hidden_act"):
        flip_to_open_clip(flip)


def test_a_siglip_of_transformers_goes_through_open_clip_and_back(monkeypatch):
    monkeypatch.setitem(SIZES, "so400m", Size(64, 3, 4, 96))
    siglip = tiny_siglip(image_size=256)
    state_dict, model_cfg = flip_to_open_clip(FlipModel.from_siglip(siglip))
    assert model_cfg["vision_cfg"]["timm_model_name"] == "vit_so400m_patch16_siglip_256"
    again = open_clip_to_flip(state_dict, model_cfg).to_siglip().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in siglip.state_dict().items())


def test_a_mean_before_the_last_norm_and_options_of_siglip_are_refused(open_clip_tiny):
    model_cfg = copy.deepcopy(open_clip_tiny["model_cfg"])
    model_cfg["vision_cfg"]["pool_type"] = "avg"
    with pytest.raises(ConversionError, match="pool_type = 'avg' and final_ln_after_pool = False, which FLIP lacks"):
        config_from_open_clip(model_cfg)
    flip = FlipModel(tiny_config(vision={**PATCH_MEAN, "use_class_token": False}, text=LAST, projection_bias=True))
    with pytest.raises(ConversionError, match="use_class_token must be True; projection_bias must be False"):
        config_to_open_clip(flip.config)


# -- the installed package --------------------------------------------------------------------------------------------


def test_the_table_of_towers_is_timms():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    models = [name for name in timm.list_models("vit_*_siglip_*") if "gap" not in name]
    assert set(models) == set(NAMES)
    for name, tower in NAMES.items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0, global_pool="map")
        block = model.blocks[0]
        found = Size(model.embed_dim, len(model.blocks), block.attn.num_heads, block.mlp.fc1.out_features)
        assert found == SIZES[tower[0]], name
        assert (*model.patch_embed.patch_size, *model.patch_embed.img_size) == (tower[1], tower[1], tower[2], tower[2])
        activations = {type(mlp.act).__name__ for mlp in (block.mlp, model.attn_pool.mlp)}
        assert activations == {"GELU" if TOWERS[tower] == "gelu" else "GELUTanh"}, name
        assert {model.norm.eps, block.norm1.eps, model.attn_pool.norm.eps} == {1e-6}


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP-384", "ViT-B-16-SigLIP-i18n-256", "ViT-gopt-16-SigLIP2-256"]
)
def test_the_installed_siglip_computes_the_same(name, monkeypatch):
    """With open_clip's own configuration, but narrow towers of two blocks."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model_cfg = open_clip.get_model_config(name)
    model_cfg["text_cfg"].update(width=24, layers=2, heads=4, vocab_size=90, context_length=10)
    model_cfg["embed_dim"] = 32
    size = NAMES[model_cfg["vision_cfg"]["timm_model_name"]][0]
    monkeypatch.setitem(SIZES, size, Size(32, 2, 4, 119 if size == "so400m" else 128))
    narrow = functools.partial(timm.create_model, embed_dim=32, depth=2, num_heads=4)
    monkeypatch.setattr(timm, "create_model", narrow)
    theirs = open_clip.CustomTextCLIP(**{k: v for k, v in model_cfg.items() if k != "custom_text"})
    _check_equal(randomize(theirs).eval(), model_cfg, 90)


@pytest.mark.parametrize("name", ["ViT-L-14-CLIPA", "ViT-H-14-CLIPA-336"])
def test_the_installed_clipa_computes_the_same(name):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    model_cfg = open_clip.get_model_config(name)
    model_cfg["text_cfg"].update(width=24, layers=2, heads=4, vocab_size=90, context_length=10)
    model_cfg["vision_cfg"].update(width=32, layers=2, head_width=8, image_size=56)
    _check_equal(randomize(open_clip.CLIP(**model_cfg)).eval(), model_cfg, 90)


def _check_equal(theirs, model_cfg, vocab_size) -> None:
    """Checks features and logits against a model of open_clip, and that its weights come back."""
    flip = open_clip_to_flip(theirs.state_dict(), model_cfg)
    side = model_cfg["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, side, side)
    ids = torch.randint(0, vocab_size, (3, 10))
    with torch.no_grad():
        for ours, expected in (
            (flip.get_image_features(images).pooler_output, theirs.encode_image(images)),
            (flip.get_text_features(ids).pooler_output, theirs.encode_text(ids)),
            (flip(input_ids=ids, pixel_values=images).logits_per_image, theirs.get_logits(images, ids)[0]),
        ):
            assert (ours - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    again, written = flip_to_open_clip(flip)
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in theirs.state_dict().items())
    assert config_from_open_clip(written).to_dict() == config_from_open_clip(model_cfg).to_dict()


def test_open_clips_architectures_that_convert_are_those_of_the_guide():
    """By their configurations alone; docs/converting.md has the numbers."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    converts = _converting(open_clip)
    siglip = {name for name in open_clip.list_models() if re.fullmatch(r"ViT-.*-(SigLIP|CLIPA).*", name)}
    assert siglip - converts.keys() == {"ViT-SO400M-16-SigLIP-i18n-256"}  # which has no text projection
    weights = [architecture for architecture, _ in open_clip.list_pretrained()]
    assert len(open_clip.list_models()) == 144 and len(weights) == 196
    assert len(converts) == 69 and sum(name in converts for name in weights) == 117


@pytest.mark.long
def test_all_of_these_have_open_clips_names_and_shapes_at_full_size():
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    for name, config in _converting(open_clip).items():
        model_cfg = open_clip.get_model_config(name)
        model_class = open_clip.CustomTextCLIP if model_cfg.pop("custom_text", False) else open_clip.CLIP
        with torch.device("meta"):
            theirs = model_class(**model_cfg).state_dict()
            ours, _ = flip_to_open_clip(FlipModel._from_config(config))
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}, name


def _converting(open_clip) -> dict[str, FlipConfig]:
    """The configurations of open_clip's architectures that convert, by name."""
    converts = {}
    for name in open_clip.list_models():
        with contextlib.suppress(ConversionError):
            converts[name] = config_from_open_clip(open_clip.get_model_config(name))
    return converts
