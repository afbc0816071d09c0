"""The checkpoint that a run resumes from, the same one in every process, and the check that the run fits it."""

import json
import logging
from functools import partial
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType

from flip_hf.console.files import read_text
from flip_hf.console.plain_yaml import read_yaml
from flip_hf.data.processes import from_main
from flip_hf.modeling import FlipForPreTraining, FlipModel
from flip_hf.redaction import redacted
from flip_hf.training.arguments import Arguments
from flip_hf.training.checkpoint import (
    DEEPSPEED,
    RECIPE,
    STATE,
    DamagedCheckpointError,
    environment,
    newest_good_checkpoint,
    read_state,
)
from flip_hf.training.finish import RESULTS
from flip_hf.training.lora import ADAPTERS, own_tensors
from flip_hf.training.manifest import check_manifest
from flip_hf.training.phases import plan_phases
from flip_hf.training.recipes import MAX_RECIPE_BYTES
from flip_hf.training.states import AVERAGE, OPTIMIZER, WEIGHTS, difference, shapes_in, shapes_of

logger = logging.getLogger(__name__)

Model = FlipModel | FlipForPreTraining

# Options that may change in a resumed run without changing its losses.
HARMLESS = {
    *("output_dir", "log_samples", "eval_samples", "checkpoint_samples", "checkpoint_minutes", "keep_checkpoints"),
    *("resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_push_samples", "export_clip"),
    *("report_to", "eval_data", "eval_config", "eval_split", "eval_image_column", "label_column", "class_names"),
    *("eval_caption_column", "eval_pairs", "early_stopping_patience"),
    *("templates", "eval_batch_size", "max_bad_fraction", "max_skipped_steps", "grid_samples"),
    *("retain_data", "retain_config", "retain_split", "retain_image_column", "retain_label_column"),
    *("retain_caption_column", "retain_class_names", "retain_templates", "retain_warning"),
}
# Files that a run leaves in its folder beside checkpoints and logs, which a new run would overwrite.
OUTPUTS = (
    *("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "recipe.yaml"),
    *("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", RESULTS),
    *("training_curves.png", "with_decoder", ADAPTERS),
)
# Options whose values a checkpoint replaces.
STARTING = {
    *("model_name_or_path", "init_vision_from"),
    *("tokenizer", "special_tokens", "tokenizer_vocab_size", "tokenizer_samples"),
}
# Options that recipes of older checkpoints do not have, and what those trained with.
ADDED = {
    **{"optimizer": "adamw", "muon_lr_scale": 1.0},
    **{"image_lr_scale": 1.0, "text_lr_scale": 1.0, "layer_decay": 1.0, "mask_edge_strength": 0.5},
}


def resolve_checkpoint(wanted: str | None, output_dir: Path, only_good: bool = False) -> Path | None:
    """Finds and checks the checkpoint to resume from; None for a new run. Reads all of it: let one process call it.

    Args:
        wanted: a checkpoint's folder; `latest` for the newest good one of the run; `auto` for the same, or a new run
            where there is none; None for a new run.
        output_dir: the run's folder.
        only_good: see [`newest_good_checkpoint`].

    Raises:
        FileNotFoundError: there is no such checkpoint.
        DamagedCheckpointError: the checkpoint cannot be used.
    """
    if wanted is None:
        return None
    if wanted in ("auto", "latest"):
        found = newest_good_checkpoint(output_dir, only_good)
        if found is None and wanted == "latest":
            raise FileNotFoundError(
                f"There is no checkpoint in {output_dir} to resume from. --resume_from_checkpoint auto begins a new "
                "run in that case."
            )
        return found
    if not (Path(wanted) / STATE).is_file():
        raise FileNotFoundError(f"{wanted} is not a checkpoint: it has no {STATE}.")
    problems = check_manifest(Path(wanted))
    if problems:
        raise DamagedCheckpointError(f"The checkpoint {wanted} cannot be used: {'; '.join(problems)}.")
    read_state(Path(wanted))
    return Path(wanted)


def shared_checkpoint(
    accelerator: Accelerator, wanted: str | None, output_dir: Path, only_good: bool = False
) -> Path | None:
    """Calls [`resolve_checkpoint`] on the main process and shares the result with all.

    Raises:
        FileNotFoundError, DamagedCheckpointError: as [`resolve_checkpoint`], on every process.
    """
    return from_main(accelerator, partial(resolve_checkpoint, wanted, output_dir, only_good))


def check_fit(
    accelerator: Accelerator, arguments: Arguments, model: Model, checkpoint: Path, averaged: bool = False
) -> None:
    """Checks that a run fits a checkpoint, before loading anything from it.

    Warns, on the main process, of every reason why the run will not be bit-identical to an uninterrupted one.

    Args:
        accelerator: the process layer.
        arguments: the run's arguments.
        model: the run's model, unwrapped.
        checkpoint: the checkpoint to resume from.
        averaged: the run keeps an average of the weights.

    Raises:
        ValueError: the checkpoint's model has other shapes, its average is missing or not wanted, or another optimizer
            or kind of distribution wrote it.
    """
    changes = recipe_changes(arguments, checkpoint)
    if "holdout" in changes:
        there, here = changes["holdout"]
        raise ValueError(
            f"{checkpoint} was trained with --holdout {there}, not {here}: what would be held out now, it may have "
            "been trained on. Resume it with its own --holdout, or start a new run."
        )
    if "optimizer" in changes:
        there, here = changes["optimizer"]
        raise ValueError(
            f"{checkpoint} was trained with --optimizer {there}, whose moments are of no use to {here}. Resume it with "
            f"--optimizer {there}, or start a new run from its weights: --model_name_or_path {checkpoint}."
        )
    _check_parts(checkpoint, changes)
    _check_shapes(model, checkpoint, changes)
    _check_files(accelerator, checkpoint, averaged)
    saved = read_state(checkpoint)["environment"]
    now = environment(accelerator)
    changes |= {name: (saved.get(name), now[name]) for name in now if saved.get(name) != now[name]}
    if changes and accelerator.is_main_process:
        logger.warning(
            "This run differs from the one that wrote %s; it resumes from there, but its numbers will differ: %s.",
            checkpoint.name,
            _in_words(changes),
        )


def _check_parts(checkpoint: Path, changes: dict[str, tuple[object, object]]) -> None:
    """Checks that the run trains the parts of the model that the checkpoint's did."""
    reasons = {"freeze": "it has no moments of what was frozen", "lora": "its adapters are of no use to others"}
    for name, reason in reasons.items():
        if name in changes:
            there, here = (" ".join(parts) if isinstance(parts, list) else "nothing" for parts in changes[name])
            raise ValueError(
                f"{checkpoint} was trained with --{name} {there}, not {here}: {reason}. Resume it with its own "
                f"--{name}, or start a new run from its weights: --model_name_or_path {checkpoint}."
            )


def _check_files(accelerator: Accelerator, checkpoint: Path, averaged: bool) -> None:
    there = (checkpoint / AVERAGE).is_file()
    if there != averaged:
        has = "no moving average" if averaged else "a moving average"
        fix = "leave --ema_half_life out" if averaged else "give the --ema_half_life that it was written with"
        raise ValueError(
            f"{checkpoint} has {has} of the weights: to resume from it, {fix}. To start a new run from its weights: "
            f"--model_name_or_path {checkpoint}."
        )
    needs = DEEPSPEED if accelerator.distributed_type == DistributedType.DEEPSPEED else OPTIMIZER
    if not (checkpoint / needs).exists():
        raise ValueError(
            f"{checkpoint} has no {needs}: only DeepSpeed reads DeepSpeed's checkpoints, and it reads no others. "
            f"Resume with the launcher that wrote it, or start a new run from its weights: "
            f"--model_name_or_path {checkpoint}."
        )


def recipe_changes(arguments: Arguments, checkpoint: Path) -> dict[str, tuple[object, object]]:
    """Finds options that change a run's course and differ from the checkpoint's recipe: `{name: (there, here)}`.

    Raises:
        DamagedCheckpointError: the recipe cannot be read.
    """
    try:
        text = read_text(checkpoint / RECIPE, "a recipe", MAX_RECIPE_BYTES)
        there = {name: redacted(read.value) for name, read in read_yaml(text, str(checkpoint / RECIPE)).items()}
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{checkpoint / RECIPE} cannot be read: {error!r}.") from None
    there = ADDED | there
    here = yaml.safe_load(yaml.safe_dump(arguments.to_recipe()))
    for values in (there, here):
        for name in ("freeze", "lora", "speed_ups"):
            values[name] = sorted(values.get(name) or []) or None  # in any order
    # In a column that is named there may be labels, whose captions are made of the class names.
    harmless = HARMLESS - {"class_names"} if arguments.data.caption_column else HARMLESS
    names = [name for name in {**here, **there} if name not in harmless | STARTING]
    return {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}


def _in_words(changes: dict[str, tuple[object, object]]) -> str:
    return ", ".join(f"{name} was {there}, is {here}" for name, (there, here) in changes.items())


def _check_shapes(model: Model, checkpoint: Path, changes: dict[str, tuple[object, object]]) -> None:
    found = difference(shapes_of(checkpoint / WEIGHTS), shapes_in(own_tensors(model.state_dict())))
    if found is not None:
        options = f" {_in_words(changes)}." if changes else ""
        raise ValueError(
            f"{checkpoint} holds another model: {found}{options} Resume with the options in {checkpoint / RECIPE}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The folder that a run writes to
# ---------------------------------------------------------------------------------------------------------------------


class RunFinished(Exception):
    """The requested run is already finished; the message says where it is."""


def check_output(output_dir: Path) -> None:
    """Checks that a new run would overwrite nothing; the folder need not exist.

    Raises:
        FileExistsError: it would overwrite a model or another run's files.
    """
    found = [path.name for pattern in OUTPUTS for path in sorted(output_dir.glob(pattern))]
    if found:
        raise FileExistsError(
            f"{output_dir} already holds {', '.join(found[:3])}, which a new run would overwrite. Name another "
            "--output_dir, or move the files."
        )


def check_finished(arguments: Arguments) -> None:
    """Checks whether the run to resume is already finished.

    Raises:
        RunFinished: it is; nothing is left to do.
        FileExistsError: a run with other options is.
    """
    output_dir = Path(arguments.run.output_dir)
    if arguments.run.resume_from_checkpoint not in ("auto", "latest"):
        return
    try:
        results = json.loads((output_dir / RESULTS).read_text(encoding="utf-8"))
        done = results["samples"] if results["finished"] else 0
    except (OSError, ValueError, KeyError, TypeError):
        return
    patience = arguments.run.early_stopping_patience
    reason = results.get("ended_early")
    is_over = reason and patience is not None and results.get("evaluations_since_best", 0) >= patience
    if (done < plan_phases(arguments)[-1].end and not is_over) or not (output_dir / RECIPE).is_file():
        return
    changes = recipe_changes(arguments, output_dir)
    changes.pop("train_samples", None)  # a run of fewer samples is finished, too
    if changes:
        raise FileExistsError(
            f"{output_dir} holds a finished run with other options: {_in_words(changes)}. Name another --output_dir."
        )
    if is_over:
        raise RunFinished(
            f"Finished: {output_dir} ended early after {done:,} samples: {reason}. To continue it, leave "
            "--early_stopping_patience out, or give a larger one."
        )
    more = "give more --train_samples" if arguments.optimization.stages is None else "add a stage to --stages"
    raise RunFinished(
        f"Finished: {output_dir} was trained on {done:,} samples, and nothing is left to do. To continue it, {more}; "
        "to start a new run, name another --output_dir."
    )
