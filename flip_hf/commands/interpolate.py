"""Interpolates between the weights of two models, such as a CLIP and what it was fine-tuned to (WiSE-FT).

flip-hf interpolate openai/clip-vit-base-patch16 runs/mine --alpha 0.5 --output_dir models/between
flip-hf interpolate openai/clip-vit-base-patch16 runs/mine --alpha 0 0.25 0.5 0.75 1 --output_dir runs/curve \\
    --data my/images --retain_data other/images

The first writes a model with (1 - alpha) times the weights of A and alpha times those of B, and B's processor. The
second measures the models at several alphas, zero-shot on labelled images, and writes their accuracies alone:
interpolation.json and interpolation.png.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from flip_hf.console.endings import end_with
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.program import command_line
from flip_hf.console.ranges import integer, number
from flip_hf.evaluation.options import EvaluationOptions
from flip_hf.redaction import install

_ALPHA = number(0, 1, note="only models between the two are made")
# Options about the data, and the one of them that they need.
OF_DATA = {
    **dict.fromkeys(("test_split", "class_names", "templates", "batch_size", "num_workers", "retain_data"), "data"),
    **dict.fromkeys(("retain_split", "retain_class_names"), "retain_data"),
}


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ScriptParser(
        prog="flip-hf interpolate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = "a FlipModel, a FlipForPreTraining or a CLIPModel"
    parser.add_argument("first", metavar="A", help=f"folder or Hub id of the model at alpha 0: {kinds}")
    parser.add_argument("second", metavar="B", help="folder or Hub id of the model at alpha 1, tuned from A")
    parser.add_argument("--alpha", nargs="+", type=_ALPHA, default=[0.5], help="share of B; several with --data (0.5)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--data", help="labelled images to measure on: a folder, tar or parquet files, or a Hub id")
    parser.add_argument("--test_split", help="split of --data (test)")
    parser.add_argument(
        "--class_names", help="file with the class names of --data, one a line, in the order of the labels"
    )
    parser.add_argument("--retain_data", help="labelled images on which B should be as good as A")
    parser.add_argument("--retain_split", help="split of --retain_data (test)")
    parser.add_argument("--retain_class_names", help="file with the class names of --retain_data, one a line")
    parser.add_argument("--templates", nargs="+", help="prompts: clip_1, clip_7, clip_80, or templates with {}")
    parser.add_argument("--batch_size", type=integer(1, 2**20), help="images encoded at once (128)")
    parser.add_argument("--num_workers", type=integer(0, 1024), help="data loader workers; chosen if not given")
    return parser


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Checks that the options fit together; a mistake ends the command."""
    for name, needed in OF_DATA.items():
        if getattr(arguments, name) is not None and getattr(arguments, needed) is None:
            parser.error(f"--{name} needs --{needed}; give that too.")
    if len(arguments.alpha) > 1 and arguments.data is None:
        parser.error("several --alpha are measured on --data; give that too, or one --alpha to write its model.")
    twice = next((alpha for alpha in arguments.alpha if arguments.alpha.count(alpha) > 1), None)
    if twice is not None:
        parser.error(f"--alpha names {twice:g} twice; name it once.")


def data_options(arguments: argparse.Namespace) -> dict[str, EvaluationOptions]:
    """Makes the options of the evaluation of each data set.

    Raises:
        ValueError, OSError: prompts or a file of class names cannot be used.
    """
    shared = {name: getattr(arguments, name) for name in ("templates", "batch_size", "num_workers")}
    shared = {name: value for name, value in shared.items() if value is not None}
    named = {
        "data": (arguments.data, arguments.test_split, arguments.class_names),
        "retain_data": (arguments.retain_data, arguments.retain_split, arguments.retain_class_names),
    }
    options = {
        option: EvaluationOptions(data=data, test_split=split or "test", class_names=names, **shared)
        for option, (data, split, names) in named.items()
        if data is not None
    }
    for each in options.values():
        each.data_sets()  # reads the class names
    return options


def run(arguments: argparse.Namespace, data: dict[str, EvaluationOptions], command: str) -> str:
    """Writes the model or the curve; returns what the folder holds, in words.

    Raises:
        ValueError, OSError: a model or a data set cannot be used, or the folder cannot be written.
    """
    from flip_hf.conversion.folder import new_folder
    from flip_hf.conversion.interpolation import load_ends

    with new_folder(arguments.output_dir) as folder:
        ends = load_ends(arguments.first, arguments.second)
        if not data:
            (alpha,) = arguments.alpha
            ends.converted(alpha).save(folder)
            return f"a {type(ends.model).__name__} at alpha {alpha:g} between {ends.names[0]} and {ends.names[1]}"
        from flip_hf.data.processes import make_accelerator
        from flip_hf.evaluation.interpolation import curve_table, measure_alphas, write_curve

        accelerator = make_accelerator()
        if accelerator.num_processes > 1:
            raise ValueError("`flip-hf interpolate` runs in one process; start it without a launcher.")
        curves = measure_alphas(ends.set_alpha, ends.processor, sorted(arguments.alpha), data, accelerator)
        print(curve_table(curves))
        write_curve(folder, ends.names, curves, command)
        return f"the accuracies at {len(arguments.alpha)} alphas"


def main(argv: Sequence[str]) -> None:
    """Writes a model or a curve, or ends with a sentence that says why not."""
    install()
    parser = make_parser()
    arguments = parser.parse_args(argv)
    check(parser, arguments)
    try:
        data = data_options(arguments)
    except (ValueError, OSError) as error:
        end_with(error)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        made = run(arguments, data, command_line("interpolate", argv))
    except (ValueError, OSError, ImportError, MemoryError) as error:
        end_with(str(error) or "There is not enough memory.")
    print(f"{arguments.output_dir}: {made}")
