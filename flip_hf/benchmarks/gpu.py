"""Everything that is measured on a GPU, in the order of importance, within a number of minutes.

Each part is a subcommand of `flip-hf` in a process of its own, which writes its Markdown and JSON files when it is
done: no failure of one ends another. The next call keeps what there is and goes on with the rest; a part that the limit
ends begins again, with the kernels that torch.compile has kept in its cache. On a CPU the parts are toys, to see that
they run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import torch
from tqdm import tqdm

from flip_hf.benchmarks.speed_ups import possible_speed_ups
from flip_hf.console.program import command_line
from flip_hf.training.hardware import device_name
from flip_hf.training.speed_ups import SpeedUp

DONE = "done"
KEPT = "kept"
FAILED = "failed"
NO_TIME = "not run: no time left"
ENDED = "ended by the limit"
# What each peer imports.
STRONG = "open_clip-strong"
PEERS = {"open_clip": ("open_clip",), STRONG: ("open_clip", "timm"), "clip": ()}


@dataclass(frozen=True)
class Part:
    """A measurement.

    Attributes:
        name: name of its result files.
        subcommand: of `flip-hf`.
        words: its further words.
    """

    name: str
    subcommand: str
    words: tuple[str, ...]


def _benchmark(name: str, words: str) -> Part:
    return Part(name, "benchmark", tuple(words.split()))


@cache
def import_error(module: str) -> str | None:
    """Imports a module in a process of its own; returns the last line of its error, None where there is none.

    A package may be there and lack one of its own needs, or be built for another torch.
    """
    tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    if tried.returncode == 0:
        return None
    return (tried.stderr.strip().splitlines() or [f"the process ended with {tried.returncode}"])[-1]


def missing_modules(peers: Sequence[str] = tuple(PEERS)) -> dict[str, str]:
    """Returns the modules of these peers that cannot be imported, and why."""
    modules = {module for peer in peers for module in PEERS[peer]}
    errors = {module: import_error(module) for module in sorted(modules)}
    return {module: error for module, error in errors.items() if error is not None}


def _peers(*peers: str) -> str:
    """Returns the option that names those of these peers that can be imported."""
    return " ".join(["--peers", *(peer for peer in peers if not missing_modules([peer]))])


def _step(name: str, words: str, *peers: str) -> Part:
    """Makes a part of training steps in bf16, beside those of the peers that can be imported."""
    return _benchmark(name, f"step {words} --precision bf16 {_peers(*peers)}")


def _speed_ups(architecture: str, batch_size: int, possible: Sequence[str]) -> tuple[Part, ...]:
    """Makes parts of steps at 75 %, with and without each of the possible speed-ups, and with all of them."""
    common = f"--architecture {architecture} --batch_size {batch_size} --mask_ratios 0.75 --precision bf16 --compile"
    name = architecture.replace("/", "").lower()
    chosen = {**{each: each for each in possible}, "all": " ".join(possible)}
    return tuple(
        _benchmark(f"speed_ups_{name}_{label}", f"speed-ups {common} --repeats 10 --speed_ups {names}")
        for label, names in chosen.items()
    )


def on_gpu(speed_ups: Sequence[str] = get_args(SpeedUp)) -> tuple[Part, ...]:
    """Lists the parts at the sizes of a large GPU, which has these speed-ups."""
    large_batch = "large-batch --batch_size 65536 --micro_batch_size 512 --mask_ratios 0.75 --repeats 2"
    end_to_end = "end-to-end --batch_size 256 --mask_ratios 0.75 --steps 50 --repeats 2 --compile --peers"
    of_l16 = "--architecture L/16 --precision bf16"
    l16 = "--architecture L/16 --batch_size 256 --repeats 10"
    b16 = "--architecture B/16 --batch_size 512 --repeats 10"
    ratios = "--mask_ratios 0 0.5 0.75"
    return (
        _step("step_l16", f"{l16} {ratios}", "open_clip", "clip"),
        _step("step_b16", f"{b16} {ratios}", "open_clip", "clip"),
        # A part for each ratio: a graph of each of two models is compiled, for a minute or more.
        *(
            _step(f"step_l16_compiled_{ratio:.0%}".strip("%"), f"{l16} --mask_ratios {ratio:g} --compile", STRONG)
            for ratio in (0.75, 0.5, 0)
        ),
        _step("step_b16_compiled", f"{b16} {ratios} --compile", STRONG),
        Part("plan_memory", "plan", ("--check",)),
        _benchmark("large_batch_l16", f"{large_batch} {of_l16}"),
        _benchmark("end_to_end_l16", f"{end_to_end} {of_l16}"),
        *_speed_ups("L/16", 256, speed_ups),
        _step("step_h14", "--architecture H/14 --batch_size 128 --mask_ratios 0.5 --repeats 5 --compile"),
        _benchmark("loss", f"loss --pairs 4096 32768 65536 131072 262144 --repeats 2 {_peers('open_clip')}"),
        _benchmark("inference_l16", f"inference --batch_size 512 --repeats 10 {of_l16} {_peers('open_clip', 'clip')}"),
        _benchmark("mae_l16", f"mae --batch_size 256 --repeats 10 {of_l16}"),
        _benchmark("loader", "loader --batch_size 128 --repeats 3"),
        _benchmark("zero_shot", "zero-shot --repeats 3"),
        _benchmark("evaluation_l16", f"evaluation --batch_size 512 --repeats 2 {of_l16}"),
        *_speed_ups("B/16", 128, speed_ups),
    )


def on_cpu() -> tuple[Part, ...]:
    """Lists the parts at the size of toys; nothing is compiled, which takes minutes there."""
    toy = "--architecture tiny/32 --batch_size 4 --repeats 1"
    return (
        _step("step_tiny", f"--mask_ratios 0 0.5 {toy}", "open_clip", "clip"),
        _benchmark("large_batch_tiny", f"large-batch --micro_batch_size 2 --mask_ratios 0.75 {toy}"),
        _benchmark("speed_ups_tiny", f"speed-ups --mask_ratios 0.75 --precision bf16 {toy}"),
        _benchmark("loss_tiny", f"loss --pairs 64 --repeats 1 {_peers('open_clip')}"),
        _benchmark("inference_tiny", f"inference {toy} {_peers('open_clip', 'clip')}"),
        _benchmark("mae_tiny", f"mae --decoder_blocks 1 --mask_ratios 0.75 --peers vit_mae {toy}"),
        _benchmark("evaluation_tiny", f"evaluation --images 8 --workers 1 {toy}"),
    )


def parts_for(device: str) -> tuple[Part, ...]:
    """Lists the parts for a kind of device, the most important first."""
    return on_gpu(possible_speed_ups(device)) if device == "cuda" else on_cpu()


def benchmark_gpu(options: argparse.Namespace) -> dict:
    """Runs the parts that have no result yet, until the minutes are over."""
    deadline = time.monotonic() + 60 * options.minutes
    folder = Path(options.results) / options.output
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for module, error in missing_modules().items():
        print(f"Without {module}, which cannot be imported: {error}", file=sys.stderr)
    with _sigterm_unwinds(), tqdm(parts_for(options.device), unit="part", file=sys.stderr) as bar:
        for part in bar:
            bar.set_description(part.name)
            words = [*part.words, *(["--device", options.device] if part.subcommand == "benchmark" else [])]
            start = time.monotonic()
            state = _run(part.subcommand, words, folder / part.name, options.device, deadline)
            seconds = round(time.monotonic() - start, 1)
            rows.append(
                {"part": part.name, "command": command_line(part.subcommand, words), "state": state, "seconds": seconds}
            )
    failed = [row["part"] for row in rows if row["state"] == FAILED]
    return {
        **{"question": "gpu", "minutes": options.minutes, "folder": str(folder), "missing": missing_modules()},
        **{"rows": rows, "failed": failed},
    }


def _run(subcommand: str, words: list[str], stem: Path, device: str, deadline: float) -> str:
    """Runs a part, unless it has a result or no time is left, with its output in `STEM.txt`; returns its state."""
    words = [*words, "--output", str(stem.absolute())]
    if _has_result(stem, device, command_line(subcommand, words)):
        return KEPT
    left = deadline - time.monotonic()
    if left <= 0:
        return NO_TIME
    return run_within([sys.executable, "-m", "flip_hf", subcommand, *words], stem.with_suffix(".txt"), left)


def run_within(argv: list[str], log: Path, seconds: float) -> str:
    """Runs a program with its output in a file; it and all processes that it started end at the limit."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, **_own_group())
        try:
            return DONE if process.wait(seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            return ENDED
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _own_group() -> dict[str, Any]:
    """Returns what starts a process in a group of its own: none of its processes may disturb the next part.

    But in this session, so that what ends all of a session's processes ends them too; Python 3.10 cannot.
    """
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Makes SIGTERM, which the limit of a job sends, end the part in hand too."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _has_result(stem: Path, device: str, command: str) -> bool:
    """Returns whether a part was measured by this command, on this hardware, with this torch.

    Another command is one with other peers, as an installation has changed.
    """
    path = stem.with_suffix(".json")
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    measured = (found.get("command"), found.get("hardware"), found.get("torch"))
    return measured == (command, device_name(device), torch.__version__)


def gpu_markdown(result: dict) -> str:
    """A list of the parts and how each ended, and the tables of those that have a result."""
    folder = Path(result["folder"])
    lines = [
        f"All parts within {result['minutes']:g} minutes; {result['hardware']}, torch {result['torch']}, transformers "
        f"{result['transformers']}.\n\n`{result['command']}`\n",
        *(f"Without {name}, which cannot be imported: {error}\n" for name, error in result["missing"].items()),
        "| part | state | seconds | command |",
        "|---|---|---|---|",
        *(f"| {row['part']} | {row['state']} | {row['seconds']:g} | `{row['command']}` |" for row in result["rows"]),
    ]
    for row in result["rows"]:
        table = folder / f"{row['part']}.md"
        if table.is_file():
            lines += ["", f"## {row['part']}", "", table.read_text(encoding="utf-8").rstrip()]
    return "\n".join(lines) + "\n"
