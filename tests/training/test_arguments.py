import re
from pathlib import Path

import pytest

from flip_hf.training.models import make_config
from flip_hf.training.optimization import is_decayed, make_optimizer
from flip_hf.training.phases import plan_phases
from flip_hf.training.recipes import option_names, parse_arguments, write_recipe
from flip_hf.training.resizing import new_sizes
from tests.helpers.arguments import parse
from tests.helpers.models import tiny_config

RECIPES = Path(__file__).parents[2] / "flip_hf" / "recipes"


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
    arguments = parse("--train_data", "x", "--model_name_or_path", "y")
    write_recipe(arguments, tmp_path / "recipe.yaml")
    assert parse(str(tmp_path / "recipe.yaml")) == arguments


def names_data(recipe: str) -> bool:
    """Tells whether a recipe says what it trains on."""
    return recipe.endswith("shapes") or recipe.startswith(("scenes", "cifar"))


def of_recipe(recipe: str, folder: Path, monkeypatch):
    """A recipe's arguments, in a folder that has the model it starts from."""
    arguments = parse(recipe, *([] if names_data(recipe) else ["--train_data", "x"]))
    if arguments.model.model_name_or_path is not None:
        # It starts from the model that another recipe leaves.
        source = Path(arguments.model.model_name_or_path)
        make_config(parse(source.name, "--train_data", "x").model).save_pretrained(folder / source)
        monkeypatch.chdir(folder)
    return arguments


ALL_RECIPES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PAPERS_RECIPES = [recipe for recipe in ALL_RECIPES if not names_data(recipe)]


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_every_recipe_masks_as_its_name_says(recipe, tmp_path, monkeypatch):
    arguments = of_recipe(recipe, tmp_path, monkeypatch)
    config = make_config(arguments.model, arguments.objective)
    dropped = 0.75 if "mask75" in recipe or recipe.startswith(("mae", "cifar")) else 0.5
    assert arguments.model.mask_ratio == config.mask_ratio == dropped


@pytest.mark.parametrize("recipe", PAPERS_RECIPES)
def test_recipes_have_the_papers_towers(recipe, tmp_path, monkeypatch):
    arguments = of_recipe(recipe, tmp_path, monkeypatch)
    config = make_config(arguments.model, arguments.objective)
    size, patch_size = re.match(r"(?:vit|mae)_([blh])(\d+)", recipe).groups()
    vision = config.vision_config
    text = config.text_config
    assert vision.hidden_size == {"b": 768, "l": 1024, "h": 1280}[size]
    assert new_sizes(arguments.model, config) == {"image_size": 224, "patch_size": int(patch_size)}
    assert config.projection_dim == {"b": 512, "l": 768, "h": 1024}[size]
    assert vision.hidden_size // vision.num_attention_heads in (64, 80)
    assert text.hidden_size // text.num_attention_heads == (16 if recipe.startswith("mae") else 64)  # which is not used


@pytest.mark.parametrize("recipe", PAPERS_RECIPES)
def test_recipes_have_the_papers_rates_and_lengths(recipe, tmp_path, monkeypatch):
    phases = {phase.name: phase for phase in plan_phases(of_recipe(recipe, tmp_path, monkeypatch))}
    rates = {name: phase.curve.peak_lr for name, phase in phases.items()}
    samples = {name: phase.end - phase.start for name, phase in phases.items()}
    expected = {"masked": (1.024e-3, 12_800_000_000), "unmasked": (1.024e-5, 128_000_000)}
    if recipe.startswith("mae"):
        expected = {"masked": (2.4e-3, 800 * 1_281_167)}
    elif recipe == "vit_l14":
        del expected["masked"]
    elif recipe.endswith("_2x"):
        expected["masked"] = (0.512e-3, 25_600_000_000)
    elif "mask" in recipe:
        scale = 0.5 if "mask50" in recipe else 1
        expected = {"masked": (scale * 1.024e-3, 2_560_000_000), "unmasked": (scale * 1.024e-5, 128_000_000)}
    if "text50" in recipe:
        assert phases["masked"].text_mask_ratio == 0.5
        del expected["unmasked"]
    assert rates == pytest.approx({name: rate for name, (rate, _) in expected.items()})
    assert samples == {name: number for name, (_, number) in expected.items()}


@pytest.mark.parametrize("recipe", [recipe for recipe in PAPERS_RECIPES if recipe.startswith("mae")])
def test_maes_recipes_are_maes(recipe):
    arguments = parse(recipe, "--train_data", "x")
    phases = {phase.name: phase for phase in plan_phases(arguments)}
    assert phases["masked"].curve.warmup_samples == 40 * 1_281_167 and arguments.objective.objective == "reconstruction"
    assert arguments.optimization.weight_decay == 0.05 and arguments.data.crop_area == [0.2, 1.0]


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
        (["--templates", "a cat"], r"no \{\} for the label"),
        (["--vision_config", "hidden"], "--vision_config must be JSON"),
        (["--model_name_or_path", "x"], "not both"),
        (["--train_data", "x", "--init_vision_from", "x", "--model_name_or_path", "y"], "Give one of them"),
        (["--objective", "mae"], "--objective is one of contrastive, reconstruction, both, got 'mae'"),
        (
            ["--objective", "both"],
            "Set --unmasked_samples 0, and tune the result afterwards: --model_name_or_path runs/shapes",
        ),
        (["--objective", "both", "--unmasked_samples", "0", "--mask_ratio", "0"], "give a --mask_ratio"),
        (["--objective", "both", "--unmasked_samples", "0", "--mask_ratio_end", "0"], "give a --mask_ratio"),
        (["--objective", "reconstruction", "--mask_strategy", "resize"], "other than resize"),
        (["--reconstruction_weight", "0"], "--reconstruction_weight must be above 0"),
        (["--decoder_config", "8"], "--decoder_config must be a JSON object"),
        (["--maskratio", "0.5"], "maskratio"),
        (
            ["--mask_strategy", "blocks"],
            "--mask_strategy is one of random, block, grid, gaussian, edges, resize, got 'blocks'",
        ),
        (["--text_mask_strategy", "syntax"], "--text_mask_strategy is one of random, prioritized"),
        (["--mask_ratio_schedule", "step"], "--mask_ratio_schedule is one of linear, cosine"),
        (["--mask_ratio_end", "1"], r"--mask_ratio_end is a fraction dropped, in \[0, 1\), got 1"),
        (["--text_mask_ratio", "-1"], "--text_mask_ratio is a fraction"),
        (["--mask_edge_strength", "5"], "--mask_edge_strength must be between 0 and 4, got 5"),
        (["--mask_edge_strength", "2"], "need --mask_strategy edges; give that too"),
        (["--mask_edge_strength_end", "0"], "need --mask_strategy edges; give that too"),
        (["--mask_ratio_steps", "1"], "--mask_ratio_steps must be between 2 and 32"),
        (["--patch_size", "16"], "--patch_size changes the model of --model_name_or_path"),
        (["--image_size", "0"], "--image_size counts pixels"),
    ],
)
def test_bad_values_are_refused_by_name(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_a_recipe_with_an_unknown_key_suggests_the_right_one(tmp_path):
    (tmp_path / "r.yaml").write_text("mask_ration: 0.5\n")
    with pytest.raises(ValueError, match="no option 'mask_ration'. Did you mean 'mask_ratio'"):
        parse(str(tmp_path / "r.yaml"))
    with pytest.raises(
        FileNotFoundError, match="one of: cifar10, mae_b16, mae_l16, mae_shapes, scenes, scenes_s16, shapes, vit_b16"
    ):
        parse("vit_b17")


def test_the_guides_own_recipe_is_found_its_base_wherever_it_lies(tmp_path, monkeypatch):
    (printed,) = re.findall(
        r"```yaml\n(base: vit_b16\n.*?)```", (RECIPES.parents[1] / "docs" / "pretraining.md").read_text(), re.DOTALL
    )
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "mine.yaml").write_text(printed)
    monkeypatch.chdir(tmp_path)
    for name in ("my/mine.yaml", str(tmp_path / "my" / "mine.yaml")):
        arguments = parse(name)
        assert arguments.optimization.batch_size == 4096 and arguments.data.tokenizer == "google-bert/bert-base-uncased"
    (tmp_path / "my" / "again.yaml").write_text("base: mine.yaml\nseed: 3\n")
    assert parse("my/again.yaml").run.output_dir == "runs/mine"
    # One beside it comes before the package's.
    (tmp_path / "my" / "vit_b16.yaml").write_text("seed: 7\n")
    assert parse("my/mine.yaml").run.seed == 7
    (tmp_path / "my" / "mine.yaml").write_text("base: vit_b61\ntrain_data: x\n")
    with pytest.raises(
        FileNotFoundError, match="no recipe 'vit_b61' in my or .*flip_hf/recipes. Did you mean 'vit_b16'"
    ):
        parse("my/mine.yaml")


def test_a_recipe_builds_on_its_base_and_overrides_it(tmp_path):
    (tmp_path / "first.yaml").write_text("train_data: x\nbatch_size: 512\nbase_lr: 1e-5\n")
    (tmp_path / "second.yaml").write_text("base: first\nbatch_size: 256\ncrop_area: [0.4, 1.0]\n")
    (tmp_path / "third.yaml").write_text("base: second\ncrop_area: [0.3, 0.9]\n")
    arguments = parse_arguments(["third"], tmp_path, default_recipe="third")
    assert (arguments.data.train_data, arguments.data.crop_area) == (["x"], [0.3, 0.9])
    assert (arguments.optimization.batch_size, arguments.optimization.base_lr) == (256, 1e-5)
    (tmp_path / "first.yaml").write_text("base: third\n")
    with pytest.raises(ValueError, match="third.yaml has itself as its base"):
        parse_arguments(["third"], tmp_path, default_recipe="third")
    (tmp_path / "first.yaml").write_text("base: zeroth\n")
    with pytest.raises(FileNotFoundError, match="no recipe 'zeroth'"):
        parse_arguments(["third"], tmp_path, default_recipe="third")


def test_options_are_the_frozen_set():
    """Each option doubles the untested space: add one only in a commit that says why."""
    assert len(option_names()) == len(set(option_names())) == 104


def test_learning_rate_warms_up_in_samples_and_falls_as_a_cosine():
    curve = plan_phases(parse("vit_l16", "--train_data", "x"))[0].curve
    assert curve.at(0) == 0
    assert curve.at(25_600_000) == pytest.approx(curve.peak_lr / 2)
    assert curve.at(51_200_000) == pytest.approx(curve.peak_lr)
    middle = (51_200_000 + curve.end) // 2
    assert curve.at(middle) == pytest.approx(curve.peak_lr / 2)
    assert curve.at(curve.end) == pytest.approx(0, abs=1e-12)


def test_phases_follow_each_other():
    masked, unmasked = plan_phases(parse("--train_samples", "1000", "--unmasked_samples", "100"))
    assert (masked.end, unmasked.start, unmasked.end, unmasked.mask_ratio) == (1000, 1000, 1100, 0)
    assert [p.name for p in plan_phases(parse("--unmasked_samples", "0"))] == ["masked"]


def test_mask_ratios_go_from_one_end_to_the_other_in_a_few_steps():
    argv = ["--train_samples", "1000", "--mask_ratio", "0.75", "--mask_ratio_end", "0.25"]
    masked, unmasked = plan_phases(parse(*argv, "--unmasked_samples", "100", "--mask_ratio_steps", "3"))
    assert masked.mask_ratios == (0.75, 0.5, 0.25) and unmasked.mask_ratios == (0,)
    ratios = [masked.mask_ratio_at(samples) for samples in (0, 333, 334, 666, 667, 999, 1000)]
    assert ratios == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25] and unmasked.mask_ratio_at(1050) == 0
    cosine = plan_phases(parse(*argv, "--mask_ratio_schedule", "cosine", "--mask_ratio_steps", "5"))[0].mask_ratios
    assert (cosine[0], cosine[2], cosine[4]) == pytest.approx((0.75, 0.5, 0.25))
    assert 0.7 > cosine[1] > 0.625 and 0.375 > cosine[3] > 0.3  # slow at both ends
    assert plan_phases(parse("--mask_ratio", "0.5"))[0].mask_ratios == (0.5,)


def test_the_strength_of_edges_changes_with_every_sample_of_the_masked_phase():
    argv = ["--train_samples", "1000", "--unmasked_samples", "100", "--mask_strategy", "edges"]
    masked, unmasked = plan_phases(parse(*argv, "--mask_edge_strength", "2", "--mask_edge_strength_end", "0.5"))
    assert [masked.edge_strength_at(samples) for samples in (0, 1, 500, 1000)] == pytest.approx([2, 1.9985, 1.25, 0.5])
    assert masked.edge_strength_at(5000) == 0.5  # a worker reads ahead
    assert masked.masks_in_words() == "mask ratio 0.5, edge strength 2 to 0.5"
    assert unmasked.masks_in_words() == "mask ratio 0"
    assert plan_phases(parse(*argv))[0].masks_in_words() == "mask ratio 0.5, edge strength 0.5"
    assert plan_phases(parse())[0].edge_strengths == (0, 0)


def test_weight_decay_reaches_the_official_codes_parameters():
    from flip_hf import FlipModel

    model = FlipModel(tiny_config(vision={"use_pre_layernorm": True}, logit_bias_init_value=-10))
    not_decayed = {name for name, _ in model.named_parameters() if not is_decayed(name)}
    assert {"logit_scale", "vision_model.embeddings.class_embedding"}.isdisjoint(not_decayed)
    assert "logit_bias" in not_decayed
    for name in not_decayed - {"logit_bias"}:
        assert name.endswith(".bias") or "norm" in name or name == "text_model.embeddings.position_embedding.weight"
    optimizer = make_optimizer(model, parse("shapes", "--optimizer", "adamw", "--weight_decay", "0.3").optimization)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == len(list(model.parameters())) and sizes[1] == len(not_decayed)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize(("warmup", "reached"), [(1023, True), (1024, False)])
def test_a_warm_up_that_takes_the_whole_run_is_said(warmup, reached):
    words = ["shapes", "--train_samples", "1024", "--unmasked_samples", "0", "--warmup_samples", str(warmup)]
    (phase,) = plan_phases(parse_arguments(words, RECIPES, "shapes"))
    assert (", so never: give fewer --warmup_samples" in phase.in_words()) != reached
