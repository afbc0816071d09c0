"""Held-out pairs during training: what is measured, what is kept, and when a run ends of it."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn

from flip_hf import FlipModel
from flip_hf.console.loading import ModelUnreadable
from flip_hf.data.holdout import is_held_out
from flip_hf.evaluation.encoder import Encoder
from flip_hf.hub.card import write_card
from flip_hf.training.best import Best
from flip_hf.training.build import MISTAKES, build_trainer
from flip_hf.training.checkpoint import TrainState
from flip_hf.training.recipes import parse_arguments
from flip_hf.training.validation import in_words, measure_pairs
from tests.helpers.contrast import dense_sigmoid_loss, make_embeds
from tests.helpers.logs import logged
from tests.helpers.pretraining import SHORT, TINY, pretrain
from tests.helpers.programs import ROOT

RUN = [*TINY, *SHORT, "--unmasked_samples", "0", "--train_samples", "128", "--num_workers", "0", "--holdout", "0.2"]
RUN += ["--eval_samples", "32", "--checkpoint_samples", "64", "--keep_checkpoints", "4"]


def build(*argv: str):
    return build_trainer(parse_arguments(list(argv), ROOT / "flip_hf" / "recipes", "shapes"))


@pytest.fixture(scope="module")
def held_out_run(samples, tokenizer, tmp_path_factory):
    """A run of 128 samples with a fifth held out: (its arguments, its folder, what it printed). Tests only read it."""
    folder = tmp_path_factory.mktemp("held_out")
    data = folder / "data"
    data.mkdir()
    for part in range(4):
        rows = samples[40 * part : 40 * (part + 1)]
        columns = {"image": [row[1] for row in rows], "caption": [row[2].decode() for row in rows]}
        Dataset.from_dict(columns).to_parquet(str(data / f"{part}.parquet"))
    tokenizer.save_pretrained(folder / "tokenizer")
    argv = ["--train_data", str(data), "--tokenizer", str(folder / "tokenizer"), *RUN]
    run = pretrain(*argv, "--output_dir", str(folder / "run"))
    assert run.returncode == 0, run.stderr[-3000:]
    return argv, folder / "run", run.stdout


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_measures_loss_and_retrieval_on_held_out_pairs(held_out_run, samples):
    _, folder, printed = held_out_run
    out = sum(is_held_out(image, 0.2) for _, image, _ in samples)
    results = json.loads((folder / "results.json").read_text())
    assert results["pairs"] == results["captions"] == out
    assert sum(source["held_out"] for source in results["sources"].values()) > 0
    assert f"Validated on {out} held-out images with {out} captions" in printed and "Held out" in printed
    assert f"on {out} held-out images" in printed
    for name in ("validation_loss", "mean_recall", "text_retrieval_recall@1", "image_retrieval_recall@10"):
        found = logged(folder, name)
        assert list(found) == [32, 64, 96, 128] and found[128] == results[name]
    assert results["validation_loss"] < math.log(out) + 1
    assert json.loads((folder / "validation" / "about.json").read_text())["images"] == out


def test_the_best_model_is_a_model_folder_that_names_its_metric(held_out_run):
    _, folder, printed = held_out_run
    recalls = logged(folder, "mean_recall")
    best = json.loads((folder / "best" / "best.json").read_text())
    assert best["metric"] == "mean_recall" and best["value"] == max(recalls.values()) == recalls[best["samples"]]
    assert json.loads((folder / "results.json").read_text())["best"] == best
    assert f"Best      mean_recall {best['value']:.4f} after {best['samples']} samples" in printed
    assert FlipModel.from_pretrained(folder / "best").config.vision_config.hidden_size == 32


def test_the_card_reports_the_held_out_pairs(held_out_run, tmp_path):
    _, folder, _ = held_out_run
    shutil.copytree(folder, tmp_path / "run")
    write_card(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    count = f"{results['pairs']:,.0f}"
    assert f"held-out pairs ({count} images)" in card
    assert f"| text_retrieval_recall@1 | {100 * results['text_retrieval_recall@1']:.1f} |" in card


def test_two_processes_and_a_resumed_run_hold_out_and_judge_the_same(held_out_run, tmp_path):
    argv, straight, _ = held_out_run
    run = pretrain(*argv, "--output_dir", str(tmp_path / "two"), processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    about = [json.loads((folder / "validation" / "about.json").read_text()) for folder in (straight, tmp_path / "two")]
    assert about[0] == about[1]
    resumed = tmp_path / "resumed"
    shutil.copytree(
        straight, resumed, ignore=shutil.ignore_patterns("checkpoint-*128", "*.safetensors", "results.json")
    )
    shutil.copytree(straight / "checkpoint-000000000064", resumed / "checkpoint-000000000064", dirs_exist_ok=True)
    run = pretrain(*argv, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest")
    assert run.returncode == 0, run.stderr[-3000:]
    for name in ("validation_loss", "mean_recall"):
        assert logged(resumed, name) == logged(straight, name)
    theirs, ours = (json.loads((folder / "results.json").read_text()) for folder in (straight, resumed))
    for name in ("best", "best_value", "best_samples", "evaluations_since_best"):
        assert ours[name] == theirs[name], name
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    other_share = [*argv, "--holdout", "0.1", "--output_dir", str(resumed), "--resume_from_checkpoint"]
    with pytest.raises(MISTAKES, match="was trained with --holdout 0.2, not 0.1"):
        build(*other_share, str(straight / "checkpoint-000000000064"))


def test_patience_ends_a_run_as_finished_with_a_message(held_out_run, tmp_path):
    argv, _, _ = held_out_run
    argv = [*argv, "--base_lr", "0", "--early_stopping_patience", "2", "--output_dir", str(tmp_path / "run")]
    run = pretrain(*argv, processes=2)  # at a learning rate of zero nothing gets better
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["finished"] and results["samples"] == 96 and results["best"]["samples"] == 32
    reason = "nothing better was found in 2 evaluations, since 32 samples (--early_stopping_patience 2)"
    assert results["ended_early"] == reason and logged(tmp_path / "run", "ended_early") == {96: reason}
    assert f"Ended     early: {reason}" in run.stdout
    again = pretrain(*argv, "--resume_from_checkpoint", "auto")
    assert again.returncode == 0 and again.stdout.startswith("Finished: ") and "ended early after 96" in again.stdout
    on = pretrain(*argv, "--early_stopping_patience", "9", "--resume_from_checkpoint", "auto")
    assert on.returncode == 0, on.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["samples"] == 128


def test_pairs_and_labels_are_distinguished_by_their_columns(held_out_run, samples, tmp_path):
    argv, _, _ = held_out_run
    argv = [*argv, "--holdout", "0", "--output_dir", str(tmp_path / "run")]
    images = [image for _, image, _ in samples[:12]]
    tables = {
        "pairs": {"image": images, "text": [["a", "b"]] * 12},
        "both": {"image": images, "text": ["a"] * 12, "label": [0] * 12},
    }
    for name, columns in tables.items():
        Dataset.from_dict(columns).to_parquet(str(tmp_path / f"{name}.parquet"))
    run = pretrain(*argv, "--eval_data", str(tmp_path / "pairs.parquet"), "--eval_pairs", "8")
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["pairs"], results["captions"]) == (8, 16) and results["best"]["metric"] == "mean_recall"
    both = ["--eval_data", str(tmp_path / "both.parquet")]
    elsewhere = [*argv, "--output_dir", str(tmp_path / "other")]
    cases = [
        (both, "has labels .label. and captions .text.*--label_column label, or --eval_caption_column text"),
        ([*both, "--label_column", "label", "--eval_caption_column", "text"], "give one kind"),
        (["--eval_data", str(tmp_path / "pairs.parquet"), "--holdout", "0.1"], "Give one of them"),
        (["--early_stopping_patience", "1"], "nothing to evaluate on"),
        (["--holdout", "0.00001"], "--holdout 1e-05 holds 0 usable pairs in the first 160 rows"),
        (["--early_stopping_patience", "1", "--holdout", "0.1", "--unmasked_samples", "32"], "whole images"),
    ]
    for given, message in cases:
        with pytest.raises(MISTAKES, match=message):
            build(*elsewhere, *given)


# -- what is measured -------------------------------------------------------------------------------------------------


def test_loss_and_recalls_are_those_of_their_definitions():
    """Three images with one, two and three texts; the loss takes the first of each."""
    counts = np.array([1, 2, 3])
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(6, 4)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    images = texts[[0, 2, 5]]  # each image finds one of its texts, the last of them where there are several
    metrics = measure_pairs(images, texts, counts, scale=10.0, batch_size=64)
    assert metrics["text_retrieval_recall@1"] == 1.0
    similarity = images @ texts.T
    found = similarity.argmax(axis=0) == np.repeat(np.arange(3), counts)
    assert metrics["image_retrieval_recall@1"] == pytest.approx(found.mean())
    logits = torch.from_numpy(10 * similarity[:, [0, 1, 3]])
    labels = torch.arange(3)
    expected = nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)
    assert metrics["validation_loss"] == pytest.approx(float(expected) / 2, abs=1e-5)


def test_the_loss_is_that_of_batches_as_large_as_in_training():
    texts = torch.nn.functional.normalize(torch.randn(64, 8), dim=1).numpy()
    alone = measure_pairs(texts, texts, np.ones(64, int), 5.0, batch_size=16)["validation_loss"]
    pieces = [measure_pairs(each, each, np.ones(16, int), 5.0, 16)["validation_loss"] for each in np.split(texts, 4)]
    assert alone == pytest.approx(np.mean(pieces), abs=1e-5)
    assert alone < measure_pairs(texts, texts, np.ones(64, int), 5.0, 64)["validation_loss"]


def test_the_validation_loss_of_a_model_with_a_bias_is_the_sigmoid_loss():
    images, texts, scale, bias = (x.detach() for x in make_embeds(32, 10.0, torch.float32, bias=-4.0))
    found = measure_pairs(images.numpy(), texts.numpy(), np.ones(32, int), 10.0, 16, -4.0)["validation_loss"]
    pieces = [dense_sigmoid_loss(images[i : i + 16], texts[i : i + 16], scale, bias)[0].item() for i in (0, 16)]
    assert found == pytest.approx(sum(pieces) / 2, rel=1e-5)
    assert measure_pairs(images.numpy(), texts.numpy(), np.ones(32, int), 10.0, 16, math.nan) == {}


def test_numbers_that_are_not_finite_are_never_the_best(tmp_path):
    images = np.full((3, 4), np.nan, np.float32)
    metrics = {**measure_pairs(images, images, np.ones(3, int), 1.0, 3), "pairs": 3.0, "captions": 3.0}
    assert "mean_recall" not in metrics and "not finite" in in_words(metrics, ())
    best = Best(Accelerator(cpu=True), tmp_path, "pool", patience=2, keeps=True)
    state = TrainState(samples=8)

    def saver():
        return lambda folder: folder.mkdir()

    best.judge(metrics, state, saver)
    best.judge({"mean_recall": math.nan}, state, saver)
    assert best.is_over(state) and state.best_value is None and not (tmp_path / "best").exists()
    best.judge({"mean_recall": 0.5}, state, saver)
    assert state.best_value == 0.5 and not best.is_over(state)
    best.judge({"mean_recall": math.nan}, state, saver)
    assert best.kept()["value"] == 0.5


def test_the_folder_keeps_the_better_model_of_a_run_that_returns_to_a_checkpoint(tmp_path):
    best = Best(Accelerator(cpu=True), tmp_path, "pool", patience=3, keeps=True)

    def saver():
        return lambda folder: folder.mkdir()

    state = TrainState(samples=32)
    best.judge({"mean_recall": 0.5}, state, saver)
    before = TrainState(samples=16, compared_on="pool", best_value=0.2, best_samples=16)
    best.begin(before)
    before.samples = 24
    best.judge({"mean_recall": 0.4}, before, saver)
    assert before.best_value == 0.4 and before.evaluations_since_best == 0  # counted as the run counted then
    assert best.kept()["value"] == 0.5  # and what it will find again is not lost
    # Another run in the folder, and one on other pairs, have nothing to compare it with.
    Best(best.accelerator, tmp_path, "other", patience=3, keeps=True).begin(before)
    assert before.best_value is None and not (tmp_path / "best").exists()
    assert (tmp_path / "set-aside" / "best" / "best.json").is_file()


def test_a_lower_reconstruction_error_is_better(tmp_path):
    best = Best(Accelerator(cpu=True), tmp_path, "images", patience=1, keeps=False)
    state = TrainState(samples=8)
    best.judge({"reconstruction_error": 0.5, "images": 4.0}, state, lambda: lambda folder: None)
    best.judge({"reconstruction_error": 0.4, "images": 4.0}, state, lambda: lambda folder: None)
    assert state.best_value == 0.4 and not best.is_over(state)


# -- a run that has not ended -----------------------------------------------------------------------------------------


def test_the_folder_of_an_interrupted_run_names_its_newest_model(held_out_run, tmp_path):
    _, folder, _ = held_out_run
    for name in ("checkpoint-000000000064", "checkpoint-000000000128", "best"):
        shutil.copytree(folder / name, tmp_path / name)
    newest = tmp_path / "checkpoint-000000000128"
    message = f"the folder of an unfinished run. Its newest model so far is {newest} .or {tmp_path / 'best'}, .*auto"
    with pytest.raises(ModelUnreadable, match=message):
        Encoder.from_pretrained(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    for usable in (newest, tmp_path / "best"):  # what it names is what it says
        assert Encoder.from_pretrained(str(usable), device=torch.device("cpu"), dtype=torch.float32) is not None
