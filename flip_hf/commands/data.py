r"""Checks a data set before training, or writes it as shuffled shards, so that streaming it is fast everywhere.

    flip-hf data check 'shards/{00000..00999}.tar' checks/web
    flip-hf data check my/images checks/images --caption_column label --samples_per_second 2500
    flip-hf data check 'shards/{00000..00999}.tar' checks/web --eval_data my/images --eval_split test
    flip-hf data shard my/images sharded --format parquet --resize 256
    flip-hf data shard 'shards/*.tar' sharded --without checks/web --duplicates near --overlap near

`check` reads all samples once, and reports what training would skip and why, sizes, duplicates, images that are in
evaluation data, too, and the loader's speed.
`shard` reads any data that training can read, and writes tar or parquet shards. If it is interrupted, the same command
resumes it.
"""

import argparse
import glob
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flip_hf.console.endings import INTERRUPTED, end_with
from flip_hf.console.fields import require
from flip_hf.console.files import try_folder
from flip_hf.console.lock import lock_folder, unlock_folder
from flip_hf.console.names import counted
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.program import command_line
from flip_hf.console.ranges import SEED, integer, number
from flip_hf.redaction import install, redact

if TYPE_CHECKING:
    from flip_hf.data.rendering import Colour
    from flip_hf.data.sources import Source
    from flip_hf.training.arguments import DataArguments

PATCH = 16


def make_parser() -> ScriptParser:
    """The command's options."""
    parser = ScriptParser(
        prog="flip-hf data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_check(commands.add_parser("check", help="read a data set once, and report what is in it"))
    _add_shard(commands.add_parser("shard", help="write a data set as shuffled shards"))
    return parser


def _add_check(check: argparse.ArgumentParser) -> None:
    """Adds the options of `check`."""
    _add_data(check, "folder of the report; files of an earlier one in it are replaced")
    check.add_argument(
        "--eval_data",
        nargs="+",
        default=[],
        help="data that a model will be evaluated on: finds the samples whose images are in them, too",
    )
    check.add_argument("--eval_split", help="split of the evaluation data; test if not given")
    check.add_argument("--eval_config", help="configuration of the evaluation data")
    check.add_argument("--eval_image_column", help="image column of the evaluation data")
    check.add_argument("--tokenizer", help="folder or Hub id of a tokenizer: measures captions in tokens, too")
    check.add_argument(
        "--distance",
        type=integer(0, 8),
        default=4,
        help="images look alike if at most so many of the 64 bits of their perceptual hashes differ (4)",
    )
    check.add_argument(
        "--image_size",
        type=integer(PATCH, 4096),
        default=224,
        help="image size in pixels at which the loader's speed is measured (224)",
    )
    check.add_argument(
        "--seconds",
        type=number(0, 3600),
        default=5.0,
        help="time for which the loader's speed is measured; 0 to leave it out (5)",
    )
    check.add_argument(
        "--samples_per_second",
        type=number(0, 1e9, open_low=True),
        help="speed at which your GPU trains: the report says how many loader workers that takes",
    )


def _add_shard(shard: argparse.ArgumentParser) -> None:
    """Adds the options of `shard`."""
    _add_data(shard, "folder of the shards: a new one, or that of an interrupted run of this command")
    shard.add_argument("--format", choices=("tar", "parquet"), default="tar", help="format of the shards (tar)")
    shard.add_argument(
        "--samples_per_shard", type=integer(1, 10**7), default=2000, help="samples in every shard but the last (2000)"
    )
    shard.add_argument("--seed", type=SEED, default=0, help="seed of the order of the samples (0)")
    shard.add_argument(
        "--resize",
        type=integer(8, 2**15),
        help="reduce larger images to this short side, in pixels; unchanged if not given",
    )
    shard.add_argument("--quality", type=integer(1, 100), help="quality of the JPEGs that --resize writes (90)")
    shard.add_argument(
        "--without",
        type=Path,
        metavar="CHECK",
        help="leave out duplicates, images of evaluation data, or both, that a check found: its folder",
    )
    shard.add_argument(
        "--duplicates",
        choices=("pair", "image", "near"),
        help="pair: same image and captions; image: also other captions; near: also images that look alike",
    )
    shard.add_argument(
        "--overlap",
        choices=("image", "near"),
        help="image: same image as in the evaluation data of the check; near: also images that look alike",
    )
    shard.add_argument(
        "--skip_unreadable", action="store_true", help="leave out the parts of shards that cannot be read"
    )


def _add_data(parser: argparse.ArgumentParser, output: str) -> None:
    """Adds the options that choose data, named as those of training and evaluation."""
    parser.add_argument(
        "data", metavar="DATA", help="as --train_data of `flip-hf pretrain`: a folder, a pattern of files, a Hub id"
    )
    parser.add_argument("output", metavar="OUT", type=Path, help=output)
    parser.add_argument("--split", default="train", help="split of the data (train)")
    parser.add_argument("--config", help="configuration of the data, on the Hub or in a folder with a card")
    parser.add_argument("--image_column", help="image column; found by its usual names if not given")
    parser.add_argument(
        "--caption_column",
        help="column of captions or labels, or several, 'caption:3 alt:1'; found by its usual names if not given",
    )
    parser.add_argument(
        "--caption_templates",
        nargs="+",
        help="prompts that turn labels into captions: clip_1, clip_7, clip_80, files or templates",
    )
    parser.add_argument("--class_names", help="file with one class a line, for data that have only indices")
    parser.add_argument("--images_alone", action="store_true", help="read no captions")
    parser.add_argument("--background", default="white", help="colour behind transparent parts (white)")
    parser.add_argument("--workers", type=integer(0, 1024), help="worker processes; one for each core if not given")


def open_data(options: argparse.Namespace) -> tuple["Source", "Colour"]:
    """Opens the data as training does; returns them, and the colour behind transparent parts."""
    from flip_hf.training.inputs import open_training_data

    wanted = _data_arguments(options)
    (source,) = open_training_data(wanted, captions=not options.images_alone)
    return source, wanted.background_colour()


def open_evaluation(options: argparse.Namespace) -> list["Source"]:
    """Opens the evaluation data that data are compared with, as images alone."""
    from flip_hf.training.evaluation_data import open_evaluation_data

    found: list[Source] = []
    for name in options.eval_data:
        wanted = replace(
            _data_arguments(options),
            eval_data=name,
            eval_split=options.eval_split or "test",
            eval_config=options.eval_config,
            eval_image_column=options.eval_image_column,
        )
        opened = open_evaluation_data(wanted, labels=False).images
        found += [] if opened is None else [opened]
    return found


def _data_arguments(options: argparse.Namespace) -> "DataArguments":
    """Returns the options that choose data as training takes them."""
    from flip_hf.training.arguments import DataArguments

    return DataArguments(
        train_data=[options.data],
        train_split=options.split,
        train_config=options.config and [options.config],
        image_column=options.image_column and [options.image_column],
        caption_column=options.caption_column and [options.caption_column],
        caption_templates=options.caption_templates,
        class_names=options.class_names,
        background=options.background,
    )


def _check_outside(output: Path, data: str) -> None:
    folder = Path(data).expanduser().resolve()
    inside = folder.is_dir() and output.resolve().is_relative_to(folder)
    require(
        not inside,
        f"{output} lies in the folder of the data, and would be read as part of them: name a folder elsewhere.",
    )


def token_counter(name: str | None) -> Callable[[Sequence[str]], list[int]] | None:
    """Returns a function that counts the tokens of captions, special ones included; None without a tokenizer."""
    if name is None:
        return None
    from flip_hf.console.loading import loading
    from flip_hf.data.tokenization import load_tokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would be lost in forked workers
    with loading(name, "tokenizer"):
        tokenizer = load_tokenizer(name, context_length=2**20, special_tokens=True)

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]

    return count


def run_check(options: argparse.Namespace, workers: int, command: str) -> None:
    """Checks, and prints the report."""
    from flip_hf.curation.check import PICTURE, REPORT, CheckOptions, check
    from flip_hf.curation.report import in_words

    require(options.image_size % PATCH == 0, f"--image_size must be a multiple of {PATCH}, got {options.image_size}.")
    about = ("eval_split", "eval_config", "eval_image_column")
    alone = next((name for name in about if getattr(options, name) is not None), None)
    require(alone is None or bool(options.eval_data), f"--{alone} is about --eval_data: give that, too.")
    try_folder(options.output, "OUT")
    for data in (options.data, *options.eval_data):
        _check_outside(options.output, data)
    count_tokens = token_counter(options.tokenizer)
    source, background = open_data(options)
    evaluation = open_evaluation(options)
    chosen = CheckOptions(
        workers, options.distance, options.image_size, options.seconds, options.samples_per_second, background
    )
    options.output.mkdir(parents=True, exist_ok=True)
    lock_folder(options.output)
    try:
        report = check(source, options.output, chosen, {"command": redact(command)}, count_tokens, evaluation)
    finally:
        unlock_folder(options.output)
    print(in_words(report))
    tables = "samples, duplicates and overlap" if evaluation else "samples and duplicates"
    print(f"Report: {options.output / REPORT} and {options.output / PICTURE}, with tables of {tables}.")


def run_shard(options: argparse.Namespace, workers: int) -> None:
    """Writes the shards, and prints what is in them."""
    from flip_hf.curation.dealing import ImageForm
    from flip_hf.curation.leaving_out import read_unwanted
    from flip_hf.curation.sharding import ShardOptions, shard

    given = options.quality is None or options.resize is not None
    require(
        given,
        "--quality is that of the JPEGs that --resize writes: give --resize, too. Other images stay as they are.",
    )
    leaves_out = options.duplicates is not None or options.overlap is not None
    require(
        (options.without is not None) == leaves_out,
        "--without CHECK goes together with --duplicates, --overlap or both: the folder of a check, and what to leave "
        "out of what it found.",
    )
    try_folder(options.output, "OUT")
    _check_outside(options.output, options.data)
    source, background = open_data(options)
    unwanted = options.without and read_unwanted(options.without, options.duplicates, options.overlap, source)
    form = ImageForm(options.resize, options.quality or 90, background)
    chosen = ShardOptions(
        options.format, options.samples_per_shard, options.seed, form, options.split, options.skip_unreadable
    )
    start = time.monotonic()
    manifest = shard(source, options.output, chosen, workers, unwanted)
    print(in_words(manifest, options, time.monotonic() - start))


def in_words(manifest: dict[str, Any], options: argparse.Namespace, seconds: float) -> str:
    """Describes the shards, and how to train on them."""
    refused = sum(manifest["unusable"].values())
    kinds = " and ".join(name for name in ("duplicates", "overlap") if getattr(options, name) is not None)
    left_out = f", {manifest['left_out']:,} left out ({kinds})" if options.without else ""
    column = manifest["caption_column"]
    words = ["--train_data", f"{glob.escape(str(options.output))}/{options.split}-*.{options.format}"]
    if column:
        words += ["--caption_column", column]
    if manifest["class_names"]:
        words += ["--class_names", str(options.output / manifest["class_names"])]
    if options.caption_templates:
        words += ["--caption_templates", *options.caption_templates]
    shards = f"{counted(len(manifest['shards']), 'shard')} of {manifest['bytes'] / 1e6:,.1f} MB"
    return (
        f"{options.output}: {counted(manifest['samples'], 'sample')} in {shards}, in {seconds:,.0f} s; "
        f"{counted(refused, 'sample')} could not be used{left_out}.\n"
        f"To train on them: {shlex.join(words)}"
    )


def main(argv: Sequence[str]) -> None:
    """Checks or shards; a mistake ends in one line."""
    install()
    options = make_parser().parse_args(argv)
    from flip_hf.curation.processes import WorkFailed, sigterm_as_interrupt
    from flip_hf.data.workers import cores_per_process

    workers = cores_per_process() if options.workers is None else options.workers
    try:
        with sigterm_as_interrupt():
            if options.command == "check":
                run_check(options, workers, command_line("data", argv))
            else:
                run_shard(options, workers)
    except KeyboardInterrupt:
        resumes = " The same command resumes from here." if options.command == "shard" else ""
        end_with(f"Interrupted.{resumes}", INTERRUPTED)
    except (ValueError, OSError, WorkFailed) as error:
        end_with(error)
