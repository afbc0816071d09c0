"""Runs the points one after the other, each in its own process, and keeps the result as a JSON file."""

import json
import multiprocessing
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from flip_hf.console.json_types import JsonObject
from flip_hf.console.program import PROGRAM, command_line
from flip_hf.data import scenes
from flip_hf.data.embedded import EmbeddedData
from flip_hf.reproduction.plan import Experiment, words_of
from flip_hf.training.hardware import device_name

# Its processes start with everything imported, which would take each of them ten seconds.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["flip_hf.training.build", "flip_hf.evaluation.command", "matplotlib.figure"])


class RunFailed(RuntimeError):
    """A run failed; the message names it and its log."""


@dataclass(frozen=True)
class Point:
    """The result of a run with one seed.

    Attributes:
        name, seed: the run.
        samples: samples seen in training, without those of the run that it started from.
        seconds: time of training steps, without data preparation, evaluation and saving.
        top1: zero-shot accuracy on whole images, in [0, 1].
        inference: accuracies of `whole`, `one view` and `ensemble`, for a run that measures these.
        start: name of the run that it started from.
        data_wait: share of the training time in which steps waited for data, in [0, 1]; not part of `seconds`.
        retained: accuracy on retained data, of a run that measures it.
        before: `top1` and `retained` before such a run.
    """

    name: str
    seed: int
    samples: int
    seconds: float
    top1: float
    inference: dict[str, float]
    start: str | None
    data_wait: float = 0.0
    retained: float | None = None
    before: tuple[float, float] | None = None


class Points:
    """The points of a folder: `points/NAME-seedN.json`, and the models in `models/`.

    Args:
        folder: folder of the whole reproduction.
        recipe: recipe of every run.
        extra: more options for every run, over the recipe's.
        data: data that inference is measured on.
    """

    def __init__(self, folder: Path, recipe: str, extra: list[str] | None = None, data: EmbeddedData = scenes.DATA):
        self.folder = folder
        self.recipe = recipe
        self.extra = extra or []
        self.data = data

    def path(self, name: str, seed: int) -> Path:
        return self.folder / "points" / f"{name}-seed{seed}.json"

    def model(self, name: str, seed: int) -> Path:
        return self.folder / "models" / f"{name}-seed{seed}"

    def read(self) -> list[Point]:
        """Reads all finished points, sorted by name and seed."""
        found = [json.loads(path.read_text()) for path in (self.folder / "points").glob("*.json")]
        points = [Point(**{name: each[name] for name in Point.__dataclass_fields__ if name in each}) for each in found]
        return sorted(points, key=lambda point: (point.name, point.seed))

    def make(self, run: Experiment, seed: int) -> None:
        """Executes a run, and writes its point.

        Raises:
            RunFailed: the run ended with an error.
        """
        measure = {"training": self._train, "inference": self._infer, "interpolation": self._interpolate}[run.kind]
        point = {**_empty(run, seed), **measure(run, seed), "environment": environment(), "finished": time.time()}
        path = self.path(run.name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(point, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)  # so that a point is complete, or absent

    def _train(self, run: Experiment, seed: int) -> JsonObject:
        output = self.model(run.name, seed)
        shutil.rmtree(output, ignore_errors=True)
        options: JsonObject = {**run.options, "seed": seed, "output_dir": output}
        if run.start is not None:
            options |= {"model_name_or_path": self.model(run.start, seed), "vision_config": "", "text_config": ""}
        words = [self.recipe, *self.extra, *words_of(options)]
        run_command("pretrain", words, self.folder / "logs" / f"{run.name}-seed{seed}.txt")
        results = json.loads((output / "results.json").read_text())
        rate = training_rate(output / "log.jsonl")
        return {
            "command": command_line("pretrain", words),
            "samples": results["samples"],
            "seconds": results["samples"] / rate,
            "samples_per_second": rate,
            "data_wait": results["data_wait"],
            "top1": results["top1"],
            **_retention(results),
        }

    def _infer(self, run: Experiment, seed: int) -> JsonObject:
        assert run.start is not None
        output = self.folder / "inference" / f"{run.name}-seed{seed}"
        model = str(self.model(run.start, seed))
        words = [model, "--tasks", "masked", "--data", self.data.name, "--templates", *self.data.templates]
        words += words_of({**run.options, "output_dir": output})
        run_command("evaluate", words, self.folder / "logs" / f"{run.name}-seed{seed}.txt")
        (result,) = json.loads((output / "results.json").read_text())["results"]
        ways = {way: result["metrics"][f"{way}, top1"] for way in ("whole", "one view", "ensemble")}
        return {"command": command_line("evaluate", words), "inference": ways, "top1": ways["whole"]}

    def _interpolate(self, run: Experiment, seed: int) -> JsonObject:
        assert run.start is not None
        output = self.folder / "interpolation" / f"{run.name}-seed{seed}"
        shutil.rmtree(output, ignore_errors=True)
        first = json.loads(self.path(run.start, seed).read_text())["start"]
        ends = [str(self.model(name, seed)) for name in (first, run.start)]
        words = [*ends, *words_of({**run.options, "output_dir": output})]
        run_command("interpolate", words, self.folder / "logs" / f"{run.name}-seed{seed}.txt")
        curves = json.loads((output / "interpolation.json").read_text())["curves"]
        (top1,), (retained,) = ([each["top1"] for each in curves[name]["points"]] for name in ("data", "retain_data"))
        return {"command": command_line("interpolate", words), "top1": top1, "retained": retained}


def _retention(results: JsonObject) -> JsonObject:
    """Returns the fields of a point about retained data, from a run's results; none where it had no such data."""
    retained = results.get("retention", {}).get("retained")
    if retained is None:
        return {}
    own = results["retention"]["own"]
    return {"retained": retained["after"], "before": (own["before"], retained["before"])}


def _empty(run: Experiment, seed: int) -> JsonObject:
    return {"name": run.name, "seed": seed, "start": run.start, "samples": 0, "seconds": 0.0, "inference": {}}


def training_rate(log: Path) -> float:
    """Returns samples per second of training steps alone: those of each phase at the median of its log lines.

    The run's first line is left out, since its steps warm caches up.
    """
    records = [json.loads(line) for line in log.read_text().splitlines()]
    timed = [record for record in records if "data_wait" in record]
    rates: dict[str, list[float]] = {}
    samples: dict[str, int] = {}
    for before, record in zip((None, *timed), timed, strict=False):
        phase = record["phase"]
        samples[phase] = samples.get(phase, 0) + record["samples"] - (before["samples"] if before else 0)
        if before or len(timed) == 1:
            rates.setdefault(phase, []).append(record["samples_per_second"] / (1 - record["data_wait"]))
    seconds = sum(samples[phase] / statistics.median(many) for phase, many in rates.items())
    return sum(samples[phase] for phase in rates) / seconds


def _commit() -> str | None:
    """The commit of this file's clone; None for an installed package, around which a repository of others may lie."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(Path(__file__).parent)]
    if subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True).returncode:
        return None
    return subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def environment() -> JsonObject:
    """Describes the hardware and code that made a point."""
    return {
        "commit": _commit(),
        "hardware": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def run_command(command: str, words: list[str], log: Path) -> None:
    """Runs a subcommand of `flip-hf` in its own process, with its output in the log.

    Raises:
        RunFailed: the run ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _SERVER.Process(target=_become, args=(command, words, str(log)))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    if process.exitcode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise RunFailed(f"{command_line(command, words)}\nended with {process.exitcode}; its log is {log}:\n{last}")


def _become(command: str, words: list[str], log: str) -> None:
    """Runs a subcommand, as the whole life of a forked process."""
    multiprocessing.set_start_method(None, force=True)  # the default again, for its own workers
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    sys.argv = [PROGRAM, command, *words]
    runpy.run_module("flip_hf", run_name="__main__")
