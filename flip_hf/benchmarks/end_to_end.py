"""Loader and step together: whole training programs on the same tar shards, from files to weights.

Ours is `flip-hf pretrain`; the peer is `open_clip_train.main`, where it is installed with what it needs
(`open_clip_torch[training]`, webdataset below 1.0). They run in turn, each in a process of its own with the same number
of loader workers, and what is reported is what they log of their steps, the first ones left out. Images, captions,
sizes of the towers and batches are the same; crops, tokenizer and context are each program's own.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from flip_hf.benchmarks.candidates import OPEN_CLIP, OURS, peer_versions
from flip_hf.benchmarks.loader import write_shards
from flip_hf.benchmarks.measuring import about, spread
from flip_hf.benchmarks.models import tower_fields
from flip_hf.data.workers import default_workers

WARM_UP = 4  # steps that do not count: workers start, kernels are chosen, graphs are compiled
# What a log line of open_clip_train has of a step, in seconds.
OPEN_CLIP_STEP = re.compile(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)")

# A step that computes for so many times the median has compiled a graph: of texts with a new number of rows.
COMPILING = 10

Steps = list[tuple[float, float]]  # seconds of each step, and those of them that it waited for data


def run_program(argv: list[str], folder: Path) -> None:
    """Runs a training program to its end.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    # Neither asks the Hub for anything: what they need lies in the folder, or in their package.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv[:3])} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def our_run(options: argparse.Namespace, folder: Path, mask_ratio: float) -> Steps:
    """A run of `flip-hf pretrain` with the paper's options and a log line for every step."""
    text, vision, embed = tower_fields(options.architecture)
    output = folder / f"ours_{len(list(folder.glob('ours_*')))}"  # a run writes over no other
    batch_size = options.batch_size
    argv = [sys.executable, "-m", "flip_hf", "pretrain", "--train_data", f"{folder}/*.tar"]
    argv += ["--tokenizer", str(folder / "tokenizer"), "--output_dir", str(output), "--report_to", "none"]
    argv += ["--vision_config", json.dumps(vision), "--text_config", json.dumps(text), "--projection_dim", str(embed)]
    argv += ["--mask_ratio", str(mask_ratio), "--batch_size", str(batch_size), "--log_samples", str(batch_size)]
    argv += ["--train_samples", str(batch_size * (WARM_UP + options.steps)), "--checkpoint_samples", "0"]
    argv += ["--num_workers", str(options.workers), "--precision", options.precision]
    run_program(argv + (["--compile"] if options.compile else []), folder)
    lines = map(json.loads, (output / "log.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [line for line in lines if "step_seconds" in line]
    return [(line["step_seconds"], line["data_wait"] * line["step_seconds"]) for line in steps]


def open_clip_run(options: argparse.Namespace, folder: Path, mask_ratio: float) -> Steps:
    """A run of open_clip's own program with a log line for every step."""
    name = f"open_clip_{len(list(folder.glob('open_clip_*')))}"
    argv = [sys.executable, "-m", "open_clip_train.main", "--model", f"ViT-{options.architecture.replace('/', '-')}"]
    argv += ["--train-data", f"{folder}/{{00000..{options.shards - 1:05d}}}.tar", "--dataset-type", "webdataset"]
    argv += ["--train-num-samples", str(options.batch_size * (WARM_UP + options.steps)), "--epochs", "1"]
    argv += ["--batch-size", str(options.batch_size), "--workers", str(options.workers), "--device", options.device]
    argv += ["--force-patch-dropout", str(mask_ratio), "--log-every-n-steps", "1", "--save-frequency", "0"]
    argv += ["--precision", "amp_bf16" if options.precision == "bf16" else "fp32", "--logs", str(folder)]
    run_program([*argv, "--name", name] + (["--torchcompile"] if options.compile else []), folder)
    log = (folder / name / "out.log").read_text(encoding="utf-8")
    return [(float(seconds), float(waited)) for waited, seconds in OPEN_CLIP_STEP.findall(log)]


def without_compilation(steps: Steps) -> Steps:
    """Returns the steps that compiled nothing: a graph takes a minute and more, and a run of days compiles a few."""
    usual = statistics.median(seconds - waited for seconds, waited in steps)
    return [(seconds, waited) for seconds, waited in steps if seconds - waited <= COMPILING * usual]


def benchmark_end_to_end(options: argparse.Namespace) -> dict:
    """Every program at every mask ratio, in turn."""
    options.workers = options.workers or max(1, default_workers())
    options.shards = max(2, options.workers)  # open_clip wants one for each worker
    has_peer = "open_clip" in options.peers and find_spec("open_clip_train") and find_spec("webdataset")
    programs = {OURS: our_run, **({OPEN_CLIP: open_clip_run} if has_peer else {})}
    rows = [
        {"candidate": name, "mask_ratio": ratio, "images_per_second": [], "data_wait": [], "compiling_steps": []}
        for ratio in options.mask_ratios
        for name in programs
    ]
    with tempfile.TemporaryDirectory() as name, tqdm(total=options.repeats * len(rows), unit="run") as bar:
        image_bytes = write_shards(Path(name), options.shards)
        for _ in range(options.repeats):
            for row in rows:
                bar.set_description(f"{row['candidate']} {row['mask_ratio']:.0%}")
                every = programs[row["candidate"]](options, Path(name), row["mask_ratio"])[-options.steps :]
                steps = without_compilation(every) if options.compile else every
                row["compiling_steps"].append(len(every) - len(steps))
                seconds, waited = (sum(values) for values in zip(*steps, strict=True))
                row["images_per_second"].append(options.batch_size * len(steps) / seconds)
                row["data_wait"].append(waited / seconds)
                bar.update()
    return {
        "question": "end-to-end",
        **{name: getattr(options, name) for name in ("architecture", "batch_size", "precision", "workers", "steps")},
        **{"compiled": options.compile, "repeats": options.repeats, "image_bytes": round(image_bytes)},
        "peers": peer_versions(),
        "rows": rows,
    }


def end_to_end_markdown(result: dict) -> str:
    """A table of images a second, the ratio to ours at the same mask ratio, and the share of waiting."""
    medians = {(r["candidate"], r["mask_ratio"]): statistics.median(r["images_per_second"]) for r in result["rows"]}
    versions = "".join(f", {name} {number}" for name, number in result["peers"].items())
    left_out = sum(sum(row.get("compiling_steps", ())) for row in result["rows"])
    compiled = f", compiled (steps in which a graph was compiled, and left out: {left_out})"
    lines = [
        f"Training from tar shards, ViT-{result['architecture']}, batch {result['batch_size']}, {result['precision']}"
        f"{compiled if result['compiled'] else ''}, {result['workers']} loader workers, {result['steps']} steps a "
        f"run after {WARM_UP} that do not count; synthetic JPEGs with a short side of 480 pixels, "
        f"{result['image_bytes'] / 1000:.0f} kB on average{versions}. {about(result, result['repeats'])}",
        "| program | masked | images/s (min - max) | flip_hf is faster by | time spent waiting for data (min - max) |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        median = medians[row["candidate"], row["mask_ratio"]]
        ours = medians[OURS, row["mask_ratio"]]
        rates = row["images_per_second"]
        waits = row["data_wait"]
        lines.append(
            f"| {row['candidate']} | {row['mask_ratio']:.0%} | {spread(rates, ',.1f')} "
            f"| {ours / median:.2f}x | {spread(waits, '.1%')} |"
        )
    return "\n".join(lines) + "\n"
