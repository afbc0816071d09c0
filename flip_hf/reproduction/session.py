"""The points of a folder, made one after the other at the size that its `plan.json` keeps."""

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from flip_hf.console.json_types import JsonObject
from flip_hf.reproduction.choices import BASE_LENGTH
from flip_hf.reproduction.plan import FINETUNING, SETS, Experiment, Scale, words_of
from flip_hf.reproduction.running import Points, environment, run_command, training_rate
from flip_hf.training.recipes import RECIPES, recipe_options

SETTINGS = ("recipe", "budget", "set", "data")  # of `plan.json`: what all runs of a folder share


def measured_scale(budget: float, points: Points, which: str, tuned: Sequence[str]) -> Scale:
    """Measures the samples of the longest run once, on the unmasked model, and keeps them in `plan.json`.

    Args:
        budget: seconds of training of the longest unmasked run.
        points: the points of the folder.
        which: the set of runs.
        tuned: options that name the data to fine-tune on.

    Raises:
        ValueError: the folder holds runs of another recipe or set, of this recipe before it was changed, on other data,
            of another budget, or of another machine.
        FileNotFoundError: there is no such recipe.
    """
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


def make_points(points: Points, runs: list[Experiment], seeds: list[int]) -> None:
    """Makes the points that are not there yet, seed by seed, so that what there is can be compared early."""
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


def origin_in_words(points: Points, plan: JsonObject) -> str:
    """Says by which command, on which hardware and at which commits the points were made."""
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
