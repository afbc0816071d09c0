"""What scripts/evaluate.py can be told."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from flip_hf.evaluation.labels import prompt_set, resolve_templates
from flip_hf.evaluation.loading import read_class_names
from flip_hf.evaluation.metrics import METRICS
from flip_hf.evaluation.registry import DataSet, data_set, data_set_names
from flip_hf.redaction import shown

TASKS = ("zero-shot", "masked", "retrieval", "linear-probe", "few-shot", "fine-tune")
FINE_TUNE_RECIPES = ("mae_b", "mae_l", "mae_h", "flip")
NEED_TRAINING = ("linear-probe", "few-shot", "fine-tune")
NEED_TEXTS = ("zero-shot", "masked", "retrieval")
PROBES = ("clip", "mae", "flip")


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluationOptions:
    """What is measured, on what, and how."""

    tasks: list[str] = _option(["zero-shot"], f"any of {', '.join(TASKS)}")
    datasets: list[str] = _option([], "names or groups of known data sets; --list shows them")
    data_dir: str | None = _option(None, "folder of local copies, one folder a data set")
    data: str | None = _option(None, "data of your own: a folder, tar or parquet files, or a Hub id")
    config: str | None = _option(None, "its configuration on the Hub")
    train_split: str | None = _option(None, "its split to train probes on")
    validation_split: str | None = _option(None, "its split to choose by; held out of the training split if not given")
    test_split: str = _option("test", "its split to measure on")
    image_column: str | None = _option(None, "its image column; found by its usual names if not given")
    target_column: str | None = _option(None, "its column of labels, or of captions; found if not given")
    class_names: str | None = _option(None, "file with its class names, one a line, in the order of the labels")
    metric: str = _option("accuracy", f"of its classes: {', '.join(name for name in METRICS if name != 'recall')}")
    templates: list[str] = _option(
        [], "prompts about classes: clip_1, clip_7, clip_80, or templates; each data set's own if not given"
    )
    batch_size: int = _option(128, "images encoded at once, by each process")
    num_workers: int | None = _option(None, "loader processes of each process; by the cores if not given")
    precision: str = _option("fp32", "fp32 or bf16")
    mask_ratio: float = _option(0.5, "of masked: the fraction of patches that a view does not see")
    shots: list[int] = _option([1, 2, 4, 8, 16], "of few-shot: training images a class")
    repeats: int = _option(3, "of few-shot: draws of training images")
    probe: str = _option(
        "clip",
        "of linear-probe: clip (L-BFGS on features), mae (LARS on augmented images) or flip (likewise, with its rate)",
    )
    recipe: str | None = _option(None, "of fine-tune: mae_b, mae_l, mae_h or flip; by the size if not given")
    epochs: int | None = _option(None, "of fine-tune and the probes mae and flip; the recipe's if not given")
    train_batch_size: int | None = _option(None, "of the same, over all processes; the recipe's if not given")
    train_base_lr: float | None = _option(None, "of the same, for 256 samples; the recipe's if not given")
    seed: int = _option(0, "of draws, masks and splits")
    output_dir: str | None = _option(None, "folder of the results; evaluation/ in a model folder, else below runs/")
    card: bool = _option(False, "write the results into the model folder's card, as a model-index")

    def __post_init__(self):
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"--tasks: there is no {unknown or 'task'}; choose from {', '.join(TASKS)}.")
        if not self.datasets and self.data is None:
            raise ValueError("Name known data sets with --datasets, or data of your own with --data.")
        if self.metric not in METRICS or self.metric == "recall":
            raise ValueError(
                f"--metric is one of {', '.join(n for n in METRICS if n != 'recall')}, not {self.metric!r}."
            )
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"--precision is fp32 or bf16, not {self.precision!r}.")
        self._check_numbers()
        if self.templates:
            resolve_templates(self.templates[0] if len(self.templates) == 1 else self.templates)

    def _check_numbers(self) -> None:
        for name in ("batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.recipe not in (None, *FINE_TUNE_RECIPES):
            raise ValueError(f"--recipe is one of {', '.join(FINE_TUNE_RECIPES)}, not {self.recipe!r}.")
        if self.probe not in PROBES:
            raise ValueError(f"--probe is one of {', '.join(PROBES)}, not {self.probe!r}.")
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"--shots are numbers of images a class, at least 1, got {self.shots}.")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"--mask_ratio is a fraction between 0 and 1, got {self.mask_ratio}.")

    def data_sets(self) -> list[DataSet]:
        """The known data sets that were named, and one's own.

        Raises:
            ValueError: a name is not known, or a task fits none of them.
        """
        chosen = [data_set(name) for name in data_set_names(self.datasets)]
        if self.data is not None:
            chosen.append(self._own_data(self.data))
        for task in self.tasks:
            if not any(fits(task, each) for each in chosen):
                kind = "retrieval" if task == "retrieval" else "classification"
                raise ValueError(f"The task {task} needs data for {kind}; of what was named, nothing is.")
        return chosen

    def _own_data(self, path: str) -> DataSet:
        is_retrieval = self.tasks == ["retrieval"]
        splits = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        return DataSet(
            name=Path(shown(path)).name,
            title=shown(path),
            task="retrieval" if is_retrieval else "classification",
            groups=(),
            path=path,
            config=self.config,
            splits={name: called for name, called in splits.items() if called is not None},
            image_column=self.image_column,
            target_column=self.target_column,
            metric="recall" if is_retrieval else self.metric,
            templates=("{}",) if is_retrieval else prompt_set("clip_1"),
            licence="",
            sources=(),
            class_names=read_class_names(self.class_names) if self.class_names else None,
        )


def fits(task: str, data_set: DataSet) -> bool:
    """Whether a task can be done with a data set at all."""
    return (task == "retrieval") == (data_set.task == "retrieval")


def parse_options(argv: list[str]) -> EvaluationOptions:
    """Reads the command line after the model's name.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    parser = HfArgumentParser(EvaluationOptions, prog=f"{Path(sys.argv[0]).name} MODEL", allow_abbrev=False)  # pyright: ignore
    (options,) = parser.parse_args_into_dataclasses(args=argv)
    return options
