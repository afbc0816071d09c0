"""The plan of a run's own phases: what each costs, the way that fits in all of them, and the sum."""

import json
from dataclasses import replace

import pytest

from flip_hf.planning.phases import list_parts, plan_run
from flip_hf.planning.plan import Cluster, MemoryModel, PlannedRun
from flip_hf.training.accelerators import named_accelerator
from flip_hf.training.flops import sample_flops
from flip_hf.training.phases import plan_phases
from tests.helpers.arguments import parse
from tests.helpers.models import tiny_config
from tests.helpers.programs import ROOT, run_program

WIDE = {"hidden_size": 64, "intermediate_size": 256}
RUN = PlannedRun(tiny_config(WIDE, {**WIDE, "image_size": 64}), 1024, None, 16, True)
CLUSTER = Cluster(named_accelerator("A100-80GB"), 4, {0.0: 0.5, 0.75: 0.25}, 100.0, 20e3, 2.0)
STAGES = [
    {"samples": 40_000, "image_size": 32, "mask_ratio": 0, "text_length": 4},
    {"samples": 30_000, "mask_ratio": 0.5, "text_mask_ratio": 0.5},
    {"samples": 10_000, "mask_ratio": 0},
]


def planned(stages: list[dict], cluster: Cluster = CLUSTER) -> dict:
    run = parse("shapes", "--batch_size", "1024", "--stages", json.dumps(stages))
    return plan_run(plan_phases(run), MemoryModel(RUN), cluster)


def test_each_phase_costs_what_its_images_and_texts_do():
    plan = planned(STAGES)
    small = tiny_config(WIDE, {**WIDE, "image_size": 32})
    expected = [
        sample_flops(small, 0, 4, 1024),
        sample_flops(RUN.config, 0.5, 8, 1024),
        sample_flops(RUN.config, 0, 16, 1024),
    ]
    assert [row["flops_per_sample"] for row in plan["phases"]] == [flops.training for flops in expected]
    assert [row["image_size"] for row in plan["phases"]] == [32, 64, 64] and plan["samples"] == 80_000
    assert plan["flops"] == sum(flops.training * s["samples"] for flops, s in zip(expected, STAGES, strict=True))
    assert plan["days"] == pytest.approx(sum(row["days"] for row in plan["phases"]))
    assert plan["dollars"] == pytest.approx(plan["days"] * 24 * 4 * 2.0)


def test_masked_training_and_tuning_are_summed_and_a_schedule_has_a_row_for_each_ratio():
    words = ["--mask_ratio", "0.75", "--mask_ratio_end", "0.25", "--mask_ratio_steps", "3"]
    run = parse("shapes", "--train_samples", "9000", "--unmasked_samples", "1000", *words)
    rows = plan_run(plan_phases(run), MemoryModel(RUN), CLUSTER)["phases"]
    assert [(row["phase"], row["samples"], row["mask_ratio"]) for row in rows] == [
        *(("masked", 3000, ratio) for ratio in (0.75, 0.5, 0.25)),
        ("unmasked", 1000, 0),
    ]


def test_small_images_run_at_the_rate_of_a_mask_that_leaves_as_many_patches():
    run = parse("shapes", "--batch_size", "1024", "--stages", json.dumps(STAGES))
    parts = list_parts(plan_phases(run), MemoryModel(RUN), CLUSTER)
    assert [part.cluster.mfu for part in parts] == [{0.0: 0.25}, {0.0: 0.25}, {0.0: 0.5}]  # 16, 32 and 64 of 64


def test_the_micro_batch_fits_in_every_phase():
    def bytes_of(image_size: int, micro: int) -> float:
        config = tiny_config(WIDE, {**WIDE, "image_size": image_size})
        return sum(MemoryModel(replace(RUN, config=config)).parts("DDP", 4, micro, 0.0, False).values())

    # Enough for 128 pairs of large images, or for a process's whole 256 of small ones.
    memory = bytes_of(64, 128) + 1
    assert bytes_of(32, 256) < memory < bytes_of(64, 256)
    cluster = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory=memory))
    small, large = ({"samples": 4096, "mask_ratio": 0, "image_size": size} for size in (32, 64))
    assert planned([small], cluster)["chosen"]["micro_batch_size"] == 256
    assert planned([small, large], cluster)["chosen"] == planned([large], cluster)["chosen"]
    nothing = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory=1e6))
    assert planned([small, large], nothing) == {"chosen": None}


def test_the_command_tabulates_the_stages_and_their_sum(tmp_path):
    stages = [{"samples": 65536, "image_size": 32, "mask_ratio": 0}, {"samples": 1024, "mask_ratio": 0.5}]
    words = ["shapes", "--gpus", "1", "--masks", "0", "--stages", json.dumps(stages), "--output", tmp_path / "plan"]
    done = run_program(ROOT / "scripts" / "plan.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| stage 1 | 65,536 | 32 | 0% |" in done.stdout and "| stage 2 | 1,024 | 64 | 50% |" in done.stdout
    assert "| all | 66,560 |" in done.stdout
    report = json.loads((tmp_path / "plan.json").read_text())
    assert [row["phase"] for row in report["run"]["phases"]] == ["stage 1", "stage 2"]
    wrong = run_program(ROOT / "scripts" / "plan.py", "shapes", "--stages", json.dumps(stages[::-1]))
    assert wrong.returncode != 0 and "stage 2: its images of 32 pixels are the last ones" in wrong.stderr
