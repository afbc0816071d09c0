"""The comparison of ways to fine-tune: its plan, real tiny runs of every kind, and its report."""

import json
import shutil
from pathlib import Path

import pytest

from flip_hf.commands.reproduce import main
from flip_hf.reproduction.choices import BASE, BETWEEN, CHOICES, TunedData, choices_table, finetuning_runs, rows
from flip_hf.reproduction.plan import Experiment, Scale, words_of
from flip_hf.reproduction.running import Point, Points
from flip_hf.training.recipes import RECIPES, parse_arguments
from tests.helpers.labelled import labelled_pictures
from tests.helpers.programs import ROOT

SCALE = Scale.of_recipe("cifar10", 40 * 128)
DATA = TunedData(("one.parquet", "two.parquet"), "test.parquet", "other.parquet")
RUNS = {run.name: run for run in finetuning_runs(SCALE, DATA)}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MADE = (BASE, "whole", "mask50", "mask50-alpha50")


def test_every_choice_is_one_that_the_trainer_takes_and_starts_from_the_base():
    start = ["--model_name_or_path", "x", "--vision_config", "", "--text_config", ""]
    for choice in CHOICES:
        run = RUNS[choice.name]
        arguments = parse_arguments(["cifar10", *start, *words_of(run.options)], RECIPES, "cifar10")
        options = arguments.optimization
        assert run.start == BASE and arguments.data.train_data == ["one.parquet", "two.parquet"]
        assert options.train_samples + options.unmasked_samples == 40 * 128
        assert arguments.retention.retain_data == "other.parquet" and options.optimizer == "adamw"
    assert {RUNS[name].start for name in BETWEEN} == {"mask50"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Points of a base, two choices and an interpolation, of a tiny model and 96 pictures."""
    folder = tmp_path_factory.mktemp("choices")
    for name, count in (("train", 96), ("test", 30), ("other", 30)):
        labelled_pictures(count).rename_column("fine_label", "label").to_parquet(str(folder / f"{name}.parquet"))
    train, test, other = (str(folder / f"{name}.parquet") for name in ("train", "test", "other"))
    runs = {run.name: run for run in finetuning_runs(Scale.of_recipe("cifar10", 256), TunedData((train,), test, other))}
    tiny = ["--vision_config", json.dumps({**TOWER, "image_size": 32, "patch_size": 8}), "--report_to", "none"]
    tiny += ["--text_config", json.dumps(TOWER), "--train_data", train, "--eval_data", other]
    points = Points(folder / "made", "cifar10", tiny)
    for name in MADE:
        points.make(runs[name], seed=0)
    return points.folder


def test_runs_of_every_kind_make_points_with_what_is_retained(made):
    found = {point.name: point for point in Points(made, "cifar10").read()}
    assert set(found) == set(MADE)
    assert found["whole"].before == found["mask50"].before
    assert found["whole"].before[1] == pytest.approx(found[BASE].top1, abs=1e-6)  # the base's own data are retained
    between = found["mask50-alpha50"]
    assert between.start == "mask50" and 0 <= between.retained <= 1 and between.seconds == 0


def test_the_report_is_made_of_the_points_alone(made, capsys):
    plan = {"recipe": "cifar10", "budget": 1, "samples": 256, "set": "finetuning", "data": ["--tune_data", "x"]}
    (made / "plan.json").write_text(json.dumps(plan))
    main(["--set", "finetuning", "--figures_only", "--folder", str(made)])
    assert "| whole images | " in capsys.readouterr().out
    report = (made / "README.md").read_text()
    assert "The base sees 4 times 256 pairs" in report and "50 % masked, then 50% of the way to it" in report
    assert (made / "choices.png").stat().st_size > 5000


def point(name: str, seed: int, seconds: float, top1: float, retained: float) -> Point:
    return Point(name, seed, 100, seconds, top1, {}, BASE, retained=retained, before=(0.25, 0.5))


def test_the_table_holds_both_accuracies_and_the_time_relative_to_whole_images():
    points = [point("whole", seed, 20, 0.6, 0.3 + seed / 100) for seed in (0, 1)]
    points += [point("mask50", seed, 10, 0.7, 0.4) for seed in (0, 1)]
    table = choices_table(points)
    assert "| the base | 25.0 ± 0.0 | 50.0 ± 0.0 | - | - |" in table
    assert "| whole images | 60.0 ± 0.0 | 30.5 ± 0.7 | 20.0 ± 0.0 | 1.00 |" in table
    assert "| 50 % masked | 70.0 ± 0.0 | 40.0 ± 0.0 | 10.0 ± 0.0 | 0.50 |" in table
    assert [row.words for row in rows(points)] == ["the base", "whole images", "50 % masked"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "finetuning"], "--set finetuning needs --tune_data and --tune_eval_data"),
        (["--set", "finetuning", "--tune_data", "x"], "--set finetuning needs --tune_data and --tune_eval_data"),
        (["--tune_data", "x"], "--tune_data is for --set finetuning; leave it out."),
    ],
)
def test_data_to_fine_tune_on_are_for_the_set_that_does_so(capsys, words, said):
    with pytest.raises(SystemExit):
        main(words)
    assert said in capsys.readouterr().err


def test_the_published_table_is_made_of_the_published_points(tmp_path):
    published = ROOT / "scripts" / "results" / "reproduce_finetuning"
    shutil.copytree(published, tmp_path / "made", ignore=shutil.ignore_patterns("*.png", "README.md"))
    main(["--set", "finetuning", "--figures_only", "--folder", str(tmp_path / "made")])
    assert (tmp_path / "made" / "README.md").read_text() == (published / "README.md").read_text()
    assert (tmp_path / "made" / "choices.png").is_file() and (published / "choices.png").is_file()


def test_data_that_cannot_be_tuned_on_are_named_before_the_base_is_trained(made, tmp_path):
    other = str(made.parent / "other.parquet")
    words = ["--set", "finetuning", "--eval_data", other, "--folder", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match="mispelt.parquet"):
        main([*words, "--tune_data", str(tmp_path / "mispelt.parquet"), "--tune_eval_data", other])
    labelled_pictures(6).to_parquet(str(tmp_path / "unusual.parquet"))
    with pytest.raises(SystemExit, match="has no .*column.*fine_label"):
        main([*words, "--tune_data", str(tmp_path / "unusual.parquet"), "--tune_eval_data", other])
    with pytest.raises(SystemExit, match="the recipe scenes names no labelled test data"):
        main(["--set", "finetuning", "--recipe", "scenes", "--tune_data", other, "--tune_eval_data", other])
    assert not (tmp_path / "none" / "logs").exists()


def test_several_values_are_several_words():
    assert words_of({"lora": ("image:8", "text:8"), "seed": 1}) == ["--lora", "image:8", "text:8", "--seed", "1"]
    assert Experiment("x", {"alpha": 0.5}, kind="interpolation").cost == 0
