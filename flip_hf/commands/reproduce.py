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
import json
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flip_hf.console.endings import end_with
from flip_hf.console.files import try_folder
from flip_hf.console.json_types import JsonObject
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.ranges import SEED, number
from flip_hf.redaction import install
from flip_hf.reproduction.plan import SEEDS, SETS, Experiment, Scale, planned_runs, words_of
from flip_hf.training.recipes import RECIPES, recipe_options

if TYPE_CHECKING:
    from flip_hf.reproduction.choices import TunedData
    from flip_hf.reproduction.running import Point, Points

FINETUNING = "finetuning"
RECIPE_OF = {"paper": "scenes", "photos": "cifar10", FINETUNING: "cifar10"}
FOLDER_OF = {
    "paper": Path("runs/reproduce"),
    "photos": Path("runs/reproduce_photos"),
    FINETUNING: Path("runs/reproduce_finetuning"),
}
SETTINGS = ("recipe", "budget", "set", "data")  # of `plan.json`: what all runs of a folder share


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


def scale_for(budget: float, points: "Points", which: str, tuned: Sequence[str] = ()) -> Scale:
    """The samples of the longest run are measured once, on the unmasked model, and kept in `plan.json`.

    Raises:
        ValueError: the folder holds runs of another recipe or set, of this recipe before it was changed, on other data,
            of another budget, or of another machine.
        FileNotFoundError: there is no such recipe.
    """
    from flip_hf.reproduction.running import environment, run_command, training_rate

    path = points.folder / "plan.json"
    scale = Scale.of_recipe(points.recipe, 0)
    options = recipe_options(points.recipe, RECIPES)
    settings = dict(zip(SETTINGS, (points.recipe, budget, which, [*points.extra, *tuned]), strict=True))
    where = environment()
    if points.read():
        plan = read_plan(points.folder)
        made = {**plan["options"], **plan["environment"], **{name: plan.get(name) for name in SETTINGS}}
        asked = {**options, **where, **settings}
        names = sorted((made.keys() | asked.keys()) - {"commit", "torch", "transformers"})
        other = [
            f"{name} {made.get(name)}, not {asked.get(name)}" for name in names if made.get(name) != asked.get(name)
        ]
        if other:
            raise ValueError(f"{points.folder} holds runs with {'; '.join(other)}: give another --folder.")
        return replace(scale, samples=plan["samples"])
    (points.folder / "points").mkdir(parents=True, exist_ok=True)
    trial = points.folder / "trial"
    count = {"train_samples": 24 * scale.batch, "log_samples": 4 * scale.batch}
    words = [points.recipe, *points.extra, *words_of({"mask_ratio": 0, **count, "output_dir": trial})]
    run_command("pretrain", words, points.folder / "logs" / "trial.txt")
    rate = training_rate(trial / "log.jsonl")
    shutil.rmtree(trial)
    scale = replace(scale, samples=max(64, round(budget * rate / scale.batch)) * scale.batch)
    plan = {**settings, "samples": scale.samples, "samples_per_second": rate}
    path.write_text(json.dumps({**plan, "options": options, "environment": where}, indent=1) + "\n")
    return scale


def read_plan(folder: Path) -> JsonObject:
    """Returns the settings that all points of a folder share.

    Raises:
        ValueError: there are none, or they have lost their plan.
    """
    if not any((folder / "points").glob("*.json")):
        raise ValueError(f"there are no points in {folder}/points; leave out --figures_only to make them.")
    if not (folder / "plan.json").is_file():
        raise ValueError(f"{folder} has points and no plan.json, which says what they are of; give another --folder.")
    return {"set": SETS[0], "data": [], **json.loads((folder / "plan.json").read_text())}


def chosen(runs: list[Experiment], parts: list[str], skipped: Sequence[str] = ()) -> list[Experiment]:
    """Selects the runs with one of the parts in their name, and those that they start from; all where no part is given.

    Args:
        runs: all runs of a set.
        parts: parts of names to select.
        skipped: parts of names to leave out, of runs that no selected one starts from.

    Raises:
        ValueError: a part is in no name.
    """
    for part in (*parts, *skipped):
        if not any(part in run.name for run in runs):
            raise ValueError(f"no run has {part!r} in its name: {', '.join(run.name for run in runs)}")
    names = {run.name for run in runs if not parts or any(part in run.name for part in parts)}
    names = {name for name in names if not any(part in name for part in skipped)}
    for run in reversed(runs):
        if run.name in names and run.start is not None:
            names.add(run.start)
    return [run for run in runs if run.name in names]


def run_all(points: "Points", runs: list[Experiment], seeds: list[int]) -> None:
    """Runs what is not there yet, seed by seed, so that what there is can be compared early."""
    from tqdm import tqdm

    due = [(run, seed) for seed in seeds for run in runs if not points.path(run.name, seed).is_file()]
    by_name = {run.name: run for run in runs}
    total = sum(run.cost for run, _ in due)
    with tqdm(total=total, bar_format="{l_bar}{bar}| {elapsed}<{remaining}", dynamic_ncols=True) as bar:
        for number, (run, seed) in enumerate(due, 1):
            bar.set_description(f"{number} of {len(due)}: {run.name}, seed {seed}")
            if run.start is not None and not (points.model(run.start, seed) / "results.json").is_file():
                points.make(by_name[run.start], seed)  # its point came from elsewhere
            points.make(run, seed)
            bar.update(run.cost)


def main(argv: Sequence[str]) -> None:
    """Plans, runs, draws; an interruption loses at most the run under way."""
    install()
    parser = make_parser()
    options = parser.parse_args(argv)
    check_data(parser, options)
    from flip_hf.reproduction.choices import choices_table, write_choices
    from flip_hf.reproduction.figures import write_report
    from flip_hf.reproduction.running import Points, RunFailed
    from flip_hf.reproduction.speedup import steady

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run under way ends, too
    recipe = options.recipe or RECIPE_OF[options.set]
    folder = options.folder or FOLDER_OF[options.set]
    points = Points(folder, recipe, data_words(options))
    try:
        try_folder(folder, "--folder")
        if not options.figures_only:
            # Names are checked before anything is run.
            chosen(runs_of(Scale.of_recipe(recipe, 10**6), recipe, options), options.only, options.skip)
            check_tuned_data(recipe, options)
            scale = scale_for(options.budget, points, options.set, tuned_words(options))
            runs = chosen(runs_of(scale, recipe, options), options.only, options.skip)
            if options.list:
                for run in runs:
                    print(f"{run.name:<32} {run.samples:>10,}  {run.start or ''}")
                return
            run_all(points, runs, options.seeds)
        plan = read_plan(folder)
    except (ValueError, OSError, RunFailed) as error:
        end_with(error)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command resumes the set; with --figures_only it draws the finished runs.")
    found = points.read()
    if plan["set"] == FINETUNING:
        write_choices(found, folder, about(points, plan))
        print(choices_table(found))
    else:
        found = steady(found)
        write_report(found, folder, about(points, plan), plan["set"])
        print(summary(found, plan["set"]))
    print(f"Figures and tables of {len(found)} points: {folder / 'README.md'}")


def summary(found: "list[Point]", which: str) -> str:
    """The headline, and how many findings came out how."""
    from flip_hf.reproduction.figures import speed_table
    from flip_hf.reproduction.findings import findings

    verdicts = Counter(finding.verdict for finding in findings(found, which))
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return f"{speed_table(found)}\n\nThe paper's findings here: {counts}.\n"


def about(points: "Points", plan: JsonObject) -> str:
    """By which commands and on what the points were made."""
    from flip_hf.reproduction.choices import BASE_LENGTH

    made = [json.loads(path.read_text())["environment"] for path in (points.folder / "points").glob("*.json")]
    where = {f"{each['hardware']}, torch {each['torch']}, transformers {each['transformers']}" for each in made}
    commits = ", ".join(sorted({str(each["commit"]) for each in made}))
    which = "" if plan["set"] == SETS[0] else f"--set {plan['set']} "
    command = shlex.join(["flip-hf", "reproduce", *plan["data"]])
    command = f"{command} {which}--recipe {plan['recipe']} --budget {plan['budget']:g}"
    what = f"The base sees {BASE_LENGTH} times" if plan["set"] == FINETUNING else "The longest unmasked run sees"
    speed = "" if plan["set"] == FINETUNING else ", at the median speed of runs with the same steps"
    return (
        f"`{command}`; {'; '.join(sorted(where))}; commit {commits}. {what} {plan['samples']:,} pairs. "
        "Mean ± standard deviation over the seeds. Times are those of training steps alone, without data preparation, "
        f"evaluation and saving{speed}.\n"
    )
