"""Interpolation between two models: the numbers, what is kept to the bit, and what is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

from flip_hf import FlipForPreTraining, FlipModel, FlipPreTrainingConfig
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.interpolation import interpolate, load_ends
from tests.helpers.clip_folder import make_clip_folder
from tests.helpers.models import DECODER, randomize, tiny_config


def write(folder, model, processor) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def two(model, processor, tmp_path) -> tuple[str, str]:
    """Two FLIP folders; their text towers are the same."""
    first = write(tmp_path / "a", model, processor)
    for part in (model.vision_model, model.visual_projection):
        randomize(part)
    return first, write(tmp_path / "b", model, processor)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


def same_bits(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def test_the_ends_keep_their_bits_and_a_quarter_is_a_quarter(two, tmp_path):
    a, b = map(weights_of, two)
    for folder, tensors, value in ((two[0], a, -0.0), (two[1], b, 1.0)):  # a sum of -0 and 0 times 1 would be 0
        tensors["vision_model.post_layernorm.bias"][0] = value
        save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
    ends = load_ends(*two)
    made = {}
    for alpha in (0, 1, 0.25):
        ends.converted(alpha).save(tmp_path / str(alpha))
        made[alpha] = weights_of(tmp_path / str(alpha))
    assert same_bits(made[0], a) and same_bits(made[1], b)
    for name, value in made[0.25].items():
        expected = 0.75 * a[name].double() + 0.25 * b[name].double()
        assert (value - expected).abs().max() < 1e-6, name
        assert not name.startswith("text_") or torch.equal(value, a[name])
    assert not torch.equal(made[0.25]["visual_projection.weight"], a["visual_projection.weight"])


def test_low_precisions_are_mixed_in_float32():
    first = {"x": torch.tensor([1.0, -3.0], dtype=torch.bfloat16), "n": torch.tensor([3])}
    second = {"x": torch.tensor([1.0078125, 5.0], dtype=torch.bfloat16), "n": torch.tensor([3])}
    mixed = interpolate(first, second, 0.75)
    expected = 0.25 * first["x"].double() + 0.75 * second["x"].double()
    assert torch.equal(mixed["x"], expected.to(torch.bfloat16)) and mixed["n"] is second["n"]


def test_a_clip_and_what_it_was_tuned_to_make_a_flip(tmp_path):
    make_clip_folder(tmp_path / "clip")
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    processor = AutoTokenizer.from_pretrained(tmp_path / "clip")
    tuned = randomize(FlipModel.from_clip(clip, mask_ratio=0.25))
    tuned.config.text_config.attention_dropout = 0.1
    ends = load_ends(str(tmp_path / "clip"), write(tmp_path / "tuned", tuned, processor))
    assert type(ends.model) is FlipModel and ends.model.config.mask_ratio == 0.25
    theirs = FlipModel.from_clip(clip).state_dict()
    middle = ends.set_alpha(0.5).state_dict()
    for name, value in tuned.state_dict().items():
        assert torch.allclose(middle[name], (theirs[name] + value) / 2, atol=1e-7), name
    clips = load_ends(str(tmp_path / "clip"), str(tmp_path / "clip"))
    assert type(clips.model) is CLIPModel and type(clips.processor).__name__ == "CLIPProcessor"


def test_models_with_a_decoder_are_mixed_whole(processor, tmp_path):
    config = FlipPreTrainingConfig(flip_config=tiny_config(), decoder_config=DECODER)
    folders = [write(tmp_path / name, randomize(FlipForPreTraining(config)), processor) for name in "ab"]
    ends = load_ends(*folders)
    a, b = map(weights_of, folders)
    middle = ends.set_alpha(0.5).state_dict()
    name = "decoder.pixel_projection.weight"
    assert torch.allclose(middle[name], (a[name] + b[name]) / 2, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision": {"image_size": 64, "position_embedding_type": "learned"}},
            r"different shapes: vision_model.embeddings.position_embedding.weight is \(17, 32\) in .*a and \(65, 32\)",
        ),
        ({"vision": {"use_pre_layernorm": True}}, "different shapes: .*pre_layernorm.* is absent in .*a and "),
        ({"text": {"hidden_act": "gelu"}}, "different architectures: text_config.hidden_act is .* in .*a and 'gelu'"),
        ({"vision": {"num_attention_heads": 2}}, "different architectures: vision_config.num_attention_heads is 4 in"),
    ],
)
def test_models_of_other_architectures_are_refused(changes, message, processor, tmp_path):
    one = FlipModel(tiny_config(vision={"position_embedding_type": "learned"}, text={"hidden_act": "quick_gelu"}))
    text = {"hidden_act": "quick_gelu", **changes.get("text", {})}
    other = FlipModel(
        tiny_config(vision={"position_embedding_type": "learned", **changes.get("vision", {})}, text=text)
    )
    with pytest.raises(ConversionError, match=message):
        load_ends(write(tmp_path / "a", one, processor), write(tmp_path / "b", other, processor))


def test_models_of_another_kind_precision_or_none_are_refused(two, saved, tmp_path, processor, model):
    config = FlipPreTrainingConfig(flip_config=tiny_config(), decoder_config=DECODER)
    decoder = write(tmp_path / "decoder", FlipForPreTraining(config), processor)
    with pytest.raises(ConversionError, match="is a FlipModel and .* a FlipForPreTraining: only models of one class"):
        load_ends(two[0], decoder)
    half = write(tmp_path / "half", model.bfloat16(), processor)
    with pytest.raises(ConversionError, match="different precisions: .* is torch.float32 in .*a and torch.bfloat16 in"):
        load_ends(two[0], half)
    with pytest.raises(ConversionError, match="none is neither a folder nor a Hub repository"):
        load_ends(two[0], str(tmp_path / "none"))


def test_models_with_other_inputs_are_refused(two):
    path = f"{two[1]}/tokenizer.json"
    written = open(path).read()
    fields = json.loads(written)
    fields["normalizer"] = None  # capitals are then other tokens
    open(path, "w").write(json.dumps(fields))
    with pytest.raises(ConversionError, match="have different tokenizers"):
        load_ends(*two)
    open(path, "w").write(written)
    (settings,) = (name for name in ("processor_config.json", "preprocessor_config.json") if _has_mean(two[1], name))
    text = open(f"{two[1]}/{settings}").read()
    open(f"{two[1]}/{settings}", "w").write(text.replace("0.485", "0.5"))
    with pytest.raises(ConversionError, match="normalise images differently: image_mean is .*0.485.* and .*0.5"):
        load_ends(*two)


def test_a_model_without_a_tokenizer_is_refused_beside_one_that_has_it(two):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(f"{two[0]}/{name}")
    with pytest.raises(ConversionError, match="a has no tokenizer, so nothing tells"):
        load_ends(*two)


def _has_mean(folder: str, name: str) -> bool:
    try:
        return "0.485" in open(f"{folder}/{name}").read()
    except FileNotFoundError:
        return False
