"""The reproduction: its plan, one run of every kind for real, what it says of points, and that it goes on."""

import json
import runpy
import sys

import numpy as np
import pytest

from flip_hf.data import shapes
from flip_hf.reproduction.figures import findings_table, speed_table, write_report
from flip_hf.reproduction.findings import AGREES, CLAIMS, DISAGREES, MISSING, NOISE, Claim, Finding, findings
from flip_hf.reproduction.plan import planned_runs, words_of
from flip_hf.reproduction.running import Point, Points, RunFailed, training_rate
from flip_hf.reproduction.speedup import speed_up
from flip_hf.training.recipes import parse_arguments
from tests.training.conftest import ROOT

SCRIPT = str(ROOT / "scripts" / "reproduce.py")
RUNS = {run.name: run for run in planned_runs(64 * 128)}


def point(name: str, seed: int, seconds: float, top1: float, start: str | None = None, **more) -> Point:
    return Point(name, seed, samples=100, seconds=seconds, top1=top1, inference=more, start=start)


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_every_run_is_one_that_the_trainer_takes_and_starts_from_one_before_it():
    seen = set()
    for name, run in RUNS.items():
        assert run.start is None or run.start in seen
        seen.add(name)
        if run.kind == "training":
            start = ["--model_name_or_path", "x", "--vision_config", "", "--text_config", ""] if run.start else []
            words = ["scenes", *start, *words_of(run.options)]
            arguments = parse_arguments(words, ROOT / "scripts" / "recipes", "shapes")
            assert arguments.optimization.train_samples % arguments.optimization.batch_size == 0
    assert len(seen) == len(planned_runs(64 * 128))


def test_every_claim_is_about_runs_that_are_planned():
    for claim in CLAIMS:
        for name in (claim.first, claim.second):
            run, _, way = name.partition(":")
            assert run in RUNS and bool(way) == (RUNS[run].kind == "inference")


def test_sizes_are_in_the_papers_proportions():
    options = {name: run.options for name, run in RUNS.items()}
    assert options["mask0-full"]["train_samples"] == 2 * options["mask75-half"]["train_samples"] == 8192
    assert options["mask75-half-batch512"]["batch_size"] == 4 * options["mask75-half"]["batch_size"]
    assert options["mask75-half-batch512"]["train_samples"] == options["mask75-half"]["train_samples"]


# -- what is said of points -------------------------------------------------------------------------------------------


def test_a_finding_agrees_disagrees_or_is_within_noise():
    claim = Claim("1a", "more is more", "a", "b", 1.0, 1)
    assert Finding(claim, (50.0, 51.0, 52.0), (40.0, 41.0, 42.0)).verdict == AGREES
    assert Finding(claim, (40.0, 41.0, 42.0), (50.0, 51.0, 52.0)).verdict == DISAGREES
    assert Finding(claim, (50.0, 55.0, 60.0), (49.0, 54.0, 59.0)).verdict == NOISE
    assert Finding(claim, (50.0,), (40.0,)).verdict == NOISE  # one seed tells nothing
    assert Finding(claim, (), (40.0,)).verdict == MISSING
    level = Claim("1f", "nothing changes", "a", "b", -0.2, 0)
    assert Finding(level, (50.0, 55.0, 60.0), (49.0, 54.0, 59.0)).verdict == AGREES
    assert Finding(level, (50.0, 51.0, 52.0), (40.0, 41.0, 42.0)).verdict == DISAGREES


def test_accuracies_are_found_by_run_seed_and_way():
    name = "mask50-half-inference"
    made = [point(name, seed, 0, 0.5, **{"whole": 0.5, "one view": 0.3, "ensemble": 0.4}) for seed in (1, 0)]
    found = next(each for each in findings(made) if each.claim.first == f"{name}:whole" and "mean" in each.claim.text)
    assert found.first == (50.0, 50.0) and found.second == (40.0, 40.0) and found.verdict == AGREES


def test_the_speed_up_is_read_off_between_two_lengths_and_counts_the_tuning():
    along = (("quarter", 100, 0.3), ("half", 200, 0.4), ("full", 400, 0.6))
    made = [
        point("mask0-full", 0, 1000, 0.5),
        *(point(f"mask50-{name}", 0, t, a) for name, t, a in along),
        *(
            point(f"mask50-{name}-tuned", 0, 100, a, start=f"mask50-{name}")
            for name, a in (("quarter", 0.5), ("half", 0.6), ("full", 0.7))
        ),
        *(point(f"mask75-{name}", 0, t, 0.4) for name, t in (("quarter", 50), ("half", 100), ("full", 250))),
    ]  # fmt: skip
    assert speed_up(made, "mask50", 0).factor == pytest.approx(1000 / np.sqrt(200 * 400))
    tuned = speed_up(made, "mask50-tuned", 0)
    assert (tuned.factor, tuned.bound) == (1000 / 200, ">")  # the shortest run is as good already
    assert str(speed_up(made, "mask75", 0)) == "<4.00x" and speed_up(made, "mask75-tuned", 0) is None
    assert "| mask50 | 3.54x | 3.54x (3.54 - 3.54) |" in speed_table(made)


def test_data_preparation_is_not_in_the_time(tmp_path):
    lines = [
        {"samples_per_second": 1.0, "data_wait": 0.0},
        {"samples_per_second": 100.0, "data_wait": 0.5},
        {"top1": 1},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert training_rate(tmp_path / "log.jsonl") == 200


# -- for real ---------------------------------------------------------------------------------------------------------

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = [
    *("--train_data", "shapes", "--log_samples", "64", "--report_to", "none", "--text_config", json.dumps(TOWER)),
    *("--vision_config", json.dumps({**TOWER, "image_size": 32, "patch_size": 8})),
]


def test_runs_of_every_kind_make_points_and_the_report_is_made_of_these_alone(tmp_path, monkeypatch, capsys):
    points = Points(tmp_path / "made", extra=TINY, data=shapes.DATA)
    runs = {run.name: run for run in planned_runs(512)}
    names = ["mask0-full", "mask50-half", "mask50-half-tuned", "mask50-half-inference", "mask50-half-reconstruction"]
    for name in names:
        points.make(runs[name], seed=0)
    found = {each.name: each for each in points.read()}
    assert set(found) == set(names)
    assert found["mask50-half-tuned"].start == "mask50-half" and found["mask50-half"].seconds > 0
    assert found["mask50-half-inference"].inference["whole"] == found["mask50-half"].top1
    saved = json.loads(points.path("mask50-half", 0).read_text())
    assert saved["command"].startswith("python scripts/pretrain.py scenes") and saved["environment"]["commit"]

    (tmp_path / "made" / "plan.json").write_text(json.dumps({"budget": 1, "samples": 512}))
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--figures_only", "--folder", str(tmp_path / "made"), "--budget", "1"])
    runpy.run_path(SCRIPT, run_name="__main__")
    report = (tmp_path / "made" / "README.md").read_text()
    assert "| mask50-half-reconstruction | 256 |" in report and "**within noise**" in report and "| not run |" in report
    assert (tmp_path / "made" / "accuracy_over_time.png").stat().st_size > 5000

    # The same command goes on: what is there is not run again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "made" / "points").iterdir()}
    monkeypatch.setattr(sys, "argv", [*sys.argv[:1], "--seeds", "0", "--only", "mask50-half-tuned", *sys.argv[2:]])
    runpy.run_path(SCRIPT, run_name="__main__")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "made" / "points").iterdir()} == before
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--folder", str(tmp_path / "made"), "--budget", "2"])
    with pytest.raises(SystemExit, match="holds runs of --budget 1"):
        runpy.run_path(SCRIPT, run_name="__main__")


def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    points = Points(tmp_path, extra=["--train_data", "nowhere"])
    with pytest.raises(RunFailed, match=r"(?s)pretrain.py scenes --train_data nowhere.*mask0-full-seed0.txt.*error: "):
        points.make(RUNS["mask0-full"], seed=0)
    assert not points.read()


def test_the_tables_hold_what_the_points_say(tmp_path):
    made = [point(f"mask{mask}-half", seed, 10, top1) for mask, top1 in ((0, 0.4), (75, 0.2)) for seed in range(3)]
    table = findings_table(made)
    assert "| 1a | at the same batch, a quarter does worse | -2.8 | -20.0 | 20.0 ± 0.0 against 40.0 ± 0.0 |" in table
    write_report(made, tmp_path, "about\n")
    assert (tmp_path / "findings.png").is_file()
