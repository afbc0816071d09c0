from pathlib import Path

import pytest

from flip_hf.training.arguments import option_names, parse_arguments, write_recipe
from flip_hf.training.optimization import is_decayed, make_optimizer, plan_phases
from flip_hf.training.setup import make_config
from tests.conftest import tiny_config

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"


def parse(*argv: str):
    return parse_arguments(list(argv), RECIPES, default_recipe="shapes")


def test_values_come_from_defaults_then_recipe_then_command_line(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "train_data: x\nbase_lr: 1e-5\nbatch_size: 512\nvision_config: {hidden_size: 96}\n"
    )
    arguments = parse(str(tmp_path / "r.yaml"), "--batch_size", "128")
    assert arguments.optimization.base_lr == 1e-5  # which YAML reads as text
    assert arguments.optimization.batch_size == 128
    assert arguments.optimization.weight_decay == 0.2
    assert make_config(arguments.model).vision_config.hidden_size == 96


def test_without_words_the_embedded_data_is_trained_on_and_with_data_the_papers_model():
    assert parse().data.train_data == ["shapes"] and parse("--seed", "3").data.train_data == ["shapes"]
    own = parse("--train_data", "my/shards")
    assert make_config(own.model).vision_config.hidden_size == 768 and own.optimization.batch_size == 65_536


def test_a_written_recipe_reproduces_the_run(tmp_path):
    arguments = parse("shapes", "--mask_ratio", "0.75", "--templates", "a {}.", "the {}", "--max_grad_norm", "1")
    write_recipe(arguments, tmp_path / "recipe.yaml")
    assert parse(str(tmp_path / "recipe.yaml")) == arguments


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_valid_and_the_papers(recipe):
    arguments = parse(recipe, *([] if recipe == "shapes" else ["--train_data", "x"]))
    config = make_config(arguments.model)
    assert arguments.model.mask_ratio == config.mask_ratio == 0.5
    if recipe == "shapes":
        return
    vision, text = config.vision_config, config.text_config
    width = {"b": 768, "l": 1024, "h": 1280}[recipe[4]]
    assert (vision.hidden_size, vision.patch_size) == (width, int(recipe[-2:]))
    assert config.projection_dim == {"b": 512, "l": 768, "h": 1024}[recipe[4]]
    assert vision.hidden_size // vision.num_attention_heads in (64, 80)
    assert text.hidden_size // text.num_attention_heads == 64
    masked, unmasked = plan_phases(arguments)
    assert masked.peak_lr == pytest.approx(1.024e-3) and unmasked.peak_lr == pytest.approx(1.024e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask_ratio", "1.5"], r"--mask_ratio .* in \[0, 1\), got 1.5"),
        (["--mask_ratio", "1"], r"--mask_ratio"),
        (["vit_b16"], "--train_data"),
        (["--crop_area", "0.9", "0.5"], "--crop_area"),
        (["--flip", "2"], "--flip is a probability"),
        (["--precision", "fp8"], "--precision is one of auto, fp32, bf16"),
        (["--batch_size", "1"], "no negatives"),
        (["--templates", "a cat"], r"no \{\} for the class name"),
        (["--vision_config", "hidden"], "--vision_config must be JSON"),
        (["--model_name_or_path", "x"], "not both"),
        (["--maskratio", "0.5"], "maskratio"),
    ],
)
def test_bad_values_are_refused_by_name(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_a_recipe_with_an_unknown_key_suggests_the_right_one(tmp_path):
    (tmp_path / "r.yaml").write_text("mask_ration: 0.5\n")
    with pytest.raises(ValueError, match="no option 'mask_ration'. Did you mean 'mask_ratio'"):
        parse(str(tmp_path / "r.yaml"))
    with pytest.raises(FileNotFoundError, match="one of: shapes, vit_b16"):
        parse("vit_b17")


def test_options_are_the_frozen_set():
    """Each option doubles the untested space: add one only in a commit that says why."""
    assert len(option_names()) == len(set(option_names())) == 53


def test_learning_rate_warms_up_in_samples_and_falls_as_a_cosine():
    phase = plan_phases(parse("vit_l16", "--train_data", "x"))[0]
    assert phase.learning_rate(0) == 0
    assert phase.learning_rate(25_600_000) == pytest.approx(phase.peak_lr / 2)
    assert phase.learning_rate(51_200_000) == pytest.approx(phase.peak_lr)
    middle = (51_200_000 + phase.end) // 2
    assert phase.learning_rate(middle) == pytest.approx(phase.peak_lr / 2)
    assert phase.learning_rate(phase.end) == pytest.approx(0, abs=1e-12)


def test_phases_follow_each_other():
    masked, unmasked = plan_phases(parse("--train_samples", "1000", "--unmasked_samples", "100"))
    assert (masked.end, unmasked.start, unmasked.end, unmasked.mask_ratio) == (1000, 1000, 1100, 0)
    assert [p.name for p in plan_phases(parse("--unmasked_samples", "0"))] == ["masked"]


def test_weight_decay_reaches_what_the_official_code_decays():
    from flip_hf import FlipModel

    model = FlipModel(tiny_config(vision={"use_pre_layernorm": True}))
    not_decayed = {name for name, _ in model.named_parameters() if not is_decayed(name)}
    assert {"logit_scale", "vision_model.embeddings.class_embedding"}.isdisjoint(not_decayed)
    for name in not_decayed:
        assert name.endswith(".bias") or "norm" in name or name == "text_model.embeddings.position_embedding.weight"
    optimizer = make_optimizer(model, parse("shapes", "--weight_decay", "0.3").optimization)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == len(list(model.parameters())) and sizes[1] == len(not_decayed)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
