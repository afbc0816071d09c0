"""The retained data of a run: opened and checked as its evaluation data are, under options of their own."""

import os
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flip_hf.data.pool import PoolFacts, collect, open_pool, read_facts, write_pool
from flip_hf.data.processes import from_main
from flip_hf.data.sources import Source
from flip_hf.redaction import redacted, shown
from flip_hf.training.arguments import GENERIC_TEMPLATE, Arguments
from flip_hf.training.evaluation_data import Evaluation, evaluation_name, open_evaluation_data
from flip_hf.training.retention_arguments import starts_trained

RETAINED = "retained"  # the folder of retained pairs
# Options of the evaluation data, and those of the retained data that stand for them.
_OWN_NAMES = {
    "eval_data": "retain_data",
    "eval_config": "retain_config",
    "eval_split": "retain_split",
    "eval_image_column": "retain_image_column",
    "label_column": "retain_label_column",
    "eval_caption_column": "retain_caption_column",
    "class_names": "retain_class_names",
}


def retained_arguments(arguments: Arguments) -> Arguments:
    """Returns the arguments of a run that is evaluated on the retained data alone, by comparing images with texts."""
    options = asdict(arguments.retention)
    data = replace(
        arguments.data,
        **{name: options[own] for name, own in _OWN_NAMES.items()},
        templates=options["retain_templates"] or [GENERIC_TEMPLATE],
        caption_column=None,
        caption_templates=None,
        holdout=0.0,
    )
    return replace(arguments, data=data, objective=replace(arguments.objective, objective="contrastive"))


def open_retained_data(arguments: Arguments) -> Evaluation:
    """Opens the retained data; an empty [`Evaluation`] where there are none.

    Raises:
        ValueError: they are the run's own evaluation data; or as [`open_evaluation_data`], naming the options
            of the retained data.
    """
    if arguments.retention.retain_data is None:
        return Evaluation()
    of_retained = retained_arguments(arguments)
    if _identity(of_retained) == _identity(arguments):
        raise ValueError(
            f"--retain_data {shown(arguments.retention.retain_data)} is what the run is evaluated on already, so its "
            "metric before and after would say nothing about what is lost elsewhere. Name other data, or leave it out."
        )
    try:
        return open_evaluation_data(of_retained.data)
    except ValueError as error:
        raise ValueError(_with_own_names(str(error))) from error


def unmeasured_in_words(arguments: Arguments, sources: list[Source], evaluation: Evaluation) -> list[str]:
    """Says in a sentence that a run which starts from a trained model measures nothing beside its loss, if it does.

    No pairs are held out by default. They would be taken from the training data, finding a thousand of them would read
    up to gigabytes before the first step, and they would show what the model learns, not what it forgets.
    """
    is_measured = evaluation != Evaluation() or arguments.data.holdout or arguments.retention.retain_data
    if is_measured or not starts_trained(arguments):
        return []
    labelled = any(source.captions_from_labels for source in sources)
    own = "labelled images of its own" if labelled else "pairs of its own, or --holdout 0.01 takes some from training"
    return [
        "This run measures nothing beside its loss, so it cannot show what the model forgets or learns: --retain_data "
        f"names data on which it should stay as good, --eval_data {own}."
    ]


def _identity(arguments: Arguments) -> tuple[str | None, ...]:
    """Returns what identifies the evaluation data of a run: name, configuration and split."""
    name = evaluation_name(arguments.data)
    return (name and os.path.normpath(name), arguments.data.eval_config, arguments.data.eval_split)


def _with_own_names(message: str) -> str:
    """Replaces the options of the evaluation data in a message by those of the retained data."""
    names = "|".join(sorted(_OWN_NAMES, key=len, reverse=True))
    return re.sub(rf"--({names})\b", lambda match: f"--{_OWN_NAMES[match[1]]}", message)


def shared_retained_pairs(
    arguments: Arguments, retained: Evaluation, accelerator: Accelerator, resumed: bool
) -> Evaluation:
    """Replaces retained pairs by those that the run keeps in its folder, the same in all processes; all must call it.

    Raises:
        ValueError: fewer than two images with captions can be used.
    """
    if retained == Evaluation():
        return retained
    if retained.pairs is None:
        return replace(retained, key=retained_key(arguments, retained.key))
    folder = Path(arguments.run.output_dir) / RETAINED
    facts = from_main(accelerator, partial(_retained_pairs, arguments, retained, folder, resumed))
    if accelerator.is_main_process:
        print(f"Retained pairs: {facts.images:,} images with {facts.captions:,} captions")
    return replace(retained, pairs=open_pool(folder, captions=True), key=retained_key(arguments, facts.key))


def _retained_pairs(arguments: Arguments, retained: Evaluation, folder: Path, resumed: bool) -> PoolFacts:
    """Writes at most `eval_pairs` retained pairs into a folder; a resumed run with the same options keeps its own."""
    count = arguments.data.eval_pairs
    wanted = {**_wanted(arguments), "eval_pairs": count}
    facts = read_facts(folder) if resumed else None
    if facts is None or facts.wanted != wanted:
        facts = write_pool(collect([retained.pairs] if retained.pairs is not None else [], count), folder, wanted)
    if facts.images < 2:
        name = shown(arguments.retention.retain_data or "")
        raise ValueError(
            f"--retain_data {name} has {facts.images} usable pairs in the first "
            f"{facts.rows:,} rows, and two are needed to tell one from another. Name other data."
        )
    return facts


def _wanted(arguments: Arguments) -> dict[str, Any]:
    """Returns the options that decide what is measured, without credentials."""
    options = redacted(asdict(arguments.retention))
    return {name: value for name, value in options.items() if value is not None and name != "retain_warning"}


def retained_key(arguments: Arguments, key: str) -> str:
    """Identifies the retained data and how they are measured: only results with the same key are comparable."""
    return ", ".join([key, *(f"{name}={value}" for name, value in _wanted(arguments).items())])
