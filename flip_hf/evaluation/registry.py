"""The registry of evaluation data sets, read from `datasets/*.yaml`: location, task, metric, prompts.

A new data set is a new file. Names of classes and prompts are CLIP's (openai/CLIP, data/prompts.md) where the order of
the labels allows; each file names its sources, and what could not be verified.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

import yaml

from flip_hf.data.class_names import names_an_index
from flip_hf.data.targets import CAPTION_FORMS
from flip_hf.evaluation.templates import resolve_templates

ClassMetric = Literal["accuracy", "mean_per_class", "mean_top1_top5", "map_11_points", "roc_auc"]
METRICS: dict[str, tuple[str, ...]] = {"classification": get_args(ClassMetric), "retrieval": ("recall",)}
SPLITS = ("train", "validation", "test")
# The C parser is ten times faster, and not in every build of PyYAML.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class DataSet:
    """A data set to evaluate on.

    Attributes:
        name: name in the registry.
        title: name for display.
        task: `classification` or `retrieval`.
        groups: the groups it belongs to (`clip27`: the CLIP paper's Table 9; `flip25`: the FLIP paper's Table 4;
            `robustness`: its Table 6; `retrieval`: its Table 5).
        path: Hub id; None where there is no public copy, and `note` describes the folder that the user must provide.
        config: the Hub data set's configuration.
        splits: the data set's name for each available split, under `train`, `validation`, `test`.
        image_column: column of the image; `;` separates alternatives. None, for user data: found by its usual names.
        target_column: column of the label or captions, likewise.
        metric: the metric of the CLIP paper: `accuracy` (top-1), `mean_per_class`, `mean_top1_top5`, `map_11_points`
            (several labels per image), `roc_auc` (two classes, the second is positive), `recall`.
        templates: prompts with `{}` for the class or caption.
        licence: licence of the images, as far as known.
        sources: URLs of the sources of names, prompts, order of labels and licence.
        class_names: C names in the order of the label indices at `path`. None where the data set has them, in
            `class_names_file` or in its label feature.
        class_names_file: file in the data set's repository with one name a line.
        text_labels: meaning of a label written as text, `index` or `name`, where class names are numbers.
        duplicates: names that the original gives to several classes.
        caption_form: form of a text in the target column, for retrieval: `text`, one caption; `lines`, one a line;
            `json`, a list of them. A column of lists always holds several.
        note: differences from the papers, caveats, and what was not verified.
    """

    name: str
    title: str
    task: str
    groups: tuple[str, ...]
    path: str | None
    config: str | None
    splits: Mapping[str, str] = field(hash=False)
    image_column: str | None
    target_column: str | None
    metric: str
    templates: tuple[str, ...]
    licence: str
    sources: tuple[str, ...]
    class_names: tuple[str, ...] | None = None
    class_names_file: str | None = None
    text_labels: str | None = None
    duplicates: tuple[str, ...] = ()
    caption_form: str = "text"
    note: str | None = None


_LISTS = ("groups", "sources", "class_names", "duplicates")
_MAY_BE_NULL = ("path", "config", "class_names", "class_names_file", "text_labels", "note")


@cache
def all_data_sets() -> tuple[str, ...]:
    """Lists the names of all data sets, sorted."""
    files = (resources.files("flip_hf.evaluation") / "datasets").iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


@cache
def data_set(name: str) -> DataSet:
    """Returns the data set of a name.

    Raises:
        ValueError: there is none, and the message suggests similar names; or its file is wrong.
    """
    if name not in all_data_sets():
        raise ValueError(f"There is no data set {name!r}.{_suggestion(name, all_data_sets())}")
    file = resources.files("flip_hf.evaluation") / "datasets" / f"{name}.yaml"
    return read_data_set(name, file.read_text(encoding="utf-8"))


def data_set_names(names_or_groups: Sequence[str]) -> list[str]:
    """Expands names and groups into names of data sets, in order, without duplicates; a group's are sorted.

    Raises:
        ValueError: one is neither a name nor a group.
    """
    chosen: list[str] = []
    for wanted in names_or_groups:
        if wanted in all_data_sets():
            chosen.append(wanted)
            continue
        groups = _groups()
        if wanted not in groups:
            known = (*groups, *all_data_sets())
            raise ValueError(
                f"There is no data set or group {wanted!r}.{_suggestion(wanted, known)} "
                f"The groups are: {', '.join(groups)}."
            )
        chosen += groups[wanted]
    return list(dict.fromkeys(chosen))


@cache
def _groups() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in all_data_sets():
        for group in data_set(name).groups:
            groups.setdefault(group, []).append(name)
    return groups


def _suggestion(wanted: str, known: Sequence[str]) -> str:
    close = get_close_matches(wanted, known, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else f" There are: {', '.join(known)}."


# ---------------------------------------------------------------------------------------------------------------------
# Reading a file
# ---------------------------------------------------------------------------------------------------------------------


def read_data_set(name: str, text: str) -> DataSet:
    """Parses a data set from the text of its file.

    Raises:
        ValueError: a field is unknown, missing or of a wrong type, or fields contradict each other.
    """
    try:
        about = yaml.load(text, Loader=_Loader)
        _check_fields(about)
        about["templates"] = resolve_templates(about["templates"])
        about.update({key: tuple(about[key]) for key in _LISTS if about.get(key) is not None})
        made = DataSet(name=name, **about)
        _check_sense(made)
        _check_class_names(made)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The file of the data set {name!r} is wrong: {error}") from error
    return made


def _check_fields(about: object) -> None:
    if not isinstance(about, dict):
        raise ValueError("it is not a mapping of fields.")
    known = {f.name: f.default is MISSING for f in fields(DataSet) if f.name != "name"}
    for key in about.keys() - known.keys():
        raise ValueError(f"there is no field {key!r}.{_suggestion(str(key), tuple(known))}")
    for key in [key for key, needed in known.items() if needed and key not in about]:
        raise ValueError(f"the field {key!r} is missing.")
    for key, value in about.items():
        if key == "splits":
            good = isinstance(value, dict) and _are_texts([*value, *value.values()])
        elif key == "templates":
            good = _are_texts(value if isinstance(value, list) else [value])
        elif key in _LISTS:
            good = isinstance(value, list) and _are_texts(value)
        else:
            good = _are_texts([value])
        if not good and not (value is None and key in _MAY_BE_NULL):
            raise ValueError(f"the field {key!r} must not be {value!r:.200}; texts like `no` and `1` need quotes.")


def _are_texts(values: Sequence[object]) -> bool:
    return bool(values) and all(isinstance(value, str) and value.strip() for value in values)


def _check_sense(made: DataSet) -> None:
    if made.metric not in METRICS.get(made.task, ()):
        raise ValueError(f"the metric {made.metric!r} does not fit the task {made.task!r}.")
    if made.caption_form not in CAPTION_FORMS:
        raise ValueError(f"the caption_form is one of {', '.join(CAPTION_FORMS)}, not {made.caption_form!r}.")
    if "test" not in made.splits or set(made.splits) - set(SPLITS):
        raise ValueError(
            f"the splits are {', '.join(made.splits)}: test is required, train and validation are optional."
        )
    if made.path is None and "--data_dir" not in (made.note or ""):
        raise ValueError("without a path, the note must say what to give with --data_dir.")
    if made.metric == "roc_auc" and len(made.class_names or ()) != 2:
        raise ValueError("roc_auc is for two classes.")


def _check_class_names(made: DataSet) -> None:
    names = made.class_names or ()
    if made.task == "retrieval" and (names or made.class_names_file):
        raise ValueError("there are no classes in retrieval.")
    if names and made.class_names_file:
        raise ValueError("class_names and class_names_file exclude each other.")
    twice = {name for name, count in Counter(names).items() if count > 1}
    if twice != set(made.duplicates):
        raise ValueError(f"these classes are repeated: {sorted(twice)}, not {sorted(made.duplicates)}.")
    # A text label could be either.
    name = names_an_index(names)
    if name is not None:
        raise ValueError(f"class {names.index(name)} is named {name!r}, which is the index of another; write it out.")
