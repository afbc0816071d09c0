#!/usr/bin/env python
"""Reproduces the paper's Figure 1 and Table 1 at a small scale, on embedded data.

    python scripts/reproduce.py                     # on two CPU cores: hours; --budget 20 for a look in minutes
    python scripts/reproduce.py --figures_only      # figures and tables again, from the JSON files alone
    python scripts/reproduce.py --only mask75-half  # some of the runs

--budget is the training time of the longest run without masks, in seconds; all other runs are in the paper's
proportions to its number of samples, which is measured once and kept. What has been run is not run again: the same
command goes on where it was stopped. A point's JSON file says by which command it can be run alone.
"""

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from flip_hf.reproduction.figures import write_report
from flip_hf.reproduction.plan import BATCH, SEEDS, Run, planned_runs
from flip_hf.reproduction.running import Points, RunFailed, environment, run_script, training_rate

FOLDER = Path("runs/reproduce")


def make_parser() -> argparse.ArgumentParser:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=240, help="seconds of training of the longest unmasked run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of points, models, logs and figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of runs; all if not given")
    parser.add_argument("--figures_only", action="store_true", help="draw from what has been run")
    parser.add_argument("--list", action="store_true", help="name the runs and their samples, and stop there")
    return parser


def samples_for(budget: float, points: Points) -> int:
    """Samples of the longest run: measured once, on the unmasked model, and kept in `plan.json`.

    Raises:
        ValueError: the folder holds runs of another budget.
    """
    path = points.folder / "plan.json"
    if path.is_file():
        plan = json.loads(path.read_text())
        if plan["budget"] != budget:
            raise ValueError(
                f"{points.folder} holds runs of --budget {plan['budget']:g}; give that, or another --folder."
            )
        return plan["samples"]
    trial = points.folder / "trial"
    words = ["scenes", "--mask_ratio", "0", "--train_samples", str(24 * BATCH), "--log_samples", str(4 * BATCH)]
    run_script("pretrain.py", [*words, "--output_dir", str(trial)], points.folder / "logs" / "trial.txt")
    rate = training_rate(trial / "log.jsonl")
    shutil.rmtree(trial)
    samples = max(64, round(budget * rate / BATCH)) * BATCH
    plan = {"budget": budget, "samples": samples, "samples_per_second": rate, "environment": environment()}
    path.write_text(json.dumps(plan, indent=1) + "\n")
    return samples


def chosen(runs: list[Run], parts: list[str]) -> list[Run]:
    """Runs with one of the parts in their name, and those that they start from; all where no part is given."""
    names = {run.name for run in runs if not parts or any(part in run.name for part in parts)}
    for run in reversed(runs):
        if run.name in names and run.start is not None:
            names.add(run.start)
    return [run for run in runs if run.name in names]


def run_all(points: Points, runs: list[Run], seeds: list[int]) -> None:
    """Runs what is not there yet, seed by seed, so that what there is can be compared early."""
    due, by_name = [(run, seed) for seed in seeds for run in runs], {run.name: run for run in runs}
    with tqdm(total=len(due), unit="run", dynamic_ncols=True) as bar:
        for run, seed in due:
            bar.set_description(f"{run.name}, seed {seed}")
            if not points.path(run.name, seed).is_file():
                if run.start is not None and not points.model(run.start, seed).is_dir():
                    points.make(by_name[run.start], seed)  # its point came from elsewhere
                points.make(run, seed)
            bar.update()


def main() -> None:
    """Plans, runs, draws; an interruption loses at most the run under way."""
    options = make_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run under way ends, too
    points = Points(options.folder)
    try:
        if not options.figures_only:
            (options.folder / "points").mkdir(parents=True, exist_ok=True)
            runs = planned_runs(samples_for(options.budget, points))
            runs = chosen(runs, options.only)
            if options.list:
                for run in runs:
                    print(f"{run.name:<32} {run.options.get('train_samples', 0):>10,}  {run.start or ''}")
                return
            run_all(points, runs, options.seeds)
    except (ValueError, RunFailed) as error:
        sys.exit(f"error: {error}")
    found = points.read()
    if not found:
        sys.exit(f"error: there are no points in {options.folder}/points; leave out --figures_only to make them.")
    write_report(found, options.folder, about(points))
    print(f"Figures and tables of {len(found)} points: {options.folder / 'README.md'}")


def about(points: Points) -> str:
    """By which commands and on what the points were made."""
    made = [json.loads(path.read_text())["environment"] for path in (points.folder / "points").glob("*.json")]
    where = {f"{each['hardware']}, torch {each['torch']}, transformers {each['transformers']}" for each in made}
    commits = ", ".join(sorted({str(each["commit"]) for each in made}))
    plan = json.loads((points.folder / "plan.json").read_text())
    return (
        f"`python scripts/reproduce.py --budget {plan['budget']:g}`; {'; '.join(sorted(where))}; commit {commits}. "
        f"The longest unmasked run sees {plan['samples']:,} pairs. Mean ± standard deviation over the seeds; times are "
        "those of training steps alone, without data preparation, evaluation and saving.\n"
    )


if __name__ == "__main__":
    main()
