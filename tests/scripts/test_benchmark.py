"""benchmark.py: every question, at the size of a toy."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec

import psutil
import pytest
import torch

from flip_hf.benchmarks import gpu, loader, zero_shot
from flip_hf.benchmarks import step as step_module
from flip_hf.benchmarks.end_to_end import OPEN_CLIP_STEP, run_program, without_compilation
from flip_hf.benchmarks.loss import loss_markdown, measure_alone
from flip_hf.benchmarks.measuring import alternate, environment
from flip_hf.benchmarks.speed_ups import possible_speed_ups
from flip_hf.commands import benchmark
from flip_hf.commands.plan import make_parser as plan_parser
from flip_hf.commands.plan import read_mfu
from flip_hf.console.program import command_line
from tests.helpers.programs import ROOT


def test_zero_shot_benchmark_measures_the_pipeline_too(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_shot, "LABELS", 4)
    monkeypatch.setattr(zero_shot, "IMAGES", 2)
    monkeypatch.chdir(tmp_path)
    benchmark.main(["zero-shot", "--repeats", "2", "--device", "cpu", "--output", "x"])
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["labels"] == 4 and len(result["seconds"]) == 3
    assert "\n| pipeline, 80 templates |" in (tmp_path / "x.md").read_text()


@pytest.fixture
def tiny_benchmark(tmp_path, monkeypatch):
    """Runs a question on a tiny architecture; its result, and its table."""
    tiny = {"vision": (64, 1, 2), "text": (64, 1, 2), "patch": 32, "embed": 16}
    monkeypatch.setitem(benchmark.ARCHITECTURES, "B/16", tiny)
    monkeypatch.chdir(tmp_path)

    def measure(*options: str) -> tuple[dict, str]:
        common = ["--batch_size", "4", "--repeats", "2", "--device", "cpu", "--output", "x"]
        benchmark.main([*options, *common])
        return json.loads((tmp_path / "x.json").read_text()), (tmp_path / "x.md").read_text()

    return measure


def test_evaluation_benchmark_measures_decoding_alone_too(tiny_benchmark):
    result, table = tiny_benchmark("evaluation", "--images", "6", "--workers", "1")
    assert result["images"] == 6 and result["top1"]["flip_hf"] in [number / 6 for number in range(7)]
    measured = {"flip_hf", "flip_hf, class embeddings kept", "flip_hf, decoding alone"}
    peers = {"CLIP_benchmark", "CLIP_benchmark, decoding alone"}
    assert set(result["seconds"]) == (measured if result["missing"] else measured | peers)
    assert "CLIP_benchmark" in (result["missing"] or "CLIP_benchmark") and "\n| flip_hf | " in table


def test_step_benchmark_measures_all_candidates_in_one_run(tiny_benchmark):
    result, table = tiny_benchmark("step")
    measured = {(row["candidate"], row["mask_ratio"]) for row in result["rows"]}
    masked = {"flip_hf"} | ({"open_clip"} if find_spec("open_clip") else set())
    assert measured == {(name, ratio) for name in masked for ratio in (0, 0.5, 0.75)} | {("CLIPModel", 0)}
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in result["rows"])
    assert result["command"] in table and table.count("\n| flip_hf | ") == 3
    assert "captions of 15.75 tokens on average, packed by flip_hf, " in table


def test_inference_benchmark_measures_images_and_texts(tiny_benchmark):
    result, table = tiny_benchmark("inference")
    candidates = 3 if find_spec("open_clip") else 2
    assert len(result["seconds"]) == 2 * candidates
    assert table.count("\n| images | ") == table.count("\n| texts | ") == candidates
    assert re.search(r"\| images \| flip_hf \| .* \| 1.00x \|", table)


def test_mae_benchmark_measures_full_images_and_the_same_decoder(tiny_benchmark):
    result, table = tiny_benchmark("mae", "--mask_ratios", "0", "0.5", "--decoder_blocks", "1")
    rows = {(row["candidate"], row["mask_ratio"]): row for row in result["rows"]}
    assert list(rows) == [("full image", 0), ("flip_hf", 0.5), ("ViTMAEForPreTraining", 0.5)]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in result["rows"])
    full, ours, theirs = (row["flops"] for row in result["rows"])
    patches = 49
    kept = 24
    pixels = 3 * 32**2
    width = 64
    decoder_width = 512
    # The mask saves the encoder's blocks and patches, and the projection of its tokens to the decoder.
    blocks = [24 * width**2 * tokens + 4 * tokens**2 * width for tokens in (1 + patches, 1 + kept)]
    saved = 3 * (blocks[0] - blocks[1]) + (patches - kept) * (4 * pixels * width + 6 * width * decoder_width)
    assert full - ours == saved
    # ViTMAE embeds all patches, and predicts a patch for the class token.
    assert theirs - ours == 4 * (patches - kept) * pixels * width + 6 * pixels * decoder_width
    medians = [statistics.median(row["seconds"]) for row in result["rows"]]
    ratios = rf"{medians[0] / medians[1]:.2f}x \(.*\) \| {full / ours:.2f}x \| 1.00x"
    assert result["command"] in table and re.search(rf"\n\| flip_hf \| 50% \| .* \| {ratios} \|\n", table)


def test_a_plan_takes_the_rate_that_the_step_benchmark_measured(tiny_benchmark, tmp_path):
    result, table = tiny_benchmark("step", "--peers", "--mask_ratios", "0.5")
    result |= {"hardware": "NVIDIA L4", "precision": "bf16"}
    (tmp_path / "x.json").write_text(json.dumps(result))
    rates, _ = read_mfu(str(tmp_path / "x.json"))
    share = float(re.search(r"\| (\d+)% \|$", table, flags=re.M).group(1)) / 100
    assert set(rates) == {0.5} and rates[0.5] == pytest.approx(share * result["matrix_flops"] / 121e12, rel=0.2)


def test_loss_benchmark_shows_time_and_memory_in_fresh_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [
        "--peers",
        "--pairs",
        "3072",
        "--tile_sizes",
        "256",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--output",
        "x",
    ]
    benchmark.main(["loss", *options])
    points = json.loads((tmp_path / "x.json").read_text())["points"]
    assert [p["candidate"] for p in points] == ["flip_hf, tiles of 256", "dense"]
    assert all(len(p["seconds"]) == 1 and p["seconds"][0] > 0 for p in points)
    tiled, dense = (p["peak_bytes"][0] for p in points)
    matrix = 4 * 3072**2
    assert dense > 3 * matrix > tiled  # the embeddings and their gradients make two
    assert "\n| 3,072 | flip_hf, tiles of 256 | " in (tmp_path / "x.md").read_text()


def test_loss_benchmark_leaves_out_sizes_that_do_not_fit():
    assert measure_alone("dense", 10**7, "cpu") is None
    point = {"pairs": 10**7, "candidate": "dense", "seconds": [], "peak_bytes": []}
    result = {"embedding": 512, "repeats": 1, "points": [point], "command": "", **environment("cpu")}
    assert "| 10,000,000 | dense | not measured: too little memory |" in loss_markdown(result)


def test_loader_benchmark_reads_shards_with_every_mask_and_crop(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "PER_SHARD", 32)
    monkeypatch.setattr(loader, "DISTINCT", 2)
    monkeypatch.setattr(loader, "PROFILED", 128)
    monkeypatch.setattr("flip_hf.benchmarks.loader.find_spec", lambda name: None)  # open_clip is not always installed
    monkeypatch.chdir(tmp_path)
    options = ["--batch_size", "4", "--mask_ratios", "0.75", "--repeats", "1", "--seconds", "0.01", "--output", "x"]
    benchmark.main(["loader", *options])
    result = json.loads((tmp_path / "x.json").read_text())
    names = ["flip_hf 75% masked, open_clip's crops", "flip_hf 75% masked, FLIP's crops"]
    names.append("flip_hf 75% masked, FLIP's crops, by edges")
    assert list(result["samples_per_second"]) == names and 40_000 < result["image_bytes"] < 100_000
    assert all(values[0] > 0 for values in result["samples_per_second"].values())
    assert all(0 < share < 0.9 for share in result["shares"].values()) and len(result["shares"]) == 6
    assert "\n| decoding JPEGs | " in (tmp_path / "x.md").read_text()


def test_masks_by_edges_are_compared_with_random_ones_turn_by_turn():
    rates = {"flip_hf, masked": [100.0, 200.0, 300.0], "flip_hf, masked, by edges": [96.0, 200.0, 270.0]}
    result = {"samples_per_second": rates, "versions": {}, "image_bytes": 1, "batch_size": 1, "repeats": 3}
    table = loader.loader_markdown({**result, "command": "", **environment("cpu")})
    assert "| flip_hf, masked, by edges | 200 (96 - 270) | - | 0.960 (0.900 - 1.000) |" in table
    assert "| flip_hf, masked | 200 (100 - 300) | - | - |" in table


@pytest.mark.long
def test_end_to_end_benchmark_runs_the_training_program(tiny_benchmark, monkeypatch):
    monkeypatch.setattr(loader, "PER_SHARD", 32)
    monkeypatch.setattr(loader, "DISTINCT", 2)
    result, table = tiny_benchmark("end-to-end", "--mask_ratios", "0.75", "--steps", "2", "--workers", "1", "--peers")
    (row,) = result["rows"]
    assert row["candidate"] == "flip_hf" and len(row["images_per_second"]) == len(row["data_wait"]) == 2
    assert all(rate > 0 for rate in row["images_per_second"]) and all(0 <= wait <= 1 for wait in row["data_wait"])
    assert "\n| flip_hf | 75% | " in table and "1 loader workers, 2 steps a run after 4 " in table


def test_end_to_end_benchmark_reads_open_clips_log():
    """As open_clip_train 3.3 writes it."""
    line = "Train Epoch: 0 [ 16/96 (8%)] Data (t): 0.512 Batch (t): 4.250, 3.76471/s, 3.76471/s/gpu LR: 0.000000"
    assert OPEN_CLIP_STEP.findall(line) == [("0.512", "4.250")]


def test_end_to_end_benchmark_leaves_out_steps_that_compile_but_none_that_wait():
    usual = [(0.1 + 0.01 * number, 0.02) for number in range(5)]
    waiting = (9.0, 8.9)
    compiling = (61.0, 0.02)
    assert without_compilation([*usual, compiling, waiting]) == [*usual, waiting]


def test_end_to_end_benchmark_reports_a_programs_error(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 3:\nno such recipe"):
        run_program([sys.executable, "-c", "import sys; sys.stderr.write('no such recipe'); sys.exit(3)"], tmp_path)


@pytest.fixture
def two_parts(tmp_path, monkeypatch):
    """Runs `gpu` with one part that works and one that does not; the state of each by its name."""
    parts = (
        gpu.Part("loss", "benchmark", ("loss", "--pairs", "64", "--repeats", "1")),
        gpu.Part("broken", "benchmark", ()),
    )
    monkeypatch.setattr(gpu, "on_cpu", lambda: parts)
    monkeypatch.chdir(tmp_path)

    def run(minutes: str, failed: bool = False) -> dict[str, str]:
        named = "error: parts failed, and their output is in gpu: broken$"
        with pytest.raises(SystemExit, match=named) if failed else nullcontext():
            benchmark.main(["gpu", "--minutes", minutes, "--device", "cpu"])
        rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
        return {row["part"]: row["state"] for row in rows}

    return run


def test_the_parts_of_a_gpu_are_kept_and_the_rest_begins_again(two_parts, tmp_path):
    assert two_parts("0") == {"loss": gpu.NO_TIME, "broken": gpu.NO_TIME}
    assert two_parts("0.01") == {"loss": gpu.ENDED, "broken": gpu.NO_TIME}
    assert two_parts("5", failed=True) == {"loss": gpu.DONE, "broken": gpu.FAILED}
    assert "the following arguments are required: question" in (tmp_path / "gpu" / "broken.txt").read_text()
    assert two_parts("5", failed=True) == {"loss": gpu.KEPT, "broken": gpu.FAILED}
    table = (tmp_path / "gpu.md").read_text()
    assert "| broken | failed | " in table and "\n## loss\n" in table and "| 64 | dense | " in table


def test_a_part_that_another_machine_or_command_measured_begins_again(two_parts, tmp_path):
    (tmp_path / "gpu").mkdir()
    words = ["loss", "--pairs", "64", "--repeats", "1", "--device", "cpu", "--output", str(tmp_path / "gpu" / "loss")]
    result = {**environment("cpu"), "command": command_line("benchmark", words)}
    for other in ({"hardware": "an abacus"}, {"torch": "1.0"}, {"command": "flip-hf benchmark loss --repeats 2"}, {}):
        (tmp_path / "gpu" / "loss.json").write_text(json.dumps({**result, **other}))
        assert two_parts("0")["loss"] == (gpu.NO_TIME if other else gpu.KEPT), other


def test_a_peer_that_cannot_be_imported_is_left_out_and_named(tmp_path, monkeypatch):
    """As open_clip beside a torchvision for another torch: the package is there, its import fails."""
    (tmp_path / "open_clip.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    gpu.import_error.cache_clear()
    try:
        assert gpu.missing_modules(["open_clip"])["open_clip"].endswith("torchvision::nms does not exist")
        peers = [part.words[part.words.index("--peers") + 1 :] for part in gpu.on_gpu() if part.words[0] == "step"]
        assert peers == [("clip",)] * 2 + [()] * 5
    finally:
        gpu.import_error.cache_clear()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_limit_ends_all_processes_of_a_part(tmp_path):
    program = f"sleep 1000 & echo $! > {tmp_path}/child; wait"
    assert gpu.run_within(["sh", "-c", program], tmp_path / "log.txt", 2) == gpu.ENDED
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60  # a killed process takes a moment to end
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_sigterm_ends_the_part_in_hand_too(tmp_path):
    program = f"""
import os, sys
from pathlib import Path
from flip_hf.benchmarks import gpu
with gpu._sigterm_unwinds():
    gpu.run_within(["sh", "-c", "echo $$ > {tmp_path}/child; sleep 1000"], Path({str(tmp_path / "log.txt")!r}), 1000)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as process:
        while process.poll() is None and not (tmp_path / "child").exists():
            time.sleep(0.05)
        time.sleep(0.2)  # until the number is written
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_step_that_a_gpus_memory_is_too_small_for_is_left_out():
    """What a GPU raises is made up; no test has one."""
    calls = {"large": 0, "small": 0}

    def large() -> None:
        calls["large"] += 1
        if calls["large"] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def small() -> None:
        calls["small"] += 1

    too_large: set[str] = set()
    seconds = alternate({"large": large, "small": small}, 3, warm_up=1, too_large=too_large)
    assert too_large == {"large"} and seconds["large"] == [] and len(seconds["small"]) == 3
    assert calls == {"large": 2, "small": 4}
    calls["large"] = 1
    with pytest.raises(torch.OutOfMemoryError):
        alternate({"large": large}, 3)


def test_a_step_benchmark_names_what_did_not_fit(tiny_benchmark, monkeypatch):
    def make_steps(*_: object) -> dict:
        def step(ratio: float) -> None:
            if ratio == 0:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        return {"flip_hf": step}

    monkeypatch.setattr(step_module, "make_steps", make_steps)
    result, table = tiny_benchmark("step", "--mask_ratios", "0", "0.5", "--peers")
    assert [row["mask_ratio"] for row in result["rows"]] == [0.5] and result["too_large"] == ["flip_hf 0%"]
    assert "The device's memory was too small for: flip_hf 0%." in table
    with pytest.raises(SystemExit, match="No step of --batch_size 4 fits into the device's memory"):
        tiny_benchmark("step", "--mask_ratios", "0", "--peers")


def test_the_parts_of_a_gpu_measure_each_speed_up_alone_and_all_together():
    names = [part.name for part in gpu.on_gpu(["fused_qkv", "cuda_graphs"]) if part.name.startswith("speed_ups")]
    chosen = ("fused_qkv", "cuda_graphs", "all")
    assert names == [f"speed_ups_{size}_{each}" for size in ("l16", "b16") for each in chosen]
    assert possible_speed_ups("cpu") == ["fused_qkv", "bf16_residual"]


def test_the_parts_of_a_gpu_are_commands_that_there_are():
    for part in gpu.on_gpu():
        parser = {"benchmark": benchmark.make_parser, "plan": plan_parser}[part.subcommand]()
        options = parser.parse_args([*part.words, "--output", "x"])
        assert part.subcommand == "plan" or options.question in benchmark.QUESTIONS


def test_large_batch_benchmark_measures_steps_in_pieces(tiny_benchmark):
    result, table = tiny_benchmark("large-batch", "--micro_batch_size", "2", "--mask_ratios", "0", "0.75")
    assert [row["mask_ratio"] for row in result["rows"]] == [0, 0.75]
    assert all(len(row["seconds"]) == 2 and row["planned_bytes"] > 0 for row in result["rows"])
    assert "A step of 4 pairs in pieces of 2" in table and result["command"] in table
    with pytest.raises(SystemExit, match="--batch_size 4 is not a multiple of --micro_batch_size"):
        tiny_benchmark("large-batch", "--micro_batch_size", "3")


def test_speed_ups_benchmark_measures_a_step_with_and_without_them(tiny_benchmark):
    result, table = tiny_benchmark("speed-ups", "--mask_ratios", "0.75", "--precision", "bf16")
    fast = "flip_hf, fused_qkv, bf16_residual"
    assert [row["candidate"] for row in result["rows"]] == ["flip_hf", fast]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in result["rows"])
    assert re.search(rf"\n\| {fast} \| 75% \| .* \| \d\.\d+ \(\d\.\d+ - \d\.\d+\) \|\n", table)
    with pytest.raises(SystemExit, match="--speed_ups fp8 needs a CUDA device"):
        tiny_benchmark("speed-ups", "--speed_ups", "fp8", "--precision", "bf16")
    with pytest.raises(SystemExit, match="--speed_ups bf16_residual needs bfloat16"):
        tiny_benchmark("speed-ups", "--speed_ups", "bf16_residual")
