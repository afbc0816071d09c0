"""zero_shot.py, benchmark.py and the README, run as a user runs them."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from PIL import Image

from tests.training.conftest import ROOT, trained  # noqa: F401


def run(*argv: str, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (64, 64), (235, 55, 55)).save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_zero_shot_prints_an_answer_a_person_can_read(trained, picture):  # noqa: F811
    done = run("scripts/zero_shot.py", str(trained[0]), picture, picture, "--labels", "red circle", "blue square")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and lines[0].startswith(f"{picture}: ")
    best, second = (float(re.search(r"([\d.]+)%", line).group(1)) for line in lines[1:3])
    assert best >= second and best + second == pytest.approx(100, abs=0.2)
    assert lines[0].endswith(" ".join(lines[1].split()[:2]))


def test_zero_shot_names_what_it_cannot_read(trained, tmp_path, picture):  # noqa: F811
    (tmp_path / "text.jpg").write_text("no image")
    cases = [
        ([str(trained[0]), str(tmp_path / "text.jpg"), "--labels", "a"], "text.jpg is not an image"),
        ([str(trained[0]), str(tmp_path / "none.jpg"), "--labels", "a"], "none.jpg cannot be read: No such file"),
        ([str(trained[0]), picture, "--labels", "a", "--template", "x"], "no {} for the label"),
        ([str(tmp_path), picture, "--labels", "a"], "cannot be loaded"),
    ]
    for argv, message in cases:
        done = run("scripts/zero_shot.py", *argv)
        assert done.returncode != 0 and message in done.stderr, (argv, done.stderr[-500:])
        assert "Traceback" not in done.stderr


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark

    return benchmark


def test_zero_shot_benchmark_measures_the_pipeline_too(benchmark, tmp_path, monkeypatch):
    from benchmarks import zero_shot

    monkeypatch.setattr(zero_shot, "LABELS", 4)
    monkeypatch.setattr(zero_shot, "IMAGES", 2)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    options = ["--repeats", "2", "--device", "cpu", "--output", "x"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "zero-shot", *options])
    benchmark.main()
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["labels"] == 4 and len(result["seconds"]) == 3
    assert "\n| pipeline, 80 templates |" in (tmp_path / "x.md").read_text()


@pytest.fixture
def tiny_benchmark(benchmark, tmp_path, monkeypatch):
    """Runs a question on a tiny architecture; its result, and its table."""
    tiny = {"vision": (64, 1, 2), "text": (64, 1, 2), "patch": 32, "embed": 16}
    monkeypatch.setitem(benchmark.ARCHITECTURES, "B/16", tiny)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)

    def measure(*options: str) -> tuple[dict, str]:
        common = ["--batch_size", "4", "--repeats", "2", "--device", "cpu", "--output", "x"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *options, *common])
        benchmark.main()
        return json.loads((tmp_path / "x.json").read_text()), (tmp_path / "x.md").read_text()

    return measure


def test_step_benchmark_measures_all_candidates_in_one_run(tiny_benchmark):
    result, table = tiny_benchmark("step")
    measured = {(row["candidate"], row["mask_ratio"]) for row in result["rows"]}
    masked = {"flip_hf"} | ({"open_clip"} if find_spec("open_clip") else set())
    assert measured == {(name, ratio) for name in masked for ratio in (0, 0.5, 0.75)} | {("CLIPModel", 0)}
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in result["rows"])
    assert result["command"] in table and table.count("\n| flip_hf | ") == 3
    assert "captions of 15.75 tokens in the mean, packed by flip_hf, " in table


def test_inference_benchmark_measures_images_and_texts(tiny_benchmark):
    result, table = tiny_benchmark("inference")
    candidates = 3 if find_spec("open_clip") else 2
    assert len(result["seconds"]) == 2 * candidates
    assert table.count("\n| images | ") == table.count("\n| texts | ") == candidates
    assert re.search(r"\| images \| flip_hf \| .* \| 1.00x \|", table)


def test_a_plan_takes_the_rate_that_the_step_benchmark_measured(tiny_benchmark, tmp_path):
    import plan

    result, table = tiny_benchmark("step", "--peers", "--mask_ratios", "0.5")
    result |= {"hardware": "NVIDIA L4", "precision": "bf16"}
    (tmp_path / "x.json").write_text(json.dumps(result))
    rates, _ = plan.read_mfu(str(tmp_path / "x.json"))
    share = float(re.search(r"\| (\d+)% \|$", table, flags=re.M).group(1)) / 100
    assert set(rates) == {0.5} and rates[0.5] == pytest.approx(share * result["matrix_flops"] / 121e12, rel=0.2)


def test_loss_benchmark_shows_time_and_memory_in_fresh_processes(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.loss.find_spec", lambda name: None)  # open_clip is not always installed
    options = ["--pairs", "3072", "--tile_sizes", "256", "--repeats", "1", "--device", "cpu", "--output", "x"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "loss", *options])
    benchmark.main()
    points = json.loads((tmp_path / "x.json").read_text())["points"]
    assert [p["candidate"] for p in points] == ["flip_hf, tiles of 256", "dense"]
    assert all(len(p["seconds"]) == 1 and p["seconds"][0] > 0 for p in points)
    tiled, dense = (p["peak_bytes"][0] for p in points)
    matrix = 4 * 3072**2
    assert dense > 3 * matrix > tiled  # the embeddings and their gradients make two
    assert "\n| 3,072 | flip_hf, tiles of 256 | " in (tmp_path / "x.md").read_text()


def test_loss_benchmark_leaves_out_what_does_not_fit(benchmark):
    from benchmarks.loss import loss_markdown, measure_alone

    assert measure_alone("dense", 10**7, "cpu") is None
    point = {"pairs": 10**7, "candidate": "dense", "seconds": [], "peak_bytes": []}
    result = {"embedding": 512, "repeats": 1, "points": [point], **benchmark.environment("cpu")}
    assert "| 10,000,000 | dense | not measured: too little memory |" in loss_markdown(result)


def test_readme_code_runs_as_printed(trained, tmp_path):  # noqa: F811
    """Every Python block, in order, beside a trained model."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "shapes").symlink_to(trained[0])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    done = run("-c", "\n".join(blocks), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "red circle" in done.stdout


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", text, flags=re.M):
        assert f"\n{target}:" in makefile
    for path in set(re.findall(r"scripts/[\w/]+\.(?:py|yaml)", text)):
        assert (ROOT / path).is_file(), path


def test_loader_benchmark_reads_shards_with_every_mask_and_crop(benchmark, tmp_path, monkeypatch):
    from benchmarks import loader

    monkeypatch.setattr(loader, "PER_SHARD", 32)
    monkeypatch.setattr(loader, "DISTINCT", 2)
    monkeypatch.setattr("benchmarks.loader.find_spec", lambda name: None)  # open_clip is not always installed
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    options = ["--batch_size", "4", "--mask_ratios", "0.75", "--repeats", "1", "--seconds", "0.01", "--output", "x"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "loader", *options])
    benchmark.main()
    result = json.loads((tmp_path / "x.json").read_text())
    names = ["flip_hf 75% masked, open_clip's crops", "flip_hf 75% masked, FLIP's crops"]
    assert list(result["samples_per_second"]) == names and 40_000 < result["image_bytes"] < 100_000
    assert all(values[0] > 0 for values in result["samples_per_second"].values())
