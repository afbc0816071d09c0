"""A run says whether data or compute held it up, and what to change."""

import json
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from flip_hf.data.stream import TrainStream
from flip_hf.training.bottleneck import bottleneck
from flip_hf.training.build import build_trainer
from flip_hf.training.engine import Trainer
from flip_hf.training.recipes import parse_arguments
from tests.helpers.pretraining import SHORT, TINY
from tests.helpers.programs import ROOT


def verdict(waits: list[float], *argv: str):
    arguments = parse_arguments(["--train_data", "shapes", *argv], ROOT / "flip_hf" / "recipes", "shapes")
    records = [{"samples": 1, "zero_shot_top1": 0.5}, *({"samples": 1, "data_wait": wait} for wait in waits)]
    return bottleneck(records, arguments, Accelerator(cpu=True))


def test_the_median_decides_since_workers_start_in_the_first_line():
    share, text = verdict([0.9, 0.01, 0.02])
    assert share == 0.02 and text.startswith("compute: steps waited for data 2% of the time; faster with ")
    share, text = verdict([0.0, 0.4, 0.5])
    assert share == 0.4 and text.startswith("data: steps waited for it 40% of the time; ")
    assert verdict([]) == (None, "unknown: no step was logged")


@pytest.mark.parametrize(
    ("cores", "workers", "advice"),
    [
        (8, 2, "try --num_workers 7, now 2"),
        (8, 7, "every core is in use, 8 a"),
        (1, 0, "every core is in use, 1 a"),
        (2, 0, "try --num_workers 1"),
    ],
)
def test_a_run_that_waits_is_warned_of_idle_cores(cores, workers, advice, monkeypatch):
    monkeypatch.setattr("flip_hf.training.bottleneck.cores_per_process", lambda: cores)
    assert advice in verdict([0.5], "--num_workers", str(workers))[1]


def test_advice_names_only_options_not_in_use():
    assert verdict([0.0], "--mask_ratio", "0.5")[1].endswith(
        "faster with --compile, a higher --mask_ratio, more devices"
    )
    used = verdict([0.0], "--mask_ratio", "0.75", "--compile", "True", "--gradient_checkpointing", "True")[1]
    assert used.endswith("faster with a smaller --micro_batch_size without --gradient_checkpointing, more devices")


def test_waiting_is_the_time_of_a_step_without_its_batch(tar_folder, tmp_path, capsys, monkeypatch):
    """By a clock on which a batch takes three seconds to come, and a step one more."""
    clock = [0.0]
    take = TrainStream.view
    step = Trainer._step

    def passing(seconds: float, call):
        def timed(*args):
            clock[0] += seconds
            return call(*args)

        return timed

    monkeypatch.setattr("flip_hf.training.measure.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(TrainStream, "view", passing(3, take))
    monkeypatch.setattr(Trainer, "_step", passing(1, step))
    argv = ["--train_data", str(tar_folder), *TINY, *SHORT, "--num_workers", "0", "--output_dir", str(tmp_path / "out")]
    build_trainer(parse_arguments(argv, ROOT / "flip_hf" / "recipes", "shapes")).run()
    bound = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Bound by  "))
    assert bound.startswith("Bound by  data: steps waited for it 75% of the time; ")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["data_wait"] == 0.75
