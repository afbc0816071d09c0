"""Runs in four stages: small images first, cut texts, masks, whole images at the end."""

import json
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from transformers import pipeline

from flip_hf import FlipConfig, FlipModel
from flip_hf.data.shapes import CLASS_NAMES
from flip_hf.training.checkpoint import find_checkpoints
from flip_hf.training.flops import step_flops
from tests.helpers.logs import records
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import PRETRAIN, TINY
from tests.helpers.programs import run_program
from tests.helpers.watched import Watched

BATCH = 16
STAGES = [  # of a model for images of 32 pixels, in patches of 8, and texts of 16 tokens
    {"samples": 64, "image_size": 16, "mask_ratio": 0, "text_length": 4},
    {"samples": 64, "image_size": 24, "mask_ratio": 0.5, "text_length": 8},
    {"samples": 64, "mask_ratio": 0.75},
    {"samples": 64, "mask_ratio": 0, "base_lr": 0.01, "warmup_samples": 16},
]
KEPT = [4, 4, 4, 16]
LEARNED = json.dumps({**json.loads(TINY[1]), "position_embedding_type": "learned"})


def words(data: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("--train_data", str(data), "--output_dir", str(folder), *TINY, "--vision_config", LEARNED),
        *("--stages", json.dumps(STAGES), "--base_lr", "0.05", "--warmup_samples", "32", "--ema_half_life", "64"),
        *("--batch_size", str(BATCH), "--log_samples", str(BATCH), "--checkpoint_samples", str(BATCH)),
        *("--eval_data", "shapes", "--eval_samples", "64", "--shuffle_block", "6", "--num_workers", "1"),
        *("--keep_checkpoints", "20"),
        *("--precision", "fp32", "--report_to", "none", "--resume_from_checkpoint", "auto", *more),
    ]


def losses(folder: Path) -> dict[int, float]:
    return {record["samples"]: record["loss"] for record in records(folder) if "loss" in record}


@pytest.fixture(scope="module")
def straight(samples, tmp_path_factory) -> tuple[Path, Path, str]:
    """The data, the folder of a run that nothing interrupts, and what it prints."""
    data = tmp_path_factory.mktemp("stages") / "tars"
    data.mkdir()
    for shard in range(4):
        write_tar(data / f"{shard}.tar", samples[32 * shard : 32 * (shard + 1)])
    folder = data.parent / "run"
    run = run_program(PRETRAIN, *words(data, folder))
    assert run.returncode == 0, run.stderr[-3000:]
    return data, folder, run.stdout


def test_a_run_killed_in_each_stage_ends_in_the_same_bits(straight, tmp_path):
    data, whole, _ = straight
    folder = tmp_path / "run"
    for kill in range(len(STAGES)):
        (tmp_path / str(kill)).mkdir()
        run = Watched(tmp_path / str(kill), words(data, folder), STEP_SECONDS="0.1")
        try:
            run.wait_for_steps(4 * kill + 2)
        finally:
            run.program.kill()
    finished = run_program(PRETRAIN, *words(data, folder))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert losses(folder) == losses(whole) and len(losses(whole)) == 16
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_each_stage_encodes_its_own_patches_and_tokens(straight):
    _, folder, said = straight
    for number, kept in enumerate(KEPT, start=1):
        of_stage = [record for record in records(folder) if record.get("phase") == f"stage {number}"]
        assert len(of_stage) == 4 and {record["kept_patches"] for record in of_stage} == {kept}
    tokens = [record["text_tokens"] for record in records(folder) if "text_tokens" in record]
    assert max(tokens[:4]) < min(tokens[4:8]) <= max(tokens[4:8]) < min(tokens[8:])
    assert "stage 1: 64 samples, images of 16 pixels, texts of 4 tokens, mask ratio 0, peak learning rate" in said
    assert "stage 3: 64 samples, mask ratio 0.75, learning rate as before" in said
    assert "256 samples in 4 stages at mask ratio 0, 0.5, 0.75, 0 in" in said


def test_moments_are_carried_until_a_stage_has_a_learning_rate_of_its_own(straight):
    _, folder, _ = straight
    taken = {}
    for checkpoint in find_checkpoints(folder):
        with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
            taken[int(checkpoint.name[-12:]) // BATCH] = int(file.get_tensor("logit_scale/step"))
    # The checkpoint between two stages is the beginning of the second.
    assert taken == {step: step if step < 12 else step - 12 for step in range(1, 17)}


def test_flops_are_counted_for_each_stage(straight):
    _, folder, _ = straight
    counted = json.loads((folder / "results.json").read_text())["flops_per_sample"]
    config = FlipConfig.from_pretrained(folder)
    for number, kept in enumerate(KEPT, start=1):
        last = [record for record in records(folder) if record.get("phase") == f"stage {number}"][-1]
        assert counted[f"stage {number}"] == step_flops(config, kept, last["text_tokens"], BATCH)


def test_every_evaluation_is_of_whole_images_at_the_models_size(straight):
    _, folder, _ = straight
    evaluated = {
        record["samples"]: record["zero_shot_top1"] for record in records(folder) if "zero_shot_top1" in record
    }
    assert list(evaluated) == list(accumulate(stage["samples"] for stage in STAGES))
    assert json.loads((folder / "results.json").read_text())["top1"] == evaluated[256]


def test_the_model_has_the_last_stages_size_and_runs_in_a_pipeline(straight):
    _, folder, _ = straight
    assert FlipModel.from_pretrained(folder).config.vision_config.image_size == 32
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    answers = classify(Image.new("RGB", (60, 40), "red"), candidate_labels=list(CLASS_NAMES[:3]))
    assert len(answers) == 3 and sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-5)


def test_a_finished_run_is_continued_by_one_more_stage(straight, tmp_path):
    data, whole, _ = straight
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    again = run_program(PRETRAIN, *words(data, folder))
    assert again.returncode == 0 and "To continue it, add a stage to --stages" in again.stdout, again.stderr[-3000:]
    one_more = json.dumps([*STAGES, {"samples": 32, "mask_ratio": 0.5, "base_lr": 0.001, "warmup_samples": 16}])
    run = run_program(PRETRAIN, *words(data, folder), "--stages", one_more)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "stage 5: 32 samples, mask ratio 0.5" in run.stdout and "stage 4:" not in run.stdout
    assert losses(whole).items() <= losses(folder).items() and len(losses(folder)) == 18
