"""Every task on every data set, one after the other; what cannot be measured is reported and skipped."""

import logging
from collections.abc import Sequence

from accelerate import Accelerator
from tqdm.auto import tqdm

from flip_hf.data.refusals import BadDataError
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.options import NEED_TEXTS, NEED_TRAINING, TASKS, EvaluationOptions, fits
from flip_hf.evaluation.registry import DataSet
from flip_hf.evaluation.result import Result
from flip_hf.evaluation.subject import Subject
from flip_hf.evaluation.tasks import TASK_FUNCTIONS

logger = logging.getLogger(__name__)

# Problems of one data set, which do not end the evaluation of the others.
PROBLEMS = (ValueError, OSError, BadDataError, ImportError)


def check_tasks(encoder: Encoder, tasks: Sequence[str]) -> None:
    """Checks that a vision tower alone is not asked for tasks that need texts.

    Raises:
        ValueError: a task needs texts, and the model has none.
    """
    impossible = [task for task in tasks if task in NEED_TEXTS]
    if impossible and not encoder.knows_texts:
        possible = [task for task in TASKS if task not in NEED_TEXTS]
        raise ValueError(
            f"{', '.join(impossible)}: {encoder.name} is evaluated by its vision tower alone, which has no texts. "
            f"Use --tasks {' '.join(possible)}."
        )


def evaluate(
    encoder: Encoder, data_sets: list[DataSet], options: EvaluationOptions, accelerator: Accelerator
) -> tuple[list[Result], dict[str, str]]:
    """Evaluates a model.

    Args:
        encoder: the model.
        data_sets: the data sets.
        options: tasks and settings.
        accelerator: the processes; each must call this, and gets all results.

    Returns:
        The results; and `"title, task"` of what was not measured, with the reason in a line.
    """
    jobs = [(each, task) for each in data_sets for task in options.tasks if fits(task, each)]
    subjects, problems = _open_all(encoder, jobs, options, accelerator)
    results = []
    with tqdm(total=len(jobs), unit="task", disable=not accelerator.is_main_process) as bar:
        for described, task in jobs:
            key = f"{described.title}, {task}"
            bar.set_description(key)
            try:
                if key not in problems:
                    results.append(TASK_FUNCTIONS[task](subjects[described.name]))
            except PROBLEMS as error:
                problems[key] = str(error)
            if task == [each for each in options.tasks if fits(each, described)][-1]:
                subjects.pop(described.name, None)  # its features are no longer needed
            bar.update()
    for key, why in problems.items():
        if accelerator.is_main_process:
            logger.warning("Not measured: %s. %s", key, why)
    return results, {key: why.splitlines()[0] for key, why in problems.items()}


def _open_all(
    encoder: Encoder, jobs: list[tuple[DataSet, str]], options: EvaluationOptions, accelerator: Accelerator
) -> tuple[dict[str, Subject], dict[str, str]]:
    """Opens every data set first, so that a missing one is known before hours are spent on the others."""
    subjects: dict[str, Subject] = {}
    problems: dict[str, str] = {}
    for described, task in jobs:
        try:
            if described.name not in subjects:
                subjects[described.name] = Subject(encoder, described, options, accelerator)
            if task in NEED_TRAINING:
                subjects[described.name].source("train")
        except PROBLEMS as error:
            problems[f"{described.title}, {task}"] = str(error)
    return subjects, problems
