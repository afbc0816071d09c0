"""Plans a run on hardware that is not at hand: memory, time, data, network, cost.

    flip-hf plan vit_l16 --gpu H100-SXM --gpus 8 --nodes 4
    flip-hf plan vit_b16 --gpu A100-80GB --mfu scripts/results/step_vit_b16_a100.json --batch_size 16384
    flip-hf plan --check                # plan against measurement, on the device at hand

RECIPE and all options of `flip-hf pretrain` are understood. What is assumed is printed below the tables.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flip_hf.console.endings import end_with
from flip_hf.console.fields import require
from flip_hf.console.files import read_text, try_file
from flip_hf.console.json_types import JsonObject
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.program import command_line
from flip_hf.console.ranges import FRACTION, integer, number
from flip_hf.redaction import install, redact
from flip_hf.training.accelerators import ACCELERATORS, DeviceSheet, find_accelerator, named_accelerator
from flip_hf.training.arguments import Arguments
from flip_hf.training.recipes import parse_arguments

DEFAULT_MFU = 0.25
DEFAULT_MFU_SOURCE = (
    "a cautious default: open_clip's H/14 reached 0.24, 32 G samples in 5,600 A100-days; give your own with --mfu"
)
_POSITIVE = number(0, 1e12, open_low=True)
DEFAULT_CORE = 250.0
DEFAULT_CORE_SOURCE = "a guess for JPEGs of 256 pixels; measure yours"


def gpu(text: str) -> DeviceSheet:
    """A GPU of the table, as argparse's type."""
    try:
        return named_accelerator(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> ScriptParser:
    """The plan's own options."""
    parser = ScriptParser(
        prog="flip-hf plan", description="Plans a run. Options of `flip-hf pretrain` are understood too."
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", default="vit_l16", help="name or YAML file (vit_l16)")
    parser.add_argument(
        "--gpu",
        type=gpu,
        default=named_accelerator("H100-SXM"),
        help=f"H100-SXM if not given; one of {', '.join(each.name for each in ACCELERATORS)}",
    )
    parser.add_argument("--gpus", type=integer(1, 1_000_000), default=8, help="GPUs of a node (8)")
    parser.add_argument("--nodes", type=integer(1, 1_000_000), default=1, help="machines (1)")
    parser.add_argument(
        "--masks", type=FRACTION, nargs="+", default=[0.0, 0.5, 0.75], help="mask ratios to plan (0 0.5 0.75)"
    )
    parser.add_argument("--mfu", help=f"a fraction ({DEFAULT_MFU}), or a result file of `flip-hf benchmark step`")
    parser.add_argument(
        "--text_tokens", type=integer(1, 2**20), help="tokens that texts are padded to; the context if not given"
    )
    parser.add_argument(
        "--samples_per_core", type=_POSITIVE, help=f"pairs that a core loads in a second ({DEFAULT_CORE:g})"
    )
    parser.add_argument(
        "--sample_kilobytes", type=_POSITIVE, default=25.0, help="kB of an image with its caption in storage (25)"
    )
    parser.add_argument(
        "--dollars_per_gpu_hour", type=number(0, 1_000_000), default=2.5, help="price of a GPU-hour (2.50)"
    )
    parser.add_argument("--check", action="store_true", help="compare with measured memory on the device at hand")
    parser.add_argument("--plot", help="draw days and memory by mask ratio into this picture")
    parser.add_argument("--output", metavar="STEM", help="write the plan to STEM.json and STEM.md")
    return parser


def read_mfu(text: str | None) -> tuple[dict[float, float], str]:
    """MFU by mask ratio, and where it is from.

    Raises:
        ValueError: neither a fraction nor a result of `flip-hf benchmark step` on a GPU of the table.
    """
    if text is None:
        return {0.0: DEFAULT_MFU}, DEFAULT_MFU_SOURCE
    if not Path(text).is_file():
        try:
            mfu = float(text)
        except ValueError:
            raise ValueError(f"--mfu {text!r} is neither a number nor a file.") from None
        require(0 < mfu <= 1, f"--mfu is a fraction of the GPU's peak, in (0, 1], got {mfu}.")
        return {0.0: mfu}, "given"
    try:
        return measured_mfu(json.loads(read_text(text, "a benchmark's result")), text)
    except (KeyError, TypeError, AttributeError, RecursionError):  # JSON of something else
        raise ValueError(f"--mfu {text} is not a result of `flip-hf benchmark step`.") from None


def measured_mfu(result: JsonObject, text: str) -> tuple[dict[float, float], str]:
    """MFU by mask ratio of a result of `flip-hf benchmark step`, and where it is from; `text` names its file.

    Raises:
        ValueError: it is of another question, or of hardware that is not in the table.
    """
    from flip_hf.benchmarks.candidates import OURS
    from flip_hf.benchmarks.step import model_flops

    require(result.get("question") == "step", f"--mfu {text} is not a result of `flip-hf benchmark step`.")
    gpu = find_accelerator(result["hardware"])
    peak = gpu.peak(result["precision"]) if gpu else None
    if peak is None:
        raise ValueError(f"--mfu {text} was measured on {result['hardware']}, whose peak is not in the table.")
    rates = {
        row["mask_ratio"]: model_flops(result, row["mask_ratio"]) / statistics.median(row["seconds"]) / peak
        for row in result["rows"]
        if row["candidate"] == OURS
    }
    return rates, f"measured: {result['command']} on {result['hardware']}"


def read_arguments(recipe: str, rest: list[str], own: Sequence[str]) -> Arguments:
    """Reads the arguments of the run; data need not be named, since none is read.

    Args:
        recipe: its name or file.
        rest: options of `flip-hf pretrain`.
        own: names of the plan's own options, for a hint where one of the rest is no option of either.
    """
    words = [recipe, "--train_data", "shapes", *rest]
    return parse_arguments(words, default_recipe="vit_l16", more_options=own)


def plan(options: argparse.Namespace, arguments: Arguments, command: str) -> None:
    """Plans and prints."""
    from flip_hf.planning.memory import model_bytes
    from flip_hf.planning.plan import Cluster, make_run
    from flip_hf.planning.report import make_report, to_markdown
    from flip_hf.training.phases import plan_phases

    core = options.samples_per_core
    gpu = options.gpu
    mfu, mfu_source = read_mfu(options.mfu)
    run = make_run(arguments, options.text_tokens)
    gpus = options.gpus * options.nodes
    require(
        not run.records_graphs or (gpus == 1 and run.micro_batch_size in (None, run.batch_size)),
        "--speed_ups cuda_graphs supports a single process and a batch in one piece: give --gpus 1 and no "
        "--micro_batch_size, or leave it out.",
    )
    dollars = options.dollars_per_gpu_hour
    kilobytes = options.sample_kilobytes
    cluster = Cluster(gpu, gpus, mfu, core or DEFAULT_CORE, kilobytes * 1000, dollars)
    vision: Any = run.config.vision_config
    peak = gpu.peak("bf16" if run.bf16 else "fp32")
    precision = "bf16" if run.bf16 else "fp32"
    require(peak is not None, f"{gpu.name} has no bfloat16; use --precision fp32.")
    shape = (vision.num_hidden_layers, vision.hidden_size, vision.patch_size, vision.image_size)
    head = {
        "recipe": options.recipe,
        "command": redact(command),
        "model": f"ViT of {shape[0]} x {shape[1]}, patch {shape[2]}, {model_bytes(run.config).trainable / 4e6:.0f} M "
        f"parameters, {shape[3]} pixels, batch {run.batch_size:,}, {precision}",
        "hardware": f"{options.nodes} x {options.gpus} {gpu.name}: {gpu.memory / 1e9:g} GB, "
        f"{(peak or 0) / 1e12:g} TFLOP/s dense {precision} each",
        "mfu": {f"{ratio:g}": value for ratio, value in mfu.items()},
        "mfu_source": mfu_source,
        "loader_source": "given" if core else DEFAULT_CORE_SOURCE,
        "is_paper_model": shape == (24, 1024, 16, 224),
    }
    report = make_report(run, cluster, options.masks, plan_phases(arguments), head)
    page = to_markdown(report, run, cluster)
    write(options.output, report, page)
    if options.plot:
        from flip_hf.planning.picture import draw_plan

        draw_plan(report, Path(options.plot))


def try_outputs(options: argparse.Namespace) -> None:
    """Tries the files that are asked for, before anything is computed.

    Raises:
        ValueError: one cannot be written.
    """
    from flip_hf.evaluation.plots import try_picture

    for suffix in (".json", ".md") if options.output else ():
        try_file(f"{options.output}{suffix}", "--output")
    if options.plot:
        try_picture(options.plot, "--plot")


def write(stem: str | None, report: dict, page: str) -> None:
    """Prints the page; writes it and the report where asked for."""
    print(page)
    if stem:
        Path(f"{stem}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        Path(f"{stem}.md").write_text(page, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """Plans or checks; a mistake ends in one line."""
    install()
    parser = make_parser()
    options, rest = parser.parse_known_args(argv)
    command = command_line("plan", argv)
    try:
        arguments = read_arguments(options.recipe, rest, parser.names())
        try_outputs(options)
        if options.check:
            from flip_hf.planning.memory_check import check_markdown, check_memory

            report = check_memory(redact(command))
            write(options.output, report, check_markdown(report))
        else:
            plan(options, arguments, command)
    except (ValueError, OSError) as error:
        end_with(error)
