"""The card: what it says is what the run's files say."""

import json

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from flip_hf.conversion.folder import card_data
from flip_hf.conversion.lineage import base_model_of
from flip_hf.evaluation.model_index import write_eval_results
from flip_hf.hub.carbon import Compute
from flip_hf.hub.card import write_card


def card_of(folder, **options):
    write_card(folder, **options)
    return ModelCard.load(folder / "README.md")


def test_the_card_describes_the_run(run_folder):
    card = card_of(run_folder, repo_id="you/flip-tiny", license="cc-by-4.0")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "zero-shot-image-classification"
    assert data["license"] == "cc-by-4.0" and data["datasets"] == ["user/pairs"]
    for said in (
        "# flip-tiny",
        "50% of the patches",
        "| blocks x width | 2 x 32, 4 heads | 2 x 32, 4 heads |",
        "- `shapes`, drawn by flip_hf itself: coloured shapes with captions: 4,000 pairs seen\n",
        "(https://huggingface.co/datasets/user/pairs): 608 pairs seen; skipped: 3 x the image is truncated",
        "| pairs seen | 4,608, 64 per step",
        "peak learning rate 0.001,",
        "| tuned on whole images | 512 pairs, peak learning rate 0.0003 |",
        "| steps skipped | 2,",
        "(training_curves.png)",
        "2.0 hours of training on 4 x NVIDIA A100-SXM4-80GB, 1 pairs/s",
        "| shapes | test | zero-shot | top1 | 43.8 |",
        "Weights: `cc-by-4.0`.",
    ):
        assert said in card.text, said


def test_figures_are_a_model_index_and_those_of_evaluate_are_kept(run_folder):
    measured = {
        **{"data_set": "cifar10", "title": "CIFAR-10", "task": "zero-shot", "metric": "top1"},
        **{"metrics": {"top1": 0.5, "log_loss": 0.1}, "samples": 100, "refused": {}, "details": {}},
    }
    own = {**measured, "data_set": "mine", "title": "Mine", "metrics": {"top1": 0.25}}
    (run_folder / "evaluation").mkdir()
    (run_folder / "evaluation" / "results.json").write_text(json.dumps({"results": [measured, own]}))
    by_hand = EvalResult("image-classification", "x/y", "Y", "top1", 60.0, metric_name="linear-probe, top1")
    write_eval_results(run_folder, [by_hand])  # evaluate.py --card
    for _ in range(2):  # written again, nothing is lost and nothing comes twice
        card = card_of(run_folder, repo_id="you/flip")
        found = {(e.dataset_name, e.metric_type): (e.metric_value, e.dataset_type) for e in card.data.eval_results}
        assert found == {
            ("Y", "top1"): (60.0, "x/y"),
            ("CIFAR-10", "top1"): (50.0, "uoft-cs/cifar10"),
            ("Mine", "top1"): (25.0, "mine"),
            ("shapes", "top1"): (43.75, "shapes"),
            ("shapes", "top5"): (87.5, "shapes"),
        }
        assert len(card.data.eval_results) == 5 and card.text.count("| CIFAR-10 |") == 1


def test_each_result_keeps_its_own_task_when_the_card_is_written_again(run_folder):
    """A model-index has one name for the tasks of a type."""
    for task, metric, value in (("few-shot", "16-shot", 40.0), ("linear-probe", "top1", 60.0)):
        name = f"{task}, {metric}"
        entry = EvalResult("image-classification", "x/y", "Y", metric, value, task_name=task, metric_name=name)
        write_eval_results(run_folder, [entry])
    for _ in range(2):
        card = card_of(run_folder, repo_id="you/flip")
        assert "| Y |  | few-shot | 16-shot | 40.0 |" in card.text
        assert "| Y |  | linear-probe | top1 | 60.0 |" in card.text


def test_a_card_by_another_author_is_kept(run_folder):
    for text in ("---\nlicense: mit\n---\n\n# Mine\n\nWhat I think of it.\n", "Mine.\n"):
        (run_folder / "README.md").write_text(text)
        write_card(run_folder, license="apache-2.0")
        assert (run_folder / "README.md").read_text() == text


def test_metadata_that_a_person_added_is_kept(run_folder):
    card = card_of(run_folder, license="mit")
    card.data.language = "fr"
    card.data.tags = [*card.data.tags, "birds"]
    card.save(run_folder / "README.md")
    again = card_of(run_folder)
    assert (again.data.language, again.data.license) == ("fr", "mit")
    assert again.data.tags == ["flip", "clip", "vision", "birds"]


def test_the_licence_of_the_weights_before_is_carried_on(run_folder, tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    recipe = (run_folder / "recipe.yaml").read_text()
    for source, license in ((str(tmp_path / "before"), "cc-by-nc-4.0"), ("user/flip", None)):
        (run_folder / "README.md").unlink(missing_ok=True)
        changed = recipe.replace("model_name_or_path: null", f"model_name_or_path: {source}")
        (run_folder / "recipe.yaml").write_text(changed)
        card = card_of(run_folder, repo_id="you/flip")
        assert card.data.license == license
        assert card.data.base_model == (None if license else source)
    assert "They are derived from user/flip, whose terms still apply." in card.text and str(tmp_path) not in card.text


def test_a_models_origin_is_kept_through_conversions_and_runs(run_folder, tmp_path):
    converted = tmp_path / "models" / "flip"
    converted.mkdir(parents=True)
    (converted / "README.md").write_text(f"---\n{card_data('openai/clip-tiny').to_yaml()}\n---\n\n# flip\n")
    recipe = (run_folder / "recipe.yaml").read_text()
    assert "model_name_or_path: null" in recipe
    changed = recipe.replace("model_name_or_path: null", f"model_name_or_path: {converted}")
    (run_folder / "recipe.yaml").write_text(changed)
    card = card_of(run_folder, repo_id="you/flip")
    assert card.data.base_model == "openai/clip-tiny"
    linked = "[openai/clip-tiny](https://huggingface.co/openai/clip-tiny)"
    assert f"| began from | `flip`, which came from {linked} |" in card.text
    # The run's results name the origin where the converted folder is gone, and the next run reads it there.
    results = json.loads((run_folder / "results.json").read_text())
    (run_folder / "results.json").write_text(json.dumps({**results, "base_model": "openai/clip-tiny"}))
    (converted / "README.md").unlink()
    assert card_of(run_folder).data.base_model == "openai/clip-tiny"
    assert base_model_of(str(run_folder)) == "openai/clip-tiny"
    assert card_data(str(run_folder)).base_model == "openai/clip-tiny"  # of what is converted back
    assert base_model_of(str(converted)) is None and base_model_of("openai/clip-tiny") == "openai/clip-tiny"
    (run_folder / "recipe.yaml").write_text(recipe.replace("init_vision_from: null", "init_vision_from: user/mae"))
    (run_folder / "results.json").write_text(json.dumps(results))
    assert "| began from | a new model with the image tower of [user/mae](" in card_of(run_folder).text


def test_the_stages_of_a_run_are_told_one_by_one(run_folder):
    stages = [
        {"samples": 6000, "image_size": 16, "text_length": 8, "mask_ratio": 0.75},
        {"samples": 1000, "mask_ratio": 0.0, "base_lr": 0.256},
    ]
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    left_out = {"train_samples", "unmasked_samples", "unmasked_base_lr", "unmasked_warmup_samples", "mask_ratio_end"}
    recipe = {name: value for name, value in recipe.items() if name not in left_out}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": stages, "batch_size": 100}))
    (run_folder / "results.json").unlink()
    text = card_of(run_folder).text
    first = "6,000 pairs; images of 16 pixels; texts of 8 tokens; patches dropped: 75%, random"
    warmup = f"after {recipe['warmup_samples']:,} of warm-up, then a cosine"
    assert f"| stage 1 | {first}; peak learning rate {recipe['base_lr'] * 100 / 256:.3g} {warmup} |" in text
    assert f"| stage 2 | 1,000 pairs; patches dropped: none; peak learning rate 0.1 {warmup} |" in text
    assert "| schedule |" not in text and text.count("peak learning rate") == 2
    assert "trained while up to 75% of the patches of every image were dropped" in text
    assert "7,000, 100 per step" in text and "not tuned on whole images" not in text
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": stages[:1]}))
    assert "not tuned on whole images" in card_of(run_folder).text


def test_without_recipe_and_results_nothing_is_made_up(run_folder):
    for name in ("recipe.yaml", "results.json", "training_curves.png"):
        (run_folder / name).unlink()
    card = card_of(run_folder)
    assert card.text.count("Not known: no recipe") == 3 and "Not evaluated yet." in card.text
    assert "training_curves" not in card.text and "kg of CO2" not in card.text
    assert "No licence was given" in card.text and card.data.eval_results is None
    assert f'model="{run_folder.as_posix()}"' in card.text


def test_carbon_is_power_times_time_times_the_grid(run_folder):
    assert Compute(7200, "A100", 4, 400).kilowatt_hours == pytest.approx(3.2)
    assert Compute(7200, "A100", 4, 400).kilograms == pytest.approx(3.2 * 0.48)
    card = card_of(run_folder)
    assert "**1.5 kg of CO2 equivalent**" in card.text and "4 x 2.0 hours x 400 W = 3.2 kWh" in card.text
    assert "This assumes" in card.text and "It does not include" in card.text
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] == pytest.approx(1536)
    results = json.loads((run_folder / "results.json").read_text())
    for hardware, said in (
        ({"device": "cpu", "processes": 1, "watts": None}, "the power is not known"),
        ({}, "devices"),
    ):
        (run_folder / "results.json").write_text(json.dumps({**results, "hardware": hardware}))
        (run_folder / "README.md").unlink()
        card = card_of(run_folder)
        assert f"Not estimated: {said}" in card.text.replace("the devices", "devices")
        assert "co2_eq_emissions" not in card.data.to_dict()
