"""What a fine-tuned model forgets: measured before the run and with it, warned of, and reported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from flip_hf.hub.card import write_card
from flip_hf.training.build import MISTAKES, build_trainer
from flip_hf.training.checkpoint import TrainState
from flip_hf.training.progress import plot_curves
from flip_hf.training.retention import Change, Retention
from tests.helpers.arguments import parse
from tests.helpers.labelled import labelled_pictures
from tests.helpers.logs import logged
from tests.helpers.pretraining import SHORT, TINY, pretrain

# Far too high a learning rate: colours are forgotten at once.
RUN = [*SHORT, "--train_samples", "128", "--unmasked_samples", "0", "--warmup_samples", "32", "--base_lr", "0.2"]
RUN += ["--holdout", "0.2", "--eval_samples", "64", "--checkpoint_samples", "64", "--keep_checkpoints", "4"]
RUN += ["--num_workers", "0"]
# Dropout is drawn from the generators that an evaluation must leave alone.
DROPOUT = ["--text_config", json.dumps({**json.loads(TINY[3]), "attention_dropout": 0.1})]
PROMPTS = ("a photo of a {}.", "{}")


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def build(*argv: str):
    return build_trainer(parse(*argv))


def run_in(folder: Path, *argv: str, processes: int = 1):
    run = pretrain(*argv, "--output_dir", str(folder), processes=processes)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """A folder with `model`, which knows three colours, and the pictures that it is tested on, `test.parquet`."""
    folder = tmp_path_factory.mktemp("colours")
    labelled_pictures(96).save_to_disk(str(folder / "train"))
    labelled_pictures(30).rename_column("fine_label", "label").to_parquet(str(folder / "test.parquet"))
    argv = ["--train_data", str(folder / "train"), "--caption_column", "fine_label", *TINY, *SHORT, *DROPOUT]
    argv += ["--train_samples", "480", "--unmasked_samples", "0", "--num_workers", "0", "--seed", "1", "--flip", "0"]
    argv += ["--tokenizer_vocab_size", "200", "--eval_data", str(folder / "test.parquet"), "--templates", *PROMPTS]
    run_in(folder / "model", *argv)
    return folder


@pytest.fixture(scope="module")
def pairs(samples, tmp_path_factory) -> Path:
    """A file of pairs that the model was not trained on."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    columns = {"image": [row[1] for row in samples], "caption": [row[2].decode() for row in samples]}
    Dataset.from_dict(columns).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def argv(colours, pairs) -> list[str]:
    """The arguments of a fine-tuning, without retained data."""
    return ["--model_name_or_path", str(colours / "model"), "--train_data", str(pairs), *RUN]


@pytest.fixture(scope="module")
def retained(colours) -> list[str]:
    return ["--retain_data", str(colours / "test.parquet"), "--retain_templates", *PROMPTS]


@pytest.fixture(scope="module")
def forgetful(argv, retained, tmp_path_factory):
    """A run that forgets its colours: (its folder, what it printed, what it warned of). Tests only read it."""
    folder = tmp_path_factory.mktemp("forgetful") / "run"
    run = run_in(folder, *argv, *retained)
    return folder, run.stdout, run.stderr


@pytest.fixture(scope="module")
def plain(argv, tmp_path_factory):
    """The same run without retained data: (its folder, what it printed). Tests only read it."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, run_in(folder, *argv).stdout


# -- a run ------------------------------------------------------------------------------------------------------------


def test_the_retained_metric_is_that_of_the_model_before_and_of_each_evaluation(forgetful, colours):
    folder, _, _ = forgetful
    before = results_of(colours / "model")["top1"]  # as the model's own run measured it
    found = results_of(folder)
    values = logged(folder, "retained_zero_shot_top1")
    assert before > 0.8 and list(values) == [0, 64, 128] and values[0] == before
    change = {"metric": "top1", "before": before, "after": values[128]}
    assert found["retention"]["retained"] == change and "before" not in found
    own = logged(folder, "mean_recall")
    assert list(own) == [0, 64, 128] and own[128] == found["mean_recall"]
    assert found["retention"]["own"] == {"metric": "mean_recall", "before": own[0], "after": own[128]}


def test_a_fall_is_warned_of_with_what_to_do(forgetful, colours):
    folder, printed, warned = forgetful
    change = results_of(folder)["retention"]["retained"]
    assert change["after"] < 0.9 * change["before"]
    name = colours / "test.parquet"
    said = f"zero-shot top-1 on the retained data {name} has fallen from {change['before']:.1%} before the run to "
    assert warned.count(said) == 1
    for remedy in ("--base_lr", "--mask_ratio", "--freeze", f"flip-hf interpolate {colours / 'model'} {folder} "):
        assert remedy in warned.split(said)[1].splitlines()[0]
    assert f"before the run: retained, {name}: zero-shot top-1 {change['before']:.1%}" in printed + warned


def test_summary_and_card_say_the_numbers_of_the_results(forgetful, tmp_path):
    folder, printed, _ = forgetful
    found = results_of(folder)["retention"]
    values = {f"{which} {when}": found[which][when] for which in ("own", "retained") for when in ("before", "after")}
    own = f"Own       mean R@1/5/10 {values['own before']:.1%} before the run, {values['own after']:.1%} after it"
    kept = f"Retained  zero-shot top-1 {values['retained before']:.1%} before the run, "
    assert own in printed and f"{kept}{values['retained after']:.1%} after it, on " in printed
    shutil.copytree(folder, tmp_path / "run")
    write_card(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    shown = {name: f"{100 * value:.1f}" for name, value in values.items()}
    assert f"| the run's own | mean_recall | {shown['own before']} | {shown['own after']} |" in card
    assert f"test.parquet, retained | top1 | {shown['retained before']} | {shown['retained after']} |" in card
    assert found["warned"] and "The run lost more of the retained metric" in card


def test_the_weights_and_the_judgement_are_those_of_a_run_without_retained_data(forgetful, plain):
    with_it, without = (load_file(each[0] / "model.safetensors") for each in (forgetful, plain))
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    ours, theirs = (results_of(each[0]) for each in (forgetful, plain))
    for name in ("best", "best_samples", "evaluations_since_best", "mean_recall"):
        assert ours[name] == theirs[name], name


def test_without_retained_data_the_own_metric_is_compared(forgetful, plain, tmp_path):
    folder, printed = plain
    own = results_of(forgetful[0])["retention"]["own"]
    found = results_of(folder)["retention"]
    assert found["own"] == own and found["retained"] is None and found["data"] is None
    assert list(logged(folder, "mean_recall")) == [0, 64, 128]
    said = f"Own       mean R@1/5/10 {own['before']:.1%} before the run, {own['after']:.1%} after it"
    assert said in printed and "Retained" not in printed
    shutil.copytree(folder, tmp_path / "run")
    write_card(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| the run's own | mean_recall | {100 * own['before']:.1f} | {100 * own['after']:.1f} |" in card
    assert ", retained |" not in card


def test_a_fall_of_the_own_metric_is_warned_of_where_there_is_no_other(argv, caplog):
    retention = Retention(parse(*argv), "key", None)
    state = TrainState()
    retention.remember({"mean_recall": 0.5}, state)
    for value in (0.46, 0.4, 0.3):
        retention.warn_of_fall({"mean_recall": value}, state)
    (record,) = caplog.records
    assert (
        "mean R@1/5/10 on the run's own evaluation data has fallen from 50.0% before the run to 40.0%" in record.message
    )
    assert retention.results({"mean_recall": 0.4}, state)["warned"]


def test_a_run_that_measures_nothing_says_so(argv, colours, tmp_path, capsys):
    """No pairs are taken from training unasked; where captions are made of labels, none could be."""
    said = "This run measures nothing beside its loss"
    build(*argv, "--holdout", "0", "--output_dir", str(tmp_path / "pairs"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(said))
    assert "--retain_data" in line and "--holdout 0.01" in line
    labelled = ["--train_data", str(colours / "train"), "--caption_column", "fine_label", "--holdout", "0"]
    build(*argv, *labelled, "--output_dir", str(tmp_path / "labels"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(said))
    assert "--retain_data" in line and "--holdout" not in line
    build(*argv, "--output_dir", str(tmp_path / "measured"))
    assert said not in capsys.readouterr().out


def test_a_resumed_run_keeps_the_values_before_and_the_bits(forgetful, argv, retained, colours, tmp_path):
    straight, _, _ = forgetful
    for name in ("same", "other"):
        shutil.copytree(straight / "checkpoint-000000000064", tmp_path / name / "checkpoint-000000000064")
    resumed = [*argv, "--resume_from_checkpoint", "latest"]
    run = run_in(tmp_path / "same", *resumed, *retained, "--retain_warning", "1")
    assert "its numbers will differ" not in run.stderr and "has fallen" not in run.stderr
    assert results_of(tmp_path / "same")["retention"] == {**results_of(straight)["retention"], "warned": False}
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, tmp_path / "same"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # With other prompts it is another measurement, and there is nothing to compare it with.
    run = run_in(tmp_path / "other", *resumed, *retained[:2])
    assert "was not measured in this way before the run's first step" in run.stderr
    found = results_of(tmp_path / "other")["retention"]
    assert found["retained"]["before"] is None and not found["warned"]
    assert "zero-shot top-1 not measured before the run, " in run.stdout


def test_pairs_are_retained_in_several_processes_beside_labelled_evaluation_data(argv, pairs, colours, tmp_path):
    """At a learning rate of zero nothing changes, and the retained metric is that of an evaluation on these pairs."""
    argv = [*argv, "--holdout", "0", "--base_lr", "0", "--eval_pairs", "40", "--train_samples", "64"]
    evaluated = ["--eval_data", str(colours / "test.parquet"), "--templates", *PROMPTS]
    run = run_in(tmp_path / "run", *argv, *evaluated, "--retain_data", str(pairs), processes=2)
    run_in(tmp_path / "reference", *argv, "--eval_data", str(pairs))
    expected = results_of(tmp_path / "reference")["mean_recall"]
    found = results_of(tmp_path / "run")["retention"]
    assert found["retained"]["metric"] == "mean_recall" and found["own"]["metric"] == "top1"
    assert found["retained"]["before"] == pytest.approx(expected, abs=1e-6)
    assert found["retained"]["after"] == found["retained"]["before"] and found["own"]["after"] == found["own"]["before"]
    assert "Retained pairs: 40 images with 40 captions" in run.stdout and "has fallen" not in run.stderr


# -- what is refused --------------------------------------------------------------------------------------------------


def test_mistakes_about_retained_data_end_before_training(argv, retained, colours, pairs, samples, tmp_path):
    test = str(colours / "test.parquet")
    images = [image for _, image, _ in samples[:4]]
    columns = {"alone": {}, "both": {"text": ["a"] * 4, "label": [0] * 4}, "one": {"text": ["a", "b", "c", "d"]}}
    for name, more in columns.items():
        count = 1 if name == "one" else 4
        table = {key: values[:count] for key, values in {"image": images, **more}.items()}
        Dataset.from_dict(table).to_parquet(str(tmp_path / f"{name}.parquet"))
    alone, both, one = (str(tmp_path / f"{name}.parquet") for name in columns)
    new = ["--train_data", str(pairs), *TINY, *RUN]
    cases = [
        ([*new, *retained], "--retain_data measures what a model .* Name the model to start from"),
        ([*argv, "--retain_split", "train"], "--retain_split is about the data of --retain_data; give that too"),
        ([*argv, "--holdout", "0", "--eval_data", test, "--retain_data", test], "is evaluated on already"),
        ([*argv, "--retain_data", alone], "alone.parquet.*has no.*--retain_"),
        ([*argv, "--retain_data", both], "--retain_label_column label, or --retain_caption_column text"),
        ([*argv, "--retain_data", one], "one.parquet has 1 usable pairs in the first 1 rows"),
        ([*argv, *retained, "--objective", "reconstruction", "--holdout", "0"], "--objective reconstruction does not"),
        (
            [*argv, "--retain_data", both, "--retain_label_column", "label", "--retain_caption_column", "text"],
            "one kind",
        ),
        (
            [*argv, "--retain_data", test, "--retain_templates", "no place"],
            "--retain_templates: The template 'no place'",
        ),
    ]
    for given, message in cases:
        with pytest.raises(MISTAKES, match=message):
            build(*given, "--output_dir", str(tmp_path / "out"))


# -- its words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "fall"),
    [(0.5, 0.4, 0.2), (0.5, 0.6, 0.0), (0.0, 0.0, 0.0), (None, 0.4, 0.0), (0.5, None, 0.0)],
)
def test_a_fall_is_a_share_of_the_value_before(before, after, fall):
    assert Change("top1", before, after).fall == pytest.approx(fall)


def test_the_curves_show_the_retained_metrics(tmp_path):
    records = [{"samples": i, "retained_zero_shot_top1": 0.1 * i, "retained_mean_recall": 0.2} for i in range(3)]
    figure = plot_curves(records, {}, tmp_path / "curves.png")
    labels = [line.get_label() for axes in figure.axes for line in axes.lines]
    assert labels == ["retained: zero-shot top-1", "retained: mean of R@1, 5 and 10"]
