"""Which checkpoint a run goes on from, the same one in every process, and whether the run fits it."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig

from flip_hf.modeling import FlipForPreTraining, FlipModel, FlipPreTrainingConfig
from flip_hf.training.arguments import Arguments
from flip_hf.training.checkpoint import (
    RECIPE,
    STATE,
    DamagedCheckpointError,
    environment,
    newest_good_checkpoint,
)
from flip_hf.training.manifest import check_manifest

logger = logging.getLogger(__name__)

Model = FlipModel | FlipForPreTraining

# Options that may change in a resumed run and leave its losses as they are.
HARMLESS = {
    *("output_dir", "log_samples", "eval_samples", "checkpoint_samples", "keep_checkpoints", "resume_from_checkpoint"),
    *("report_to", "eval_data", "eval_config", "eval_split", "eval_image_column", "label_column", "class_names"),
    *("templates", "eval_batch_size", "max_bad_fraction", "max_skipped_steps", "grid_samples"),
}
# Options that a checkpoint has its own answer to.
STARTING = {
    *("model_name_or_path", "init_vision_from"),
    *("tokenizer", "special_tokens", "tokenizer_vocab_size", "tokenizer_samples"),
}


def resolve_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, checked; None for a new run. Reads all of it: let one process call it.

    Args:
        wanted: a checkpoint's folder; `latest` for the newest good one of the run; `auto` for the same, or a new run
            where there is none; None for a new run.
        output_dir: the run's folder.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        DamagedCheckpointError: what there is cannot be used.
    """
    if wanted is None:
        return None
    if wanted in ("auto", "latest"):
        found = newest_good_checkpoint(output_dir)
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
    return Path(wanted)


def shared_checkpoint(accelerator: Accelerator, wanted: str | None, output_dir: Path) -> Path | None:
    """[`resolve_checkpoint`] for all processes: the main one reads and checks, the others are told.

    Raises:
        FileNotFoundError, DamagedCheckpointError: as there, in every process.
    """
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [resolve_checkpoint(wanted, output_dir)]
        except (FileNotFoundError, DamagedCheckpointError) as error:
            answer = [error]
    (found,) = broadcast_object_list(answer)
    if isinstance(found, Exception):
        raise found
    return found


def check_fit(accelerator: Accelerator, arguments: Arguments, model: Model, checkpoint: Path) -> None:
    """Looks whether a run fits a checkpoint before anything of it is loaded.

    Warns, in the main process, of everything because of which the run will not repeat the bits of an uninterrupted one.

    Raises:
        ValueError: the checkpoint holds a model of other shapes.
    """
    changes = recipe_changes(arguments, checkpoint)
    _check_shapes(model, checkpoint, changes)
    saved = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["environment"]
    now = environment(accelerator)
    changes |= {name: (saved.get(name), now[name]) for name in now if saved.get(name) != now[name]}
    if changes and accelerator.is_main_process:
        logger.warning(
            "This run is not the one that wrote %s; it goes on from there, but not as that one would have: %s.",
            checkpoint.name,
            _in_words(changes),
        )


def recipe_changes(arguments: Arguments, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
    """Options that change a run's course and differ from the checkpoint's recipe: `{name: (there, here)}`."""
    there = yaml.safe_load((checkpoint / RECIPE).read_text(encoding="utf-8"))
    here = yaml.safe_load(yaml.safe_dump(arguments.to_recipe()))
    names = [name for name in {**here, **there} if name not in HARMLESS | STARTING]
    return {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}


def _in_words(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} was {there}, is {here}" for name, (there, here) in changes.items())


def _check_shapes(model: Model, checkpoint: Path, changes: dict[str, tuple[Any, Any]]) -> None:
    config: Any = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        saved = FlipForPreTraining(config) if isinstance(config, FlipPreTrainingConfig) else FlipModel(config)
    there, here = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (saved, model))
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{checkpoint} holds another model: {name} is {there.get(name, 'absent')} there and "
            f"{here.get(name, 'absent')} here ({len(differing)} tensors differ). {_in_words(changes)}. Resume with the "
            f"options in {checkpoint / RECIPE}."
        )
