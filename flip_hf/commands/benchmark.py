r"""Measures the speed of flip_hf beside that of other libraries, in one run on this machine, as ratios.

    flip-hf benchmark step --repeats 5
    flip-hf benchmark step --device cuda --precision bf16 --architecture L/16 --batch_size 256 --repeats 20 \
        --compile --peers open_clip open_clip-strong clip
    flip-hf benchmark inference --repeats 7
    flip-hf benchmark zero-shot --repeats 3
    flip-hf benchmark evaluation --data test.parquet --repeats 3
    flip-hf benchmark loss --repeats 3
    flip-hf benchmark loader --batch_size 128
    flip-hf benchmark end-to-end --device cuda --precision bf16 --architecture L/16 --batch_size 256 \
        --mask_ratios 0.75 --steps 50 --compile
    flip-hf benchmark mae --architecture L/16 --batch_size 8 --repeats 5
    flip-hf benchmark mae --device cuda --precision bf16 --architecture L/16 --batch_size 128 --repeats 20
    flip-hf benchmark large-batch --device cuda --precision bf16 --architecture L/16 --batch_size 65536 \
        --micro_batch_size 512 --mask_ratios 0.75 --repeats 2
    flip-hf benchmark speed-ups --device cuda --precision bf16 --architecture L/16 --batch_size 256 \
        --mask_ratios 0.75 --repeats 10 --compile --speed_ups cuda_graphs
    flip-hf benchmark gpu --minutes 25
    flip-hf benchmark loss --device cuda --pairs 512 4096 32768 65536 --tile_sizes 2048 4096 8192

step         a whole training step (forward, loss, backward, AdamW) at several mask ratios: FLIP, open_clip as installed
             and tuned as far as possible, and Transformers' CLIPModel, with the same shapes, images and texts
inference    features of whole images and texts, by the same models
zero-shot    classification of images by 1,000 labels with a tiny model: ZeroShotClassifier, with its labels encoded
             before, and Transformers' pipeline
evaluation   zero-shot classification of a whole test set, from reading to encoding, by `flip-hf evaluate` and by
             CLIP_benchmark's own loop on the same model, and the share of decoding in each
loss         time and peak memory of the contrastive loss and its gradient: in tiles, with the whole matrix as usual,
             and by open_clip if it is a peer
loader       samples per second that one worker process makes of tar shards: by flip_hf at several mask ratios, at
             random and by edges, and by open_clip's pipeline if it is installed
end-to-end   the training programs of flip_hf and open_clip on such shards, and how long their steps wait for data
mae          a training step of MAE at several mask ratios, against full images with the same decoder and against
             Transformers' ViTMAEForPreTraining
large-batch  a step of many pairs in pieces, and its memory beside the planned one
speed-ups    a step with and without `flip-hf pretrain --speed_ups`
gpu          all of these at the sizes of a large GPU, the most important first. It ends after --minutes, and the next
             call continues with the rest. If a part fails, it ends with an error that names the part.

Candidates take turns, so that a drift of the machine's speed affects all of them alike. Medians and ratios are printed
and, with --output or by gpu, written as JSON and Markdown: below scripts/results if there is such a folder, as in a
clone, else in the current one.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from flip_hf.benchmarks.names import ARCHITECTURES, PEERS
from flip_hf.console.endings import end_with
from flip_hf.console.files import replacing, try_file
from flip_hf.console.json_types import JsonObject
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.program import command_line
from flip_hf.console.ranges import FRACTION, integer, number
from flip_hf.redaction import install, redact
from flip_hf.training.speed_ups import SpeedUp

# Of this repository, for those who measure in a clone of it.
CLONED_RESULTS = Path("scripts/results")
QUESTIONS = (
    "step",
    "inference",
    "zero-shot",
    "evaluation",
    "loss",
    "loader",
    "end-to-end",
    "mae",
    "large-batch",
    "speed-ups",
    "gpu",
)


def make_parser() -> argparse.ArgumentParser:
    """The benchmark's options."""
    parser = ScriptParser(
        prog="flip-hf benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=sorted(QUESTIONS), help="what to measure; see above")
    parser.add_argument("--repeats", type=integer(1, 100_000), default=7, help="measured runs of each candidate (7)")
    parser.add_argument("--device", help="device; cuda if there is one, else cpu, if not given")
    parser.add_argument("--output", help="path of the result files, without ending; if not given, only gpu writes any")
    installed = [*(["open_clip"] if find_spec("open_clip") else []), "clip", "vit_mae"]
    step = parser.add_argument_group("step, inference, evaluation, end-to-end, mae; loss takes --peers")
    step.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="B/16", help="the model's size (B/16)")
    step.add_argument(
        "--mask_ratios",
        type=FRACTION,
        nargs="+",
        default=[0.0, 0.5, 0.75],
        help="fractions of the patches dropped (0 0.5 0.75)",
    )
    step.add_argument("--batch_size", type=integer(1, 2**20), default=16, help="pairs or images per step (16)")
    step.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="precision of the forward pass (fp32)"
    )
    step.add_argument("--compile", action="store_true", help="step: also flip_hf compiled; end-to-end: both compiled")
    step.add_argument(
        "--peers",
        choices=PEERS,
        nargs="*",
        default=installed,
        help="libraries to compare with, where they apply (open_clip if installed, clip, vit_mae)",
    )
    _add_programs(parser)
    _add_losses(parser)
    return parser


def _add_programs(parser: ScriptParser) -> None:
    """Adds the options of the questions about loading, evaluating and training."""
    loader = parser.add_argument_group("loader", "also takes --mask_ratios and --batch_size")
    loader.add_argument(
        "--seconds", type=number(0, 100_000, open_low=True), default=3.0, help="shortest time of a turn (3)"
    )
    evaluation = parser.add_argument_group("evaluation", "also takes --workers")
    evaluation.add_argument(
        "--data", help="labelled pictures, of which the split test is read; drawn pictures if not given"
    )
    evaluation.add_argument(
        "--images", type=integer(1, 10_000_000), default=10_000, help="pictures to read, at most (10,000)"
    )
    end_to_end = parser.add_argument_group("end-to-end")
    end_to_end.add_argument("--steps", type=integer(1, 1_000_000), default=10, help="measured steps of a run (10)")
    end_to_end.add_argument(
        "--workers", type=integer(1, 1024), help="loader workers; chosen by the number of cores if not given"
    )
    large = parser.add_argument_group("large-batch", "also takes --architecture, --mask_ratios and --batch_size")
    large.add_argument("--micro_batch_size", type=integer(1, 2**20), default=16, help="pairs encoded at once (16)")
    speed_ups = parser.add_argument_group("speed-ups", "also takes the options of step")
    speed_ups.add_argument(
        "--speed_ups",
        choices=get_args(SpeedUp),
        nargs="+",
        help="speed-ups to take together; all that this machine can run if not given",
    )
    gpu = parser.add_argument_group("gpu")
    gpu.add_argument(
        "--minutes", type=number(0, 100_000), default=25.0, help="time limit; finished parts are kept (25)"
    )


def _add_losses(parser: ScriptParser) -> None:
    """Adds the options of the questions about MAE and the contrastive loss."""
    mae = parser.add_argument_group("mae")
    mae.add_argument(
        "--decoder_blocks", type=integer(1, 1024), default=8, help="depth of MAE's decoder; the paper also has 1 (8)"
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--pairs",
        type=integer(2, 2**24),
        nargs="+",
        default=[64, 512, 4096, 8192, 16384, 32768],
        help="pairs that are contrasted (64 512 4096 8192 16384 32768)",
    )
    loss.add_argument(
        "--tile_sizes", type=integer(1, 2**24), nargs="+", help="rows of a tile; the default of the loss if not given"
    )


def functions_of(question: str) -> tuple[Callable[[argparse.Namespace], JsonObject], Callable[..., str]]:
    """The functions that measure a question and write the result as Markdown."""
    name = question.replace("-", "_")
    module = import_module(f"flip_hf.benchmarks.{name}")
    return getattr(module, f"benchmark_{name}"), getattr(module, f"{name}_markdown")


def write(stem: Path, result: JsonObject, table: str) -> None:
    """Writes STEM.md and STEM.json, each whole or not at all; the latter last, as it says that there is a result."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".md", table), (".json", json.dumps(result, indent=2) + "\n")):
        with replacing(stem.parent / f"{stem.name}{suffix}") as part:
            part.write_text(text, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """Measures, prints, and writes what was measured; a mistake ends in one line, before anything is measured."""
    install()
    parser = make_parser()
    options = parser.parse_args(argv)
    import torch

    from flip_hf.benchmarks.measuring import environment
    from flip_hf.losses import TILE_SIZE

    options.tile_sizes = options.tile_sizes or [TILE_SIZE]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no error of its own for it
        parser.error(f"--device {options.device} is not a device of this machine: {str(error).splitlines()[0]}")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device is cpu or cuda, got {options.device}; CUDA_VISIBLE_DEVICES chooses among GPUs.")
    torch.manual_seed(0)
    measure, to_markdown = functions_of(options.question)
    results = options.results = CLONED_RESULTS if CLONED_RESULTS.is_dir() else Path()
    options.output = options.output or ("gpu" if options.question == "gpu" else None)
    try:
        if options.output:
            for suffix in (".json", ".md"):
                try_file(results / f"{options.output}{suffix}", "--output")
        result = {**measure(options), "command": redact(command_line("benchmark", argv)), **environment(options.device)}
    except (ValueError, OSError, ImportError) as error:
        end_with(error)
    table = to_markdown(result)
    print(table)
    if options.output:
        write(results / options.output, result, table)
    if result.get("failed"):
        end_with(f"parts failed, and their output is in {result['folder']}: {', '.join(result['failed'])}")
