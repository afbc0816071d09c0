"""The reproduction: its plan, and what it says of points."""

import json
from dataclasses import replace

import numpy as np
import pytest

from flip_hf.reproduction.figures import findings_table, speed_table, write_report
from flip_hf.reproduction.findings import (
    AGREES,
    CLAIMS,
    DISAGREES,
    MISSING,
    NOISE,
    Claim,
    Finding,
    claims_of,
    findings,
)
from flip_hf.reproduction.plan import SETS, Scale, planned_runs, words_of
from flip_hf.reproduction.running import Point, training_rate
from flip_hf.reproduction.speedup import SpeedUp, best_recipe, speed_up, steady, summary
from flip_hf.training.recipes import parse_arguments
from flip_hf.training.stages import read_stages
from tests.helpers.programs import ROOT

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
            arguments = parse_arguments(words, ROOT / "flip_hf" / "recipes", "shapes")
            assert arguments.optimization.train_samples % arguments.optimization.batch_size == 0
    assert len(seen) == len(planned_runs(Scale.of_recipe("scenes", 64 * 128)))


def test_every_claim_is_about_runs_of_a_set():
    runs = {run.name: run for which in SETS for run in planned_runs(Scale.of_recipe("scenes", 64 * 128), which)}
    for claim in CLAIMS:
        for name in (claim.first, claim.second):
            run, _, way = name.partition(":")
            assert run in runs and bool(way) == (runs[run].kind == "inference")
    assert {claim.text for which in SETS for claim in claims_of(which)} == {claim.text for claim in CLAIMS}


def test_photographs_are_trained_with_and_without_equal_captions_as_positives():
    runs = {run.name: run for run in planned_runs(Scale.of_recipe("scenes", 64 * 128), "photos")}
    assert runs["mask75-half-pairs"].options == {**runs["mask75-half"].options, "positives": "pair"}
    assert {"mask75-half", "mask75-half-grid", "mask75-half-tuned", "mask75-quadruple"} <= runs.keys()
    assert "UniCL" in {claim.table for claim in claims_of("photos")} - {claim.table for claim in claims_of("paper")}


def test_stages_see_as_many_pairs_of_each_size_and_only_they_count_them():
    runs = {run.name: run for run in planned_runs(Scale.of_recipe("cifar10", 64 * 128), "photos")}
    run = runs["mask0-full-stages"]
    assert [stage["image_size"] for stage in run.options["stages"]] == [16, 24, 32]
    assert run.samples == runs["mask0-full"].samples == 8192
    arguments = parse_arguments(["cifar10", *words_of(run.options)], ROOT / "flip_hf" / "recipes", "shapes")
    assert [stage.samples for stage in read_stages(arguments.optimization.stages)] == [21 * 128, 22 * 128, 21 * 128]


def test_the_time_of_a_run_is_that_of_each_of_its_phases(tmp_path):
    def line(samples: int, phase: str, rate: float, wait: float = 0.0) -> str:
        return json.dumps({"samples": samples, "phase": phase, "samples_per_second": rate, "data_wait": wait})

    log = tmp_path / "log.jsonl"
    first = [line(10, "stage 1", 1.0), line(20, "stage 1", 100.0), line(30, "stage 1", 50.0, 0.5)]
    log.write_text("\n".join([*first, json.dumps({"samples": 30, "top1": 0.5}), line(60, "stage 2", 10.0)]))
    assert training_rate(log) == pytest.approx(60 / (30 / 100 + 30 / 10))
    log.write_text(first[0])
    assert training_rate(log) == 1


def test_sizes_are_in_the_papers_proportions():
    options = {name: run.options for name, run in RUNS.items()}
    assert options["mask0-full"]["train_samples"] == 2 * options["mask75-half"]["train_samples"] == 8192
    more = options["mask75-half-batch2x"]
    less = options["mask0-half-batch0.5x"]
    assert more["batch_size"] == 4 * less["batch_size"] == 2 * options["mask75-half"]["batch_size"]
    assert more["train_samples"] == less["train_samples"] == options["mask75-half"]["train_samples"]
    assert more["base_lr"] * more["batch_size"] == pytest.approx(2 * less["base_lr"] * less["batch_size"])
    assert options["mask50-half-tuned"]["base_lr"] == pytest.approx(0.3 * 4e-3)


def test_runs_cost_the_patches_they_encode():
    assert RUNS["mask0-full"].cost == RUNS["mask50-double"].cost == 8192
    assert RUNS["mask75-half-inference"].cost == 0


def test_another_recipe_gives_its_batch_and_its_width():
    scale = Scale.of_recipe("scenes_s16", 64 * 512)
    (run,) = (each for each in planned_runs(scale) if each.name == "mask50-half-reconstruction")
    assert run.options["batch_size"] == 512 and run.options["decoder_config"]["hidden_size"] == 192
    with pytest.raises(FileNotFoundError, match="There is no recipe 'scenes_s61'.*scenes_s16"):
        Scale.of_recipe("scenes_s61", 1)


# -- what is said of points -------------------------------------------------------------------------------------------


RISES = Claim("1a", "more is more", "a", "b", 1.0, 1)
LEVEL = Claim("1f", "nothing changes", "a", "b", -0.2, 0)


@pytest.mark.parametrize(
    ("claim", "first", "second", "verdict"),
    [
        (RISES, (50.0, 51.0, 52.0), (40.0, 41.0, 42.0), AGREES),
        (RISES, (40.0, 41.0, 42.0), (50.0, 51.0, 52.0), DISAGREES),
        (RISES, (50.0, 55.0, 60.0), (49.0, 54.0, 59.0), NOISE),
        (RISES, (50.0,), (40.0,), NOISE),  # one seed tells nothing
        (RISES, (), (40.0,), MISSING),
        (LEVEL, (50.0, 50.5, 51.0), (49.8, 50.3, 50.8), AGREES),
        (LEVEL, (50.0, 50.1, 50.2), (49.0, 49.1, 49.2), AGREES),  # distinguished, and close
        (LEVEL, (50.0, 50.5, 51.0), (48.5, 49.0, 49.5), NOISE),  # distinguished, and perhaps close
        (LEVEL, (50.0, 55.0, 60.0), (49.0, 54.0, 59.0), NOISE),  # perhaps close, perhaps not
        (LEVEL, (50.0,), (50.0,), NOISE),
        (LEVEL, (50.0, 51.0, 52.0), (40.0, 41.0, 42.0), DISAGREES),
    ],
)
def test_a_finding_agrees_disagrees_or_is_within_noise(claim, first, second, verdict):
    assert Finding(claim, first, second).verdict == verdict


def test_a_model_is_compared_with_itself_seed_by_seed():
    claim = Claim("1d", "whole beats half", "a", "b", 1.0, 1, paired=True)
    assert Finding(claim, (40.0, 50.0, 60.0), (38.0, 47.5, 58.5)).verdict == AGREES
    assert Finding(replace(claim, paired=False), (40.0, 50.0, 60.0), (38.0, 47.5, 58.5)).verdict == NOISE
    assert Finding(replace(claim, expected=0), (40.0, 50.0), (40.0, 50.0)).verdict == AGREES  # the very same
    made = [point("mask50-half", seed, 1, 0.4 + seed / 10) for seed in (0, 1, 2)]
    made += [point("mask50-half-tuned", seed, 1, 0.5, "mask50-half") for seed in (2, 1)]
    tuned = next(each for each in findings(made) if each.claim.first == "mask50-half-tuned")
    assert tuned.second == (50.0, pytest.approx(60.0)) and tuned.difference == pytest.approx(-5)  # no tuned seed 0


def test_accuracies_are_found_by_run_seed_and_way():
    name = "mask50-half-inference"
    made = [point(name, seed, 0, 0.5, **{"whole": 0.5 + seed / 100, "ensemble": 0.4 + seed / 100}) for seed in (1, 0)]
    found = next(each for each in findings(made) if each.claim.first == f"{name}:whole" and "mean" in each.claim.text)
    assert found.first == (50.0, 51.0) and found.second == (40.0, 41.0) and found.verdict == AGREES


@pytest.fixture
def timed():
    """Points of three mask ratios at three lengths, of which that of 50 % is tuned, too."""
    along = (("quarter", 100, 0.3), ("half", 200, 0.4), ("full", 400, 0.6))
    return [
        point("mask0-full", 0, 1000, 0.5),
        *(point(f"mask50-{name}", 0, t, a) for name, t, a in along),
        *(
            point(f"mask50-{name}-tuned", 0, 100, a, start=f"mask50-{name}")
            for name, a in (("quarter", 0.5), ("half", 0.6), ("full", 0.7))
        ),
        *(point(f"mask75-{name}", 0, t, 0.4) for name, t in (("quarter", 50), ("half", 100), ("full", 250))),
    ]  # fmt: skip


def test_the_speed_up_is_read_off_between_two_lengths(timed):
    assert speed_up(timed, "mask50", 0).factor == pytest.approx(1000 / np.sqrt(200 * 400))
    assert str(speed_up(timed, "mask75", 0)) == "<4.00x" and speed_up(timed, "mask75-tuned", 0) is None
    early = [*timed, point("mask0-half", 0, 300, 0.4)]
    assert speed_up(early, "mask50", 0, "mask0-half").factor == pytest.approx(300 / 200)


def test_the_speed_up_counts_the_tuning(timed):
    tuned = speed_up(timed, "mask50-tuned", 0)
    assert (tuned.factor, tuned.bound) == (1000 / 200, ">")  # the shortest run is as good already
    lost = [each for each in timed if each.name != "mask50-quarter"]
    assert speed_up(lost, "mask50-tuned", 0).factor == 1000 / 300  # a tuned run without its masked time says nothing


def test_the_best_recipe_is_as_good_and_sooner_for_every_seed(timed):
    assert "| mask50 | - | **3.54x** (3.54x) |" in speed_table(timed) and best_recipe(timed) == "mask50-tuned"
    assert best_recipe([each for each in timed if "50" not in each.name]) is None  # 75 % is not as good yet
    more = [*timed, point("mask0-full", 1, 1000, 0.5)]
    assert best_recipe(more) is None  # not known of every seed
    slow = [replace(each, seconds=20 * each.seconds) if each.name.startswith("mask50") else each for each in timed]
    assert best_recipe(slow) is None  # as good, and not sooner


def test_waits_for_data_are_counted_apart():
    made = [
        replace(point("mask0-full", 0, 90, 0.5), data_wait=0.1),
        *(
            replace(point(f"mask50-{name}", 0, t, a), data_wait=0.2)
            for name, t, a in (("half", 20, 0.4), ("full", 40, 0.5))
        ),
    ]
    assert "| mask50 | - | **2.25x** (2.25x) | **2.00x** (2.00x) |" in speed_table(made)
    assert "waits" not in speed_table([replace(each, data_wait=0.0) for each in made])
    assert [each.data_wait for each in steady([*made, replace(made[-1], seed=1, data_wait=0.4)])][1:] == [
        0.2
    ] * 3  # the median


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


def test_seeds_of_a_speed_up_are_summed_up_and_listed():
    assert summary([SpeedUp(2.0), SpeedUp(4.5)]) == (pytest.approx(3.0), "")
    assert summary([SpeedUp(2.0), SpeedUp(4.5, "<")]) == (pytest.approx(3.0), "<")
    assert summary([SpeedUp(2.0, ">"), SpeedUp(4.5, "<")]) == (pytest.approx(3.0), "~")


def test_data_preparation_is_not_in_the_time(tmp_path):
    lines = [
        {"samples": 10, "phase": "masked", "samples_per_second": 1.0, "data_wait": 0.0},
        {"samples": 20, "phase": "masked", "samples_per_second": 100.0, "data_wait": 0.5},
        {"top1": 1},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert training_rate(tmp_path / "log.jsonl") == pytest.approx(200)


def test_the_tables_hold_the_points(tmp_path):
    means = ((0, 0.4), (75, 0.2))
    made = [point(f"mask{mask}-half", seed, 10, top1 + seed / 100) for mask, top1 in means for seed in range(3)]
    table = findings_table(made)
    assert "| 1a | at the same batch, a quarter does worse | -2.8 | -20.0 | 21.0 ± 1.0 against 41.0 ± 1.0 |" in table
    write_report(made, tmp_path, "about\n")
    assert (tmp_path / "findings.png").is_file()
    write_report([point("mask75-half-grid", 0, 10, 0.5)], tmp_path, "about\n")  # nothing to compare: no curves


def test_a_recipe_of_another_mask_has_a_curve_of_its_own():
    made = [
        *(point("mask0-full", seed, 100, 0.5) for seed in (0, 1)),
        *(point("mask75-half-grid", seed, 10, 0.4) for seed in (0, 1)),
        *(point("mask75-full-grid", seed, 20, 0.6) for seed in (0, 1)),
        *(point("mask75-full-grid-tuned", seed, 5, 0.7, "mask75-full-grid") for seed in (0, 1)),
    ]
    assert speed_up(made, "mask75-grid", 0).factor == pytest.approx(100 / np.sqrt(200))
    assert str(speed_up(made, "mask75-grid-tuned", 0)) == ">4.00x" and speed_up(made, "mask75", 0) is None
    assert best_recipe(made) == "mask75-grid" and "| mask75-grid-tuned |" in speed_table(made)
    assert [each.seconds for each in steady(made)][-1] == 100  # tuned at the speed of whole images
    assert {name for name in RUNS if "grid" in name} >= {"mask75-half-grid", "mask75-double-grid-tuned"}
