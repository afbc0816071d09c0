"""Runs on labelled pictures: class names become captions, and the same labels are evaluated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flip_hf.training.build import MISTAKES, build_trainer
from flip_hf.training.recipes import parse_arguments
from tests.helpers.labelled import labelled_pictures
from tests.helpers.pretraining import SHORT, TINY, pretrain
from tests.helpers.programs import ROOT

RUN = [*TINY, *SHORT, "--train_samples", "480", "--unmasked_samples", "0", "--num_workers", "2", "--seed", "1"]
RUN += ["--checkpoint_samples", "224", "--keep_checkpoints", "3", "--tokenizer_vocab_size", "200", "--flip", "0"]


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory):
    """A run on 96 labelled pictures: (its arguments, its folder, what it printed). Tests only read it."""
    folder = tmp_path_factory.mktemp("labelled")
    labelled_pictures(96).save_to_disk(str(folder / "train"))
    labelled_pictures(30).to_parquet(str(folder / "test.parquet"))
    (folder / "prompts.txt").write_text("a photo of a {}.\na picture of a {}\n{}\n")
    argv = ["--train_data", str(folder / "train"), "--caption_column", "fine_label", *RUN]
    argv += ["--caption_templates", str(folder / "prompts.txt"), "--eval_data", str(folder / "test.parquet")]
    run = pretrain(*argv, "--output_dir", str(folder / "run"))
    assert run.returncode == 0, run.stderr[-3000:]
    return argv, folder / "run", run.stdout


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {record["samples"]: record["loss"] for record in records if "loss" in record}


def test_a_labelled_data_set_trains_and_is_evaluated_by_the_same_labels(labelled_run):
    _, folder, printed = labelled_run
    assert "Captions of" in printed and "labels in 'fine_label' (3 classes, prompts: 3)." in printed
    assert "0 contain an unknown word" in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["refused"] == {} and results["images"] == 30
    assert results["top1"] > 0.8  # of three colours
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"red", "green", "blue", "square", "photo", "picture"} <= set(vocabulary) and "_" not in vocabulary


def test_a_resumed_run_on_labels_ends_in_the_same_bits(labelled_run, tmp_path):
    argv, straight, _ = labelled_run
    shutil.copytree(straight / "checkpoint-000000000224", tmp_path / "run" / "checkpoint-000000000224")
    run = pretrain(*argv, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "its numbers will differ" not in run.stderr
    resumed = losses(tmp_path / "run")
    assert len(resumed) > 5 and resumed.items() <= losses(straight).items()
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_mistakes_about_labels_end_before_training(labelled_run, tmp_path):
    argv, straight, _ = labelled_run
    (tmp_path / "two.txt").write_text("red; crimson\ngreen\n")
    (tmp_path / "semicolons.txt").write_text("red;;crimson\ngreen\nblue\n")
    cases = [
        (["--class_names", str(tmp_path / "two.txt")], "--class_names has 2 names, but .* has 3 classes"),
        (["--class_names", str(tmp_path / "semicolons.txt")], "empty name between semicolons in line 1"),
        (["--class_names", str(tmp_path / "none.txt")], "There is no file .*none.txt"),
        (["--caption_column", "label"], "no caption column 'label'. Its columns are: fine_label, img"),
        (["--caption_column", "img"], "Columns of labels: fine_label"),
        (["--caption_templates", "clip_8"], "Sets of templates are clip_1, clip_7, clip_80"),
    ]
    for more, message in cases:
        words = [*argv, *more, "--output_dir", str(tmp_path / "out")]
        with pytest.raises(MISTAKES, match=message):
            build_trainer(parse_arguments(words, ROOT / "flip_hf" / "recipes", "shapes"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", ["test", "other"])
def test_evaluation_on_training_data_is_said(labelled_run, tmp_path, table, capsys):
    argv, straight, printed = labelled_run
    shutil.copy(straight.parent / "test.parquet", tmp_path / "other.parquet")
    evaluated = {"test": straight.parent / "test.parquet", "other": tmp_path / "other.parquet"}[table]
    words = [*argv, "--train_data", str(straight.parent / "test.parquet"), "--eval_data", str(evaluated)]
    build_trainer(
        parse_arguments([*words, "--output_dir", str(tmp_path / "run")], ROOT / "flip_hf" / "recipes", "shapes")
    )
    said = f"Evaluation on training data: {evaluated} is both, so its results do not hold for others."
    assert (said in capsys.readouterr().out) == (table == "test")


@pytest.mark.parametrize(("options", "compared"), [([], True), (["--positives", "pair"], False)])
def test_equal_captions_of_labels_are_positives_unless_configured(labelled_run, tmp_path, options, compared):
    argv, _, printed = labelled_run
    assert "Positives of an image: all texts of the batch that equal its own." in printed
    words = [*argv, "--output_dir", str(tmp_path), "--num_workers", "0", *options]
    trainer = build_trainer(parse_arguments(words, ROOT / "flip_hf" / "recipes", "shapes"))
    batch = next(iter(trainer.loader))
    assert ("caption_ids" in batch) == compared
    if compared:  # three classes, three prompts
        assert len(batch["caption_ids"].unique()) <= 9 < len(batch["caption_ids"])
    result = trainer._step(trainer.phases[0], [batch])
    assert torch.isfinite(result.batch.loss)
