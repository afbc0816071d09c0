"""Stages of a run, as `--stages` lists them: samples each, and what differs from the options of the whole run.

Small images first and large ones last cost half of the FLOPs at level accuracy (Perception Encoder, Bolya et al. 2025,
arXiv 2504.13181); CLIPA (Li et al. 2023, arXiv 2305.07017) begins with small images and short texts.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, get_type_hints

from flip_hf.console.fields import OptionError, complaint, kind_of, option, require
from flip_hf.console.parsers import nearest
from flip_hf.console.ranges import FRACTION, POSITIVE, integer, number

# The options that `--stages` takes the place of.
REPLACED = (
    *("train_samples", "mask_ratio_end", "mask_edge_strength_end"),
    *("unmasked_samples", "unmasked_base_lr", "unmasked_warmup_samples"),
)
MAX_STAGES = 64
EXAMPLE = '[{"samples": 1000, "mask_ratio": 0.75}, {"samples": 100, "mask_ratio": 0}]'


@dataclass(frozen=True)
class Stage:
    """A stage of a run; what is None is as the options of the whole run say.

    Attributes:
        samples: samples seen in it.
        image_size: side of the images, in pixels; the model's own at the end of the run.
        text_length: tokens that texts are cut to, the end token included; the model's context if not given.
        mask_ratio, text_mask_ratio: fractions of the patches and of the text's context, or its `text_length`, dropped.
        base_lr: peak, for 256 samples a step, of a learning-rate curve that begins with this stage and lasts until the
            next one that has its own. A stage without it continues the curve before it.
        warmup_samples: length of that curve's linear warm-up.
    """

    samples: int = option(0, "samples seen", POSITIVE)
    image_size: int | None = option(None, "side of the images, in pixels", integer(1, 2**14))
    text_length: int | None = option(None, "tokens that texts are cut to", integer(2, 2**20))
    mask_ratio: float | None = option(None, "fraction of the patches dropped", FRACTION)
    text_mask_ratio: float | None = option(None, "fraction of the text's context dropped", FRACTION)
    base_lr: float | None = option(None, "peak learning rate for 256 samples a step", number(0, 1000))
    warmup_samples: int | None = option(None, "samples of linear warm-up", integer(0))

    def to_recipe(self) -> dict[str, Any]:
        """Returns the values that are given, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


_FIELDS = {field.name: field for field in dataclasses.fields(Stage)}


def read_stages(text: str) -> list[Stage]:
    """Reads the stages of `--stages`, a JSON list of objects.

    Raises:
        OptionError: it is something else, or a stage has an unknown field, no samples or a bad value; the message names
            the number of the stage.
    """
    try:
        listed = json.loads(text, object_pairs_hook=_fields_once)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"--stages must be JSON such as {EXAMPLE}: {error}.") from error
    is_list = isinstance(listed, list) and all(isinstance(each, dict) for each in listed)
    require(is_list, f"--stages must be a JSON list of objects, one for each stage, got {text[:200]}.")
    require(0 < len(listed) <= MAX_STAGES, f"--stages lists between 1 and {MAX_STAGES} stages, got {len(listed)}.")
    stages = [_read_stage(f"--stages, stage {n}", fields) for n, fields in enumerate(listed, start=1)]
    for n, stage in enumerate(stages[1:], start=2):
        require(
            stage.warmup_samples is None or stage.base_lr is not None,
            f"--stages, stage {n}: warmup_samples is the start of a learning-rate curve of the stage's own; give "
            "its base_lr, too.",
        )
    return stages


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"one of {', '.join(fields)} is given twice in a stage")
    return fields


def _read_stage(where: str, fields: dict[str, Any]) -> Stage:
    require("samples" in fields, f"{where} has no samples.")
    values: dict[str, Any] = {}
    hints = get_type_hints(Stage)
    for name, value in fields.items():
        field = _FIELDS.get(name)
        if field is None:
            raise OptionError(f"{where} has no field {name!r}.{nearest(name, _FIELDS)}")
        kind = kind_of(hints[name])
        value = _number(kind.value, value)
        fault = complaint(field, kind, value)
        require(fault is None, f"{where}: {name} {fault}")
        values[name] = value
    return Stage(**values)


def _number(kind: type, value: object) -> object:
    """Parses a number that is written as text, as YAML reads 4e-6; returns other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        return value


def check_stages(arguments: Any) -> None:
    """Checks the options of a run with stages against each other; of a run without, there is nothing to check.

    Args:
        arguments: an [`Arguments`][flip_hf.training.arguments.Arguments].

    Raises:
        OptionError: an option says what `--stages` says, a stage is shorter than a step, an evaluation could end the
            run before its last stage, or a stage leaves nothing to reconstruct.
    """
    options = arguments.optimization
    if options.stages is None:
        return
    for group in (arguments.model, options):
        for field in dataclasses.fields(group):
            require(
                field.name not in REPLACED or getattr(group, field.name) == field.default,
                "--stages has the samples, mask ratios and learning rates of all stages, and takes the place of "
                f"--{field.name}: give one of them.",
            )
    stages = read_stages(options.stages)
    for n, stage in enumerate(stages, start=1):
        where = f"--stages, stage {n}"
        require(
            stage.samples >= options.batch_size,
            f"{where}: samples is {stage.samples:,}, less than a step's --batch_size {options.batch_size:,}.",
        )
        require(
            stage.mask_ratio != 0 or not arguments.objective.reconstructs,
            f"{where}: on whole images --objective {arguments.objective.objective} has nothing to reconstruct. Give "
            "a mask_ratio above 0.",
        )
    require(
        arguments.run.early_stopping_patience is None or len(stages) == 1,
        "--early_stopping_patience would skip the stages that are left. Give --stages a single one, and train the "
        f"result further afterwards: --model_name_or_path {arguments.run.output_dir}.",
    )
