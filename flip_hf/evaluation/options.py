"""The options of `flip-hf evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from flip_hf.console.fields import OptionError, check_options, option, require
from flip_hf.console.names import short_name
from flip_hf.console.parsers import OptionsParser
from flip_hf.console.ranges import SEED, integer, number
from flip_hf.data.class_names import TextLabels
from flip_hf.data.targets import CaptionForm
from flip_hf.evaluation.registry import ClassMetric, DataSet, all_data_sets, data_set, data_set_names
from flip_hf.evaluation.templates import prompt_set, resolve_templates
from flip_hf.redaction import shown

Task = Literal["zero-shot", "masked", "retrieval", "class-retrieval", "linear-probe", "few-shot", "fine-tune"]
TASKS: tuple[Task, ...] = get_args(Task)
NEED_TRAINING = ("linear-probe", "few-shot", "fine-tune")
NEED_TEXTS = ("zero-shot", "masked", "retrieval", "class-retrieval")
_BATCH = integer(1, 2**20)


@dataclass
class EvaluationOptions:
    """Options of an evaluation: tasks, data, settings."""

    tasks: list[Task] = option(["zero-shot"], f"any of {', '.join(TASKS)}")
    datasets: list[str] = option([], "names or groups of known data sets; --list shows them")
    data_dir: str | None = option(None, "folder of local copies, one folder a data set")
    data: str | None = option(None, "data of your own: a folder, tar or parquet files, lists, or a Hub id")
    config: str | None = option(None, "configuration of --data, on the Hub or in a folder with a card")
    train_split: str = option("train", "split of --data to train probes on")
    validation_split: str | None = option(
        None, "split of --data for model selection; held out of the training split if not given"
    )
    test_split: str = option("test", "split of --data to measure on")
    image_column: str | None = option(None, "image column of --data; found by its usual names if not given")
    label_column: str | None = option(None, "label column of --data: indices or names; found if not given")
    caption_column: str | None = option(None, "retrieval: caption column of --data; found if not given")
    caption_form: CaptionForm = option(
        "text", "retrieval: form of a value of that column: text (one caption), lines (one a line) or json (a list)"
    )
    class_names: str | None = option(
        None, "file with the class names of --data, one a line, in the order of the labels"
    )
    text_labels: TextLabels | None = option(
        None, "meaning of labels written as text where class names are numbers: index or name"
    )
    metric: ClassMetric = option("accuracy", f"metric of --data with labels: {', '.join(get_args(ClassMetric))}")
    templates: list[str] = option(
        [], "prompts for classes: clip_1, clip_7, clip_80, or templates; each data set's own if not given"
    )
    batch_size: int = option(128, "images encoded at once by each process", _BATCH)
    num_workers: int | None = option(
        None, "data loader workers per process; chosen by the number of cores if not given", integer(0, 1024)
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32 or bf16")
    mask_ratio: float = option(
        0.5,
        "masked: fraction of patches dropped from a view",
        number(0, 1, open_low=True, open_high=True, says="is a fraction between 0 and 1, {range}"),
    )
    shots: list[int] = option(
        [1, 2, 4, 8, 16],
        "few-shot: training images per class",
        integer(1, 1_000_000, says="are numbers of images per class, {range}"),
    )
    repeats: int = option(3, "few-shot: number of draws of training images", integer(1, 1_000_000))
    probe: Literal["clip", "mae", "flip"] = option(
        "clip",
        "linear-probe: clip (L-BFGS on features), mae (LARS on augmented images) or flip (the same, at FLIP's rate)",
    )
    recipe: Literal["mae_b", "mae_l", "mae_h", "flip"] | None = option(
        None, "fine-tune: mae_b, mae_l, mae_h or flip; chosen by the size if not given"
    )
    epochs: int | None = option(
        None, "fine-tune and the probes mae and flip: epochs; the recipe's if not given", integer(1, 1_000_000)
    )
    train_batch_size: int | None = option(
        None, "the same tasks: batch size over all processes; the recipe's if not given", _BATCH
    )
    train_base_lr: float | None = option(
        None, "the same tasks: learning rate for 256 samples; the recipe's if not given", number(0, 1000)
    )
    seed: int = option(0, "seed of draws, masks and splits", SEED)
    output_dir: str | None = option(None, "folder of the results; evaluation/ in a model folder, else below runs/")
    card: bool = option(False, "write the results into the model folder's card, as a model-index")

    def __post_init__(self):
        check_options(self)
        require(bool(self.tasks), f"--tasks is empty; choose from {', '.join(TASKS)}.")
        require(bool(self.shots), "--shots needs at least one number of images per class.")
        require(
            bool(self.datasets) or self.data is not None,
            "Name known data sets with --datasets, or data of your own with --data.",
        )
        is_retrieval = self.tasks == ["retrieval"]
        for name, other in (("label_column", "caption_column"), ("caption_column", "label_column")):
            misplaced = getattr(self, name) is not None and is_retrieval == (name == "label_column")
            require(not misplaced, f"--{name} is for other tasks; for {' '.join(self.tasks)} use --{other}.")
        if self.templates:
            try:
                resolve_templates(self.templates[0] if len(self.templates) == 1 else self.templates)
            except ValueError as error:
                raise OptionError(f"--templates: {error}") from None

    def data_sets(self) -> list[DataSet]:
        """Returns the known data sets that were named, and the user's own.

        Raises:
            ValueError: a name is unknown, or a task fits none of them.
        """
        chosen = [data_set(name) for name in data_set_names(self.datasets)]
        if self.data is not None:
            chosen.append(self._own_data(self.data))
        for task in self.tasks:
            if not any(fits(task, each) for each in chosen):
                kind = "retrieval" if task == "retrieval" else "classification"
                raise ValueError(f"The task {task} needs data for {kind}, and none was named.")
        return chosen

    def _own_data(self, path: str) -> DataSet:
        from flip_hf.evaluation.loading import read_class_names  # here, since it imports all that reads data

        is_retrieval = self.tasks == ["retrieval"]
        splits = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        return DataSet(
            name=Path(shown(path)).name,
            title=short_name(shown(path)),
            task="retrieval" if is_retrieval else "classification",
            groups=(),
            path=path,
            config=self.config,
            splits={name: called for name, called in splits.items() if called is not None},
            image_column=self.image_column,
            target_column=self.caption_column if is_retrieval else self.label_column,
            metric="recall" if is_retrieval else self.metric,
            templates=("{}",) if is_retrieval else prompt_set("clip_1"),
            licence="",
            sources=(),
            class_names=read_class_names(self.class_names) if self.class_names else None,
            text_labels=self.text_labels,
            caption_form=self.caption_form,
        )


def fits(task: str, data_set: DataSet) -> bool:
    """Returns whether a data set is suitable for a task."""
    return (task == "retrieval") == (data_set.task == "retrieval")


def list_data_sets() -> None:
    """Prints the known data sets, one a line."""
    for name in all_data_sets():
        known = data_set(name)
        where = known.path or "not on the Hub"
        print(f"{name:<24} {known.task:<15} {known.metric:<15} {', '.join(known.groups):<22} {where}")


def parse_command(argv: list[str]) -> tuple[str, EvaluationOptions]:
    """Parses the command line: MODEL, then options.

    Raises:
        OptionError: MODEL is missing, or an option is unknown, or has a value of another type or out of range.
        ValueError: a data set or group is unknown.
    """
    require("--list" not in argv, "--list stands alone: it lists the known data sets.")
    model, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    options = parse_options(rest)
    if model is None:
        raise OptionError(
            "Name the model first: a folder or Hub id of a FLIP, CLIP or SigLIP model, or of a FLIP vision tower."
        )
    if options.card and not Path(model).is_dir():
        raise OptionError(f"--card writes into a model folder, and {model} is not one.")
    data_set_names(options.datasets)
    return model, options


def parse_options(argv: list[str]) -> EvaluationOptions:
    """Parses the command line after the model's name.

    Raises:
        OptionError: an option is unknown, or has a value of another type or out of range.
    """
    parser = OptionsParser(
        [EvaluationOptions],
        prog="flip-hf evaluate",
        usage="%(prog)s MODEL [--OPTION VALUE ...]",
        description="Evaluates MODEL, the first argument: a folder or Hub id of a FLIP, CLIP or SigLIP model, or of a "
        "FLIP vision tower. `--list` alone lists the known data sets.",
    )
    (options,) = parser.parse(argv)
    return options
