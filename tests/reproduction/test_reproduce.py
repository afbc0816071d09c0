"""The reproduction: its plan, one run of every kind for real, what it says of points, and that it goes on."""

import json
import runpy
import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from flip_hf.data import shapes
from flip_hf.reproduction.figures import findings_table, speed_table, write_report
from flip_hf.reproduction.findings import AGREES, CLAIMS, DISAGREES, MISSING, NOISE, Claim, Finding, findings
from flip_hf.reproduction.plan import Scale, planned_runs, words_of
from flip_hf.reproduction.running import Point, Points, RunFailed, training_rate
from flip_hf.reproduction.speedup import SpeedUp, best_recipe, speed_up, steady, summary
from flip_hf.training.recipes import parse_arguments
from tests.training.conftest import ROOT

SCRIPT = str(ROOT / "scripts" / "reproduce.py")
RUNS = {run.name: run for run in planned_runs(Scale.of_recipe("scenes", 64 * 128))}


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
    assert len(seen) == len(planned_runs(Scale.of_recipe("scenes", 64 * 128)))


def test_every_claim_is_about_runs_that_are_planned():
    for claim in CLAIMS:
        for name in (claim.first, claim.second):
            run, _, way = name.partition(":")
            assert run in RUNS and bool(way) == (RUNS[run].kind == "inference")


def test_sizes_are_in_the_papers_proportions():
    options = {name: run.options for name, run in RUNS.items()}
    assert options["mask0-full"]["train_samples"] == 2 * options["mask75-half"]["train_samples"] == 8192
    more, less = options["mask75-half-batch2x"], options["mask0-half-batch0.5x"]
    assert more["batch_size"] == 4 * less["batch_size"] == 2 * options["mask75-half"]["batch_size"]
    assert more["train_samples"] == less["train_samples"] == options["mask75-half"]["train_samples"]
    assert more["base_lr"] * more["batch_size"] == pytest.approx(2 * less["base_lr"] * less["batch_size"])
    assert options["mask50-half-tuned"]["base_lr"] == pytest.approx(0.3 * 4e-3)


def test_runs_cost_what_they_encode():
    assert RUNS["mask0-full"].cost == RUNS["mask50-double"].cost == 8192
    assert RUNS["mask75-half-inference"].cost == 0


def test_another_recipe_gives_its_batch_and_its_width():
    scale = Scale.of_recipe("scenes_s16", 64 * 512)
    (run,) = (each for each in planned_runs(scale) if each.name == "mask50-half-reconstruction")
    assert run.options["batch_size"] == 512 and run.options["decoder_config"]["hidden_size"] == 192
    with pytest.raises(FileNotFoundError, match="There is no recipe 'scenes_s61'.*scenes_s16"):
        Scale.of_recipe("scenes_s61", 1)


# -- what is said of points -------------------------------------------------------------------------------------------


def test_a_finding_agrees_disagrees_or_is_within_noise():
    claim = Claim("1a", "more is more", "a", "b", 1.0, 1)
    assert Finding(claim, (50.0, 51.0, 52.0), (40.0, 41.0, 42.0)).verdict == AGREES
    assert Finding(claim, (40.0, 41.0, 42.0), (50.0, 51.0, 52.0)).verdict == DISAGREES
    assert Finding(claim, (50.0, 55.0, 60.0), (49.0, 54.0, 59.0)).verdict == NOISE
    assert Finding(claim, (50.0,), (40.0,)).verdict == NOISE  # one seed tells nothing
    assert Finding(claim, (), (40.0,)).verdict == MISSING
    level = Claim("1f", "nothing changes", "a", "b", -0.2, 0)
    assert Finding(level, (50.0, 50.5, 51.0), (49.8, 50.3, 50.8)).verdict == AGREES
    assert Finding(level, (50.0, 50.1, 50.2), (49.0, 49.1, 49.2)).verdict == AGREES  # told apart, and close
    assert Finding(level, (50.0, 55.0, 60.0), (49.0, 54.0, 59.0)).verdict == NOISE  # perhaps close, perhaps not
    assert Finding(level, (50.0,), (50.0,)).verdict == NOISE
    assert Finding(level, (50.0, 51.0, 52.0), (40.0, 41.0, 42.0)).verdict == DISAGREES


def test_accuracies_are_found_by_run_seed_and_way():
    name = "mask50-half-inference"
    made = [point(name, seed, 0, 0.5, **{"whole": 0.5 + seed / 100, "ensemble": 0.4 + seed / 100}) for seed in (1, 0)]
    found = next(each for each in findings(made) if each.claim.first == f"{name}:whole" and "mean" in each.claim.text)
    assert found.first == (50.0, 51.0) and found.second == (40.0, 41.0) and found.verdict == AGREES


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
    assert "| mask50 | - | **3.54x** (3.54x) |" in speed_table(made) and best_recipe(made) == "mask50-tuned"
    assert best_recipe([each for each in made if "50" not in each.name]) is None  # 75 % is not as good yet
    early = [*made, point("mask0-half", 0, 300, 0.4)]
    assert speed_up(early, "mask50", 0, "mask0-half").factor == pytest.approx(300 / 200)


def test_a_machine_that_drifts_does_not_move_the_times():
    made = [
        *(point("mask0-half", seed, seconds, 0.5) for seed, seconds in ((0, 10), (1, 11), (2, 30))),
        point("mask0-full", 0, 12, 0.5),
        point("mask50-half", 0, 5, 0.5),
        point("mask50-half-tuned", 0, 99, 0.5, start="mask50-half"),
        point("mask50-half-batch2x", 0, 4, 0.5),
        Point("mask50-half-inference", 0, 0, 0.0, 0.5, {}, "mask50-half"),
    ]
    seconds = [each.seconds for each in steady(made)]
    middle = 100 / np.median([100 / 10, 100 / 11, 100 / 30, 100 / 12])
    assert seconds == pytest.approx([middle] * 4 + [5, middle, 4, 0])


def test_seeds_of_a_speed_up_are_summed_up_with_what_they_are():
    assert summary([SpeedUp(2.0), SpeedUp(4.5)]) == (pytest.approx(3.0), "")
    assert summary([SpeedUp(2.0), SpeedUp(4.5, "<")]) == (pytest.approx(3.0), "<")
    assert summary([SpeedUp(2.0, ">"), SpeedUp(4.5, "<")]) == (pytest.approx(3.0), "~")


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
    points = Points(tmp_path / "made", "scenes", extra=TINY, data=shapes.DATA)
    scale = Scale.of_recipe("scenes", 512)
    runs = {run.name: run for run in planned_runs(scale)}
    names = ["mask0-full", "mask50-half", "mask50-half-tuned", "mask50-half-inference", "mask50-half-reconstruction"]
    for name in names:
        points.make(runs[name], seed=0)
    found = {each.name: each for each in points.read()}
    assert set(found) == set(names)
    assert found["mask50-half-tuned"].start == "mask50-half" and found["mask50-half"].seconds > 0
    assert found["mask50-half-inference"].inference["whole"] == found["mask50-half"].top1
    saved = json.loads(points.path("mask50-half", 0).read_text())
    assert saved["command"].startswith("python scripts/pretrain.py scenes") and saved["environment"]["commit"]

    (tmp_path / "made" / "plan.json").write_text(json.dumps({"recipe": "scenes", "budget": 1, "scale": asdict(scale)}))
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--figures_only", "--folder", str(tmp_path / "made"), "--budget", "1"])
    runpy.run_path(SCRIPT, run_name="__main__")
    assert "The paper's findings here: 16 not run, 4 within noise." in capsys.readouterr().out
    report = (tmp_path / "made" / "README.md").read_text()
    assert "| mask50-half-reconstruction | 256 |" in report and "**within noise**" in report and "| not run |" in report
    assert (tmp_path / "made" / "accuracy_over_time.png").stat().st_size > 5000

    # The same command goes on: what is there is not run again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "made" / "points").iterdir()}
    monkeypatch.setattr(sys, "argv", [*sys.argv[:1], "--seeds", "0", "--only", "mask50-half-tuned", *sys.argv[2:]])
    runpy.run_path(SCRIPT, run_name="__main__")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "made" / "points").iterdir()} == before
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--folder", str(tmp_path / "made"), "--budget", "2"])
    with pytest.raises(SystemExit, match="holds runs of --recipe scenes --budget 1"):
        runpy.run_path(SCRIPT, run_name="__main__")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "1", "--list"])
    capsys.readouterr()
    runpy.run_path(SCRIPT, run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == len(runs)

    # A recipe that was changed since makes other runs, which must not be mixed with these.
    before = {"recipe": "scenes", "budget": 1, "scale": asdict(replace(scale, batch=128))}
    (tmp_path / "made" / "plan.json").write_text(json.dumps(before))
    with pytest.raises(SystemExit, match="'batch': 128.*'batch': 64"):
        runpy.run_path(SCRIPT, run_name="__main__")


def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    points = Points(tmp_path, "scenes", extra=["--train_data", "nowhere"])
    with pytest.raises(RunFailed, match=r"(?s)pretrain.py scenes --train_data nowhere.*mask0-full-seed0.txt.*error: "):
        points.make(RUNS["mask0-full"], seed=0)
    assert not points.read()


def test_the_tables_hold_what_the_points_say(tmp_path):
    means = ((0, 0.4), (75, 0.2))
    made = [point(f"mask{mask}-half", seed, 10, top1 + seed / 100) for mask, top1 in means for seed in range(3)]
    table = findings_table(made)
    assert "| 1a | at the same batch, a quarter does worse | -2.8 | -20.0 | 21.0 ± 1.0 against 41.0 ± 1.0 |" in table
    write_report(made, tmp_path, "about\n")
    assert (tmp_path / "findings.png").is_file()


@pytest.mark.parametrize("name", ["reproduce", "reproduce_coarse"])
def test_what_is_published_is_made_of_the_published_points(tmp_path, monkeypatch, name):
    published = ROOT / "scripts" / "results" / name
    shutil.copytree(published, tmp_path / name, ignore=shutil.ignore_patterns("*.png", "README.md"))
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--figures_only", "--folder", str(tmp_path / name)])
    runpy.run_path(SCRIPT, run_name="__main__")
    assert (tmp_path / name / "README.md").read_text() == (published / "README.md").read_text()
    for picture in ("accuracy_over_time.png", "findings.png"):
        assert (tmp_path / name / picture).is_file() and (published / picture).is_file()
