"""`flip-hf interpolate` as a person runs it: a model between two, and accuracies along the way."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from flip_hf.commands.interpolate import main
from tests.helpers.evaluating import evaluated
from tests.helpers.labelled import labelled_pictures
from tests.helpers.models import randomize
from tests.helpers.programs import ROOT, run_program


@pytest.fixture
def two(model, processor, tmp_path) -> list[str]:
    folders = []
    for name in ("a", "b"):
        randomize(model, std=0.3).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        folders.append(str(tmp_path / name))
    return folders


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Two folders of labelled pictures, the second one's harder."""
    for name, noise in (("tuned", 0), ("retained", 80)):
        for number, row in enumerate(labelled_pictures(30)):
            folder = tmp_path / name / "test" / ("red", "green", "blue")[row["fine_label"]]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(row["img"]).astype(int) + np.random.default_rng(number).integers(-noise, noise + 1)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return [str(tmp_path / name) for name in ("tuned", "retained")]


def test_the_model_between_two_is_a_folder_like_theirs(two, tmp_path):
    words = [*two, "--alpha", "0.25", "--output_dir", str(tmp_path / "between")]
    made = run_program(ROOT / "scripts" / "interpolate.py", *words)
    assert made.returncode == 0, made.stderr
    assert f"{tmp_path / 'between'}: a FlipModel at alpha 0.25 between {two[0]} and {two[1]}" in made.stdout
    a, b, between = (load_file(f"{folder}/model.safetensors") for folder in (*two, tmp_path / "between"))
    assert all(torch.allclose(value, 0.75 * a[name] + 0.25 * b[name], atol=1e-6) for name, value in between.items())
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "between"))
    answers = classify(Image.new("RGB", (40, 32), "red"), candidate_labels=["red", "blue"])
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)
    assert "0.75 times the weights of" in (tmp_path / "between" / "README.md").read_text()


def test_a_curve_has_at_each_alpha_the_accuracy_of_the_model_that_would_be_written(two, pictures, tmp_path, capsys):
    options = ["--num_workers", "1", "--templates", "{}", "a {} thing"]
    data = ["--data", pictures[0], "--retain_data", pictures[1]]
    main([*two, "--alpha", "1", "0", "0.5", *data, *options, "--output_dir", str(tmp_path / "curve")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "curve" / "interpolation.json").read_text())
    main([*two, "--output_dir", str(tmp_path / "between")])  # at 0.5
    for option, path in zip(("data", "retain_data"), pictures, strict=True):
        found = {point["alpha"]: point["top1"] for point in report["curves"][option]["points"]}
        folders = {0.0: two[0], 0.5: tmp_path / "between", 1.0: two[1]}
        expected = {
            alpha: evaluated(tmp_path / f"{option}-{alpha}", folder, "--data", path, *options[2:])["results"][0]
            for alpha, folder in folders.items()
        }
        assert found == {alpha: result["metrics"]["top1"] for alpha, result in expected.items()}
        assert report["curves"][option]["samples"] == 30
    assert "| alpha | tuned (data), top1 | retained (retain_data), top1 |" in printed and "\n| 0.5 | " in printed
    assert Image.open(tmp_path / "curve" / "interpolation.png").width > 800
    assert not list((tmp_path / "curve").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "1.5"], "--alpha must be between 0 and 1, got 1.5: only models between the two are made."),
        (["--alpha", "-0.1"], "--alpha must be between 0 and 1, got -0.1"),
        (["--alpha", "0", "1"], "several --alpha are measured on --data; give that too"),
        (["--alpha", "0", "0", "--data", "x"], "--alpha names 0 twice"),
        (["--retain_data", "x"], "--retain_data needs --data; give that too."),
        (["--data", "x", "--retain_split", "y"], "--retain_split needs --retain_data"),
        (["--data", "x", "--class_names", "none.txt"], "There is no file none.txt with class names"),
        (["--data", "none"], "--data none cannot be measured: "),
        (["--output_dir", "A"], "exists already and is not an empty folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(words, message, two, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    words = [two[0] if word == "A" else word for word in words]
    with pytest.raises(SystemExit):
        main([*two, "--output_dir", str(tmp_path / "out"), *words])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert sorted(tmp_path.iterdir()) == before
