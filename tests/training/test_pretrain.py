"""The pretrain script, as a user runs it."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from flip_hf import FlipModel
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.data.workers import cores_per_process
from flip_hf.training.build import MISTAKES, build_trainer, split_batch
from flip_hf.training.recipes import parse_arguments
from tests.helpers.logs import logged
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import MODULE, SCRIPT, SHORT, TINY, launch, pretrain
from tests.helpers.programs import ROOT

# -- the embedded data ------------------------------------------------------------------------------------------------


def test_the_short_recipe_learns(trained):
    folder, _ = trained
    losses = list(logged(folder, "loss").values())
    assert losses[-1] < 0.85 * losses[0]
    results = json.loads((folder / "results.json").read_text())
    assert results["images"] == 480 and results["top1"] > 0.2  # chance: 0.042
    assert logged(folder, "zero_shot_top1")[2560] == results["top1"]


def test_the_run_ends_in_six_lines_of_results_and_paths(trained):
    folder, printed = trained
    lines = printed.strip().splitlines()[-6:]
    assert [line.split()[0] for line in lines] == ["Trained", "Bound", "Result", "Skipped", "Saved", "Use"]
    assert "2,560 samples at mask ratio 0.5" in lines[0] and "of 24 classes (chance 4.2%)" in lines[2]
    assert lines[3].endswith("none") and str(folder) in lines[4] and "flip-hf zero-shot" in lines[5]
    data_wait = json.loads((folder / "results.json").read_text())["data_wait"]
    assert f"{data_wait:.0%} of the time" in lines[1] and (": data: " in f": {lines[1][10:]}") == (data_wait > 0.05)


def test_the_run_leaves_a_model_folder_curves_and_its_recipe(trained):
    folder, _ = trained
    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(model, FlipModel) and model.config.mask_ratio == 0.5 and not model.training
    image = Image.new("RGB", (80, 64), (235, 55, 55))
    outputs = model(**processor(text=["a red circle", "a blue star"], images=image, return_tensors="pt"))
    assert outputs.logits_per_image.isfinite().all() and outputs.ids_keep is None
    with Image.open(folder / "training_curves.png") as curves:
        assert curves.size[0] > 1000
    again = parse_arguments([str(folder / "recipe.yaml")], ROOT / "flip_hf" / "recipes", "shapes")
    assert again.optimization.train_samples == 2048 and again.data.train_data == ["shapes"]
    assert list((folder / "logs").glob("**/events.out.tfevents.*"))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]


# -- a user's own data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "processes"), [("tar_folder", 2), ("image_folder", 1)])
def test_own_data_trains_in_one_process_and_in_two(kind, processes, request, tmp_path):
    data = request.getfixturevalue(kind)
    run = pretrain(
        *("--train_data", str(data), "--output_dir", str(tmp_path / "out"), "--micro_batch_size", "8"),
        *(*TINY, *SHORT, "--num_workers", "1"),
        processes=processes,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = logged(tmp_path / "out", "loss")
    assert list(losses) == list(range(32, 257, 32))  # once each: one process writes
    assert all(math.isfinite(loss) for loss in losses.values()) and losses[256] < losses[32]
    assert "unmasked: 64 samples, mask ratio 0" in run.stdout  # although the masked phase ends within a batch
    assert "not evaluated" in run.stdout and "Skipped   none" in run.stdout
    assert FlipModel.from_pretrained(tmp_path / "out").config.vision_config.hidden_size == 32


def test_labelled_data_of_ones_own_is_evaluated(image_folder, tmp_path):
    labels = [["cat", "dog"][i % 2] for i in range(12)]
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(image_folder.glob("*/*.jpg"))[:12]]
    Dataset.from_dict({"image": images, "label": labels}).to_parquet(str(tmp_path / "eval.parquet"))
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    run = pretrain(
        *("--train_data", str(image_folder), "--output_dir", str(tmp_path / "out")),
        *("--eval_data", str(tmp_path / "eval.parquet"), "--class_names", str(tmp_path / "names.txt")),
        *(*TINY, *SHORT, "--num_workers", "0"),
        processes=2,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "on 12 images of 2 classes (chance 50.0%)" in run.stdout


def test_damaged_images_are_counted_and_skipped(samples, tmp_path):
    bad = {3: (samples[3][1][:200], b"cut"), 9: (b"no image", b"text"), 11: (samples[11][1], b" ")}
    write_tar(tmp_path / "a.tar", [(k, *bad.get(i, (img, txt))) for i, (k, img, txt) in enumerate(samples[:67])])
    run = pretrain(
        *("--train_data", str(tmp_path / "a.tar"), "--output_dir", str(tmp_path / "out")),
        *(*TINY, *SHORT, "--num_workers", "0", "--train_samples", "64", "--unmasked_samples", "0"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    refused = json.loads((tmp_path / "out" / "results.json").read_text())["refused"]
    assert refused == {"damaged image": 1, "not an image": 1, "empty caption": 1}
    assert "1 x damaged image" in run.stdout and "sample 00009" in run.stderr


@pytest.mark.long
def test_a_resumed_run_ends_in_the_same_weights_whichever_program_resumes_it(tar_folder, tmp_path):
    """Checkpoints every 96 samples; resuming from the first gives bit-identical losses and weights.

    `python scripts/pretrain.py` trains the whole run, and Accelerate's launcher resumes it by either program. All use
    every core, as they do for a user: sums over other numbers of threads differ in their last bits.
    """
    whole = tmp_path / "whole"
    argv = ["--train_data", str(tar_folder), *TINY, *SHORT, "--num_workers", "2", "--checkpoint_samples", "96"]
    argv += ["--keep_checkpoints", "3"]
    command = [sys.executable, *SCRIPT, *argv, "--output_dir", str(whole)]
    plain = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(cores_per_process())}
    assert subprocess.run(command, cwd=ROOT, env=plain, capture_output=True).returncode == 0
    assert sorted(path.name[-3:] for path in whole.glob("checkpoint-*")) == ["096", "192", "256"]
    straight = {s: loss for s, loss in logged(whole, "loss").items() if s > 96}
    theirs = load_file(whole / "model.safetensors")
    assert len(straight) == 5
    for name, program in (("script", SCRIPT), ("module", MODULE)):
        resumed = tmp_path / name
        shutil.copytree(whole / "checkpoint-000000000096", resumed / "checkpoint-000000000096")
        options = [*argv, "--output_dir", str(resumed), "--resume_from_checkpoint", "latest"]
        run = launch(*options, program=program)
        assert run.returncode == 0, run.stderr[-3000:]
        assert logged(resumed, "loss") == straight, name
        ours = load_file(resumed / "model.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_a_saved_model_is_trained_further(trained, image_folder, tmp_path):
    folder, _ = trained
    run = pretrain(
        *("--model_name_or_path", str(folder), "--train_data", str(image_folder)),
        *(*SHORT, "--mask_ratio", "0.75", "--base_lr", "0", "--unmasked_base_lr", "0", "--num_workers", "0"),
        *("--output_dir", str(tmp_path / "out")),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    before, after = (FlipModel.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert after.config.mask_ratio == 0.75
    old, new = (AutoProcessor.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert old.tokenizer.get_vocab() == new.tokenizer.get_vocab()
    assert old.image_processor.image_mean == new.image_processor.image_mean
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new), name  # at a learning rate of zero


# -- mistakes ---------------------------------------------------------------------------------------------------------


def build(*argv: str):
    return build_trainer(parse_arguments(list(argv), ROOT / "flip_hf" / "recipes", "shapes"))


def test_mistakes_are_refused_before_training_with_their_fix(image_folder, parquet_folder, trained, tmp_path):
    data = ["--train_data", str(image_folder)]
    out = ["--output_dir", str(tmp_path / "out")]
    Dataset.from_dict({"image": [], "caption": []}).to_parquet(str(tmp_path / "empty.parquet"))
    larger = tmp_path / "tokenizer"
    train_wordpiece(["a", *(f"word{i}" for i in range(5000))] * 2, vocab_size=9000).save_pretrained(larger)
    small = json.dumps({**json.loads(TINY[3]), "vocab_size": 20})
    cases = [
        (["--train_data", str(parquet_folder), *TINY], "Its columns are: picture, words"),
        ([*data, *TINY, "--caption_column", "title"], "no caption column 'title'.*caption.*--caption_column"),
        (["--train_data", str(tmp_path / "empty.parquet"), *TINY], "has no samples"),
        (["--train_data", str(tmp_path / "nothing")], "no file or folder"),
        ([*data, "--vision_config", '{"image_size": 225}'], "multiple of patch_size .16.; the nearest are 224 and 240"),
        ([*data, *TINY[:2], "--text_config", small], "tokens, the model's table only 20"),
        ([*data, *TINY, "--batch_size", "30", "--micro_batch_size", "8"], "use 32"),
        ([*data, *TINY, *out, "--resume_from_checkpoint", "latest"], "no checkpoint in"),
        (
            [*data, *TINY, "--eval_data", str(image_folder), "--label_column", "caption", "--eval_split", "train"],
            "--class_names",
        ),
        (
            ["--model_name_or_path", str(trained[0]), *data, "--tokenizer", str(larger)],
            "tokens, the model's table only",
        ),
    ]
    for argv, message in cases:
        with pytest.raises(Exception, match=message) as caught:
            build(*argv, *SHORT[:4], *([] if "--batch_size" in argv else SHORT[4:6]), "--report_to", "none", *out)
        assert isinstance(caught.value, MISTAKES), caught.value


def test_a_mistake_ends_the_script_in_one_line():
    run = launch("--mask_ratio", "1.5")
    assert run.returncode != 0
    assert "error: --mask_ratio is the fraction of patches dropped and must be in [0, 1), got 1.5" in run.stderr
    assert 'pretrain.py", line' not in run.stderr.split("accelerate")[0]


def test_batches_are_split_over_processes_and_micro_batches():
    arguments = parse_arguments(["--batch_size", "64", "--micro_batch_size", "8"], ROOT / "flip_hf/recipes", "shapes")
    assert split_batch(arguments.optimization, 2) == (8, 4)
    with pytest.raises(ValueError, match="use 72"):
        split_batch(arguments.optimization, 3)


def test_weights_can_be_read_by_whoever_can_read_the_other_files(trained):
    folder, _ = trained
    modes = {path.stat().st_mode for path in folder.rglob("*.safetensors")}
    assert modes == {(folder / "config.json").stat().st_mode}
