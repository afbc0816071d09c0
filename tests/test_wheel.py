"""The wheel alone: built, installed apart from the sources, and used from an empty folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.pretraining import TINY
from tests.helpers.programs import ROOT

# Runs commands one after the other, each in a fork, which need not import torch and Transformers again.
RUN_ALL = """
import json, multiprocessing, runpy, sys
import flip_hf.evaluation.command, flip_hf.training.build

def run(words):
    sys.argv = words
    try:
        if words[0] == "flip_hf":
            runpy.run_module("flip_hf", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "flip_hf"]
        print("\\nIMPORTED", json.dumps(files), flush=True)

for words in json.loads(sys.argv[1]):
    process = multiprocessing.get_context("fork").Process(target=run, args=(words,))
    process.start()
    process.join()
    print("ENDED", process.exitcode, *words, flush=True)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built of a copy of the sources, by the backend that pyproject.toml names; pip would ask an index for it."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("flip_hf", "modeling", "model_cards"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, "."], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = source.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel alone; the tests' environment has what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    words = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", folder, wheel]
    subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True)
    return folder


@pytest.fixture
def environment(installed) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def test_the_wheel_has_the_package_and_its_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "flip-hf = flip_hf.commands.main:main" in file.read(entry_points).decode()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"flip_hf"}
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flip_hf").rglob("*") if path.suffix in DATA}
    assert len(data) > 50 and data <= names


# Kinds of files that code reads.
DATA = (".yaml", ".txt", ".md", ".typed")


def test_everything_runs_from_an_empty_folder(installed, environment, tmp_path):
    program = str(installed / "bin" / "flip-hf")
    short = ["--train_samples", "64", "--unmasked_samples", "0", "--batch_size", "32", "--warmup_samples", "32"]
    short += [*TINY, "--tokenizer_samples", "500", "--num_workers", "0", "--report_to", "none"]
    one_block = json.dumps({"num_hidden_layers": 1})
    plan = ["vit_b16", "--masks", "0.5", "--vision_config", one_block, "--text_config", one_block]
    calls = [
        [program, "pretrain", "shapes", *short],
        [program, "zero-shot", "runs/shapes", "red.png", "--labels", "red circle", "blue square"],
        [program, "evaluate", "runs/shapes", "--data", "shapes", "--num_workers", "0"],
        ["flip_hf", "plan", *plan],
    ]
    Image.new("RGB", (64, 64), (235, 55, 55)).save(tmp_path / "red.png")
    words = [sys.executable, "-c", RUN_ALL, json.dumps(calls)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    ended = re.findall(r"^ENDED (\S+) ", done.stdout, flags=re.M)
    assert ended == ["0"] * len(calls), done.stdout[-2000:] + done.stderr[-3000:]
    imported = [json.loads(line) for line in re.findall(r"^IMPORTED (.*)$", done.stdout, flags=re.M)]
    assert len(imported) == len(calls)
    assert {Path(file).is_relative_to(installed) for files in imported for file in files} == {True}
    # What the run says to do next is what the second call did.
    assert 'Use it    flip-hf zero-shot runs/shapes IMAGE --labels "' in done.stdout
    assert (tmp_path / "runs" / "shapes" / "evaluation" / "results.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["red.png", "runs"]


def test_the_console_command_starts_by_itself(installed, environment, tmp_path):
    for words in (["--version"], ["pretrain", "--help"]):
        done = subprocess.run(
            [installed / "bin" / "flip-hf", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert "usage: flip-hf pretrain [RECIPE]" in done.stdout and "vit_l16_mask75_text50" in done.stdout
