"""Reproduces the paper's Figure 1 and Table 1 at a small scale, on embedded data or photographs.

    flip-hf reproduce                     # on two CPU cores: hours; --budget 20 for a look in minutes
    flip-hf reproduce --figures_only      # figures and tables again, from the JSON files alone
    flip-hf reproduce --only mask75-half  # some of the runs
    flip-hf reproduce --set photos        # Figure 1, masks and positives on labelled photographs, CIFAR-10
    flip-hf reproduce --set finetuning --tune_data TRAIN --tune_eval_data TEST  # ways to fine-tune on labelled images

--budget is the training time of the longest run without masks, in seconds; all other runs are in the paper's
proportions to its number of samples, which is measured once and kept. Finished runs are not repeated: the same command
resumes the set. A point's JSON file gives the command that runs it alone.

--recipe, --train_data and --eval_data take any data that `flip-hf pretrain` takes; with --set photos, labelled ones. A
GPU needs a model that keeps it busy: --recipe scenes_s16 --budget 150 is for an hour or two on one.
"""

import argparse
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flip_hf.console.endings import end_with
from flip_hf.console.files import try_folder
from flip_hf.console.json_types import JsonObject
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.ranges import SEED, number
from flip_hf.redaction import install
from flip_hf.reproduction.plan import FINETUNING, SEEDS, SETS, Experiment, Scale, chosen, planned_runs
from flip_hf.training.recipes import RECIPES, recipe_options

if TYPE_CHECKING:
    from flip_hf.reproduction.choices import TunedData
    from flip_hf.reproduction.running import Point, Points

RECIPE_OF = {"paper": "scenes", "photos": "cifar10", FINETUNING: "cifar10"}
FOLDER_OF = {
    "paper": Path("runs/reproduce"),
    "photos": Path("runs/reproduce_photos"),
    FINETUNING: Path("runs/reproduce_finetuning"),
}


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ScriptParser(
        prog="flip-hf reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget",
        type=number(0, 1e9, open_low=True),
        default=240,
        help="seconds of training of the longest unmasked run (240)",
    )
    parser.add_argument(
        "--set",
        choices=tuple(RECIPE_OF),
        default=SETS[0],
        help="the paper's tables (paper), Figure 1 and masks on photographs (photos), or ways to fine-tune",
    )
    parser.add_argument("--recipe", help="recipe of every run; if not given, scenes, or cifar10 for the other sets")
    parser.add_argument(
        "--train_data", nargs="+", help="training data, in place of the recipe's; see `flip-hf pretrain`"
    )
    parser.add_argument("--eval_data", help="labelled test data, in place of the recipe's")
    parser.add_argument("--tune_data", nargs="+", help="labelled data to fine-tune on, with --set finetuning")
    parser.add_argument("--tune_eval_data", help="labelled test data of the fine-tuned models")
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder of points, models, logs and figures; runs/reproduce, or runs/reproduce_SET for other sets",
    )
    parser.add_argument("--seeds", type=SEED, nargs="+", default=list(SEEDS), help="seeds of the runs (0 1 2)")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        help="make only runs with one of these in their names, and those that they start from",
    )
    parser.add_argument("--skip", nargs="+", default=[], help="leave out runs with one of these in their names")
    parser.add_argument(
        "--figures_only", action="store_true", help="draw the figures of the finished runs, and stop there"
    )
    parser.add_argument("--list", action="store_true", help="name the runs and their samples, and stop there")
    return parser


def data_words(options: argparse.Namespace) -> list[str]:
    """Returns the options of `flip-hf pretrain` that every run gets over the recipe's: the data."""
    train = ["--train_data", *options.train_data] if options.train_data else []
    return [*train, *(["--eval_data", options.eval_data] if options.eval_data else [])]


def tuned_words(options: argparse.Namespace) -> list[str]:
    """Returns the options that name the data to fine-tune on, if the set has some."""
    return ["--tune_data", *options.tune_data, "--tune_eval_data", options.tune_eval_data] if options.tune_data else []


def check_data(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Checks that there are data to fine-tune on for the set that does so alone; a mistake ends the command."""
    given = [name for name in ("tune_data", "tune_eval_data") if getattr(options, name) is not None]
    if options.set != FINETUNING and given:
        parser.error(f"--{given[0]} is for --set {FINETUNING}; leave it out.")
    if options.set == FINETUNING and not options.figures_only and len(given) < 2:
        parser.error(f"--set {FINETUNING} needs --tune_data and --tune_eval_data, the labelled images to fine-tune on.")


def tuned_data(recipe: str, options: argparse.Namespace) -> "TunedData":
    """Returns the data of the set that fine-tunes; what is retained is measured on the base's evaluation data.

    Raises:
        ValueError: neither the recipe nor an option names the latter.
    """
    from flip_hf.reproduction.choices import TunedData

    retained = options.eval_data or recipe_options(recipe, RECIPES).get("eval_data")
    if retained is None:
        raise ValueError(f"the recipe {recipe} names no labelled test data; name those of the base with --eval_data.")
    return TunedData(tuple(options.tune_data), options.tune_eval_data, retained)


def check_tuned_data(recipe: str, options: argparse.Namespace) -> None:
    """Checks the data to fine-tune on, where the set does so, before the base is trained.

    Raises:
        ValueError, OSError: they cannot be used or read.
    """
    if options.set == FINETUNING:
        from flip_hf.reproduction.choices import check_data

        check_data(recipe, tuned_data(recipe, options))


def runs_of(scale: Scale, recipe: str, options: argparse.Namespace) -> list[Experiment]:
    """Lists the runs of the set, those that others start from first."""
    if options.set != FINETUNING:
        return planned_runs(scale, options.set)
    from flip_hf.reproduction.choices import finetuning_runs

    return finetuning_runs(scale, tuned_data(recipe, options))


def plan_runs(points: "Points", options: argparse.Namespace) -> list[Experiment]:
    """Lists the runs that were asked for; names and data are checked before anything is run to measure their size.

    Raises:
        ValueError, OSError, RunFailed: a name or data cannot be used, the folder holds other runs, or the trial failed.
    """
    from flip_hf.reproduction.session import measured_scale

    recipe = points.recipe
    chosen(runs_of(Scale.of_recipe(recipe, 10**6), recipe, options), options.only, options.skip)
    check_tuned_data(recipe, options)
    scale = measured_scale(options.budget, points, options.set, tuned_words(options))
    return chosen(runs_of(scale, recipe, options), options.only, options.skip)


def main(argv: Sequence[str]) -> None:
    """Plans, runs, draws; an interruption loses at most the run under way."""
    install()
    parser = make_parser()
    options = parser.parse_args(argv)
    check_data(parser, options)
    from flip_hf.reproduction.running import Points, RunFailed
    from flip_hf.reproduction.session import make_points, read_plan

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run under way ends, too
    recipe = options.recipe or RECIPE_OF[options.set]
    points = Points(options.folder or FOLDER_OF[options.set], recipe, data_words(options))
    try:
        try_folder(points.folder, "--folder")
        if not options.figures_only:
            runs = plan_runs(points, options)
            if options.list:
                for run in runs:
                    print(f"{run.name:<32} {run.samples:>10,}  {run.start or ''}")
                return
            make_points(points, runs, options.seeds)
        plan = read_plan(points.folder)
    except (ValueError, OSError, RunFailed) as error:
        end_with(error)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command resumes the set; with --figures_only it draws the finished runs.")
    report(points, plan)


def report(points: "Points", plan: JsonObject) -> None:
    """Draws the figures and writes the tables of all finished points, and prints the main ones."""
    from flip_hf.reproduction.choices import choices_table, write_choices
    from flip_hf.reproduction.figures import write_report
    from flip_hf.reproduction.session import origin_in_words
    from flip_hf.reproduction.speedup import steady

    found = points.read()
    origin = origin_in_words(points, plan)
    if plan["set"] == FINETUNING:
        write_choices(found, points.folder, origin)
        print(choices_table(found))
    else:
        found = steady(found)
        write_report(found, points.folder, origin, plan["set"])
        print(summary(found, plan["set"]))
    print(f"Figures and tables of {len(found)} points: {points.folder / 'README.md'}")


def summary(found: "list[Point]", which: str) -> str:
    """Returns the table of speed-ups, and how many findings agree, disagree, or are within noise."""
    from flip_hf.reproduction.figures import speed_table
    from flip_hf.reproduction.findings import findings

    verdicts = Counter(finding.verdict for finding in findings(found, which))
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return f"{speed_table(found)}\n\nThe paper's findings here: {counts}.\n"
