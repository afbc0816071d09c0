"""The reproduction's script: runs of every kind for real, what it refuses, and that what is published is its work."""

import json
import shutil
from pathlib import Path

import pytest

from flip_hf.commands.reproduce import main
from flip_hf.data import shapes
from flip_hf.reproduction.figures import write_report
from flip_hf.reproduction.plan import Scale, planned_runs
from flip_hf.reproduction.running import Points, RunFailed
from flip_hf.training.recipes import RECIPES, recipe_options
from tests.helpers.labelled import labelled_pictures
from tests.helpers.programs import ROOT

SCALE = Scale.of_recipe("scenes", 512)
RUNS = {run.name: run for run in planned_runs(SCALE)}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = [
    *("--train_data", "shapes", "--log_samples", "64", "--report_to", "none", "--text_config", json.dumps(TOWER)),
    *("--vision_config", json.dumps({**TOWER, "image_size": 32, "patch_size": 8})),
]
MADE = ("mask0-full", "mask50-half", "mask50-half-tuned", "mask50-half-inference", "mask50-half-reconstruction")


def write_plan(folder: Path, **changes) -> None:
    (first, *_) = sorted((folder / "points").glob("*.json"))
    plan = {"recipe": "scenes", "budget": 1, "samples": SCALE.samples, "options": recipe_options("scenes", RECIPES)}
    plan["environment"] = json.loads(first.read_text())["environment"]
    (folder / "plan.json").write_text(json.dumps({**plan, **changes}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    points = Points(tmp_path_factory.mktemp("made"), "scenes", extra=TINY, data=shapes.DATA)
    for name in MADE:
        points.make(RUNS[name], seed=0)
    return points.folder


@pytest.fixture
def made(trained, tmp_path) -> Path:
    """A folder of one's own with a point of every kind, and the plan that they are of."""
    shutil.copytree(trained, tmp_path / "made")
    write_plan(tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def reproduce(capsys):
    """Runs the command with these words, and returns what it printed."""

    def run(*words: object) -> str:
        capsys.readouterr()
        main([str(word) for word in words])
        return capsys.readouterr().out

    return run


def test_runs_of_every_kind_make_points(trained):
    points = Points(trained, "scenes")
    found = {each.name: each for each in points.read()}
    assert set(found) == set(MADE)
    assert found["mask50-half-tuned"].start == "mask50-half" and found["mask50-half"].seconds > 0
    assert found["mask50-half-inference"].inference["whole"] == found["mask50-half"].top1
    assert 0 < found["mask0-full"].data_wait < 1
    saved = json.loads(points.path("mask50-half", 0).read_text())
    assert saved["command"].startswith("flip-hf pretrain scenes") and saved["environment"]["commit"]


def test_photographs_with_labels_make_a_point_and_their_own_report(tmp_path):
    labelled_pictures(96).to_parquet(str(tmp_path / "train.parquet"))
    labelled_pictures(30).to_parquet(str(tmp_path / "test.parquet"))
    data = ["--train_data", str(tmp_path / "train.parquet"), "--eval_data", str(tmp_path / "test.parquet")]
    points = Points(tmp_path / "made", "cifar10", extra=[*TINY[2:], *data, "--caption_column", "fine_label"])
    for name in ("mask75-half", "mask75-half-pairs"):
        points.make({run.name: run for run in planned_runs(SCALE, "photos")}[name], seed=0)
    found = points.read()
    write_report(found, tmp_path, "about", "photos")
    report = (tmp_path / "README.md").read_text()
    assert "equal captions as positives help, 75 % masked" in report and "1d" not in report
    logs = [(points.folder / "logs" / f"{each.name}-seed0.txt").read_text() for each in found]
    assert ["Positives of an image" in log for log in logs] == [True, False]


def test_the_report_is_made_of_the_points_alone(made, reproduce):
    for folder in ("models", "logs", "inference"):
        shutil.rmtree(made / folder)
    printed = reproduce("--figures_only", "--folder", made)
    assert "The paper's findings here: 22 not run, 4 within noise." in printed
    report = (made / "README.md").read_text()
    assert "| mask50-half-reconstruction | 256 |" in report and "**within noise**" in report and "| not run |" in report
    assert (made / "accuracy_over_time.png").stat().st_size > 5000


def test_the_same_command_resumes_and_repeats_no_run(made, reproduce):
    before = {path: path.stat().st_mtime_ns for path in (made / "points").iterdir()}
    (made / "models" / "mask50-half-tuned-seed0" / "results.json").unlink()  # nothing starts from it
    reproduce("--seeds", 0, "--only", "mask50-half-tuned", "--folder", made, "--budget", 1)
    assert {path: path.stat().st_mtime_ns for path in (made / "points").iterdir()} == before
    listed = reproduce("--list", "--folder", made, "--budget", 1)
    assert len(listed.splitlines()) == len(RUNS) and "mask75-half-grid" in listed


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["--budget", "2"], {}, "holds runs with budget 1, not 2.0: give another --folder"),
        ([], {"options": {"batch_size": 128, "seed": 1}}, "batch_size 128, not 64;.*seed 1, not None;"),
        ([], {"environment": {"hardware": "an abacus"}}, "holds runs with hardware an abacus, not "),
        (["--only", "mask57"], {}, "no run has 'mask57' in its name: mask0-quarter, "),
    ],
)
def test_runs_that_are_not_alike_are_not_mixed(made, reproduce, words, changes, said):
    write_plan(made, **changes)
    with pytest.raises(SystemExit, match=said):
        reproduce("--folder", made, "--budget", 1, *words)


def test_points_without_their_plan_are_named(made, reproduce, tmp_path):
    (made / "plan.json").unlink()
    with pytest.raises(SystemExit, match="has points and no plan.json"):
        reproduce("--figures_only", "--folder", made)
    with pytest.raises(SystemExit, match="there are no points in .*leave out --figures_only"):
        reproduce("--figures_only", "--folder", tmp_path / "none")


def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    points = Points(tmp_path, "scenes", extra=["--train_data", "nowhere"])
    with pytest.raises(
        RunFailed, match=r"(?s)flip-hf pretrain scenes --train_data nowhere.*mask0-full-seed0.txt.*error: "
    ):
        points.make(RUNS["mask0-full"], seed=0)
    assert not points.read()


@pytest.mark.parametrize("name", ["reproduce", "reproduce_coarse"])
def test_published_figures_are_made_of_the_published_points(tmp_path, reproduce, name):
    published = ROOT / "scripts" / "results" / name
    shutil.copytree(published, tmp_path / name, ignore=shutil.ignore_patterns("*.png", "README.md"))
    reproduce("--figures_only", "--folder", tmp_path / name)
    assert (tmp_path / name / "README.md").read_text() == (published / "README.md").read_text()
    for picture in ("accuracy_over_time.png", "findings.png"):
        assert (tmp_path / name / picture).is_file() and (published / picture).is_file()
