"""Checkpoints: everything a run needs to go on; a folder is whole and checked, or it is not used.

A checkpoint is written under another name, brought to the disk with a checksum of every file, and renamed; only then
older ones are removed. So a process may be killed at any moment. Model, optimizer and generators are Accelerate's
`save_state`, which FSDP and DeepSpeed understand; it reads its pickled files with `weights_only`, which runs no code.
"""

import itertools
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import ProcessorMixin

from flip_hf.training.arguments import Arguments, write_recipe
from flip_hf.training.manifest import check_manifest, sync, write_manifest

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = "partial-"
STATE = "trainer_state.json"
RECIPE = "recipe.yaml"
SET_ASIDE = "set-aside"


@dataclass
class TrainState:
    """Where a run stands, in samples of all processes and in steps; skipped steps are steps too."""

    samples: int = 0
    steps: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0


class DamagedCheckpointError(ValueError):
    """There are checkpoints, and none of them is as it was written."""


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What, besides the recipe, the bits of a run depend on."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, np)}
    return {"processes": accelerator.num_processes, "device": accelerator.device.type, **versions}


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, whether they are good or not."""
    numbered = ((_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*") if path.is_dir())
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in numbered if match)]


def newest_good_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of which every file is as it was written; None where there are no checkpoints.

    Warns of each damaged one that it passes over and names the files. All files are read: let one process call it.

    Raises:
        DamagedCheckpointError: none is good; the message lists what is wrong with each.
    """
    damaged = []
    for path in reversed(find_checkpoints(output_dir)):
        problems = check_manifest(path)
        if not problems:
            for line in damaged:
                logger.warning("Damaged checkpoint: %s. Going on from %s instead.", line, path.name)
            return path
        damaged.append(f"{path.name}: {'; '.join(problems)}")
    if damaged:
        raise DamagedCheckpointError(
            f"No checkpoint in {output_dir} can be used:\n  " + "\n  ".join(damaged) + "\nRestore one of them, or "
            "remove them to begin anew."
        )
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    accelerator: Accelerator,
    arguments: Arguments,
    state: TrainState,
    data_state: dict[str, Any],
    processor: ProcessorMixin,
) -> Path:
    """Writes model, optimizer, generators, data positions, processor and recipe, and removes checkpoints beyond
    `keep_checkpoints`; all processes must call it, and see the same `output_dir`.
    """
    output_dir = Path(arguments.run.output_dir)
    final = output_dir / f"checkpoint-{state.samples:012d}"
    partial = output_dir / f"{_PARTIAL}{final.name}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _plain_names(accelerator):
        accelerator.save_state(str(partial))
    (partial / f"data_{accelerator.process_index}.json").write_text(json.dumps(data_state), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        processor.save_pretrained(partial)
        _models(accelerator)[0].config.save_pretrained(partial)
        write_recipe(arguments, partial / RECIPE)
        described = {"state": asdict(state), "environment": environment(accelerator)}
        (partial / STATE).write_text(json.dumps(described, indent=1), encoding="utf-8")
        write_manifest(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync(output_dir)
        for old in find_checkpoints(output_dir)[: -arguments.run.keep_checkpoints]:
            _remove(old)
    accelerator.wait_for_everyone()
    return final


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that half of it is never taken for one."""
    partial = checkpoint.with_name(f"{_PARTIAL}old-{checkpoint.name}")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.rename(partial)
    shutil.rmtree(partial)


def tidy(output_dir: Path, samples: int) -> None:
    """Readies a folder for a run that starts after this many samples; the main process calls it.

    What killed runs left half written is removed. Checkpoints further than `samples` (damaged, or of a run that is now
    begun anew from before them) are moved to `set-aside`, where neither rotation nor resuming takes them for this
    run's.
    """
    for path in output_dir.glob(f"{_PARTIAL}*checkpoint-*"):
        shutil.rmtree(path)
    for path in find_checkpoints(output_dir):
        if int(path.name.removeprefix("checkpoint-")) > samples:
            aside = output_dir / SET_ASIDE / path.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning(
                "%s is further than this run, which starts after %d samples: moved to %s. To go on from it instead, "
                "move it back and use --resume_from_checkpoint auto.",
                path.name,
                samples,
                aside,
            )


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_data_states(checkpoint: Path) -> list[dict[str, Any]]:
    """The data positions of all processes that wrote the checkpoint, by rank."""
    paths = (checkpoint / f"data_{rank}.json" for rank in itertools.count())
    return [json.loads(p.read_text(encoding="utf-8")) for p in itertools.takewhile(Path.is_file, paths)]


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> TrainState:
    """Restores prepared model, optimizer and generators, and returns where the run stood; all processes must call it.

    The checkpoint is trusted to be whole: [`newest_good_checkpoint`] looks. The optimizer keeps this run's weight decay
    and momenta. A process that the checkpoint has no generators for (it was written by fewer) is given new ones, from a
    seed that depends on nothing but the checkpoint and its rank.
    """
    saved = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["state"]
    state = TrainState(**{field.name: saved[field.name] for field in fields(TrainState)})
    set_seed(int(np.random.SeedSequence([state.samples, accelerator.process_index]).generate_state(1)[0]))
    before = _generators(accelerator.device)
    groups = [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]
    options = [{name: group[name] for name in ("betas", "eps", "weight_decay") if name in group} for group in groups]
    with _plain_names(accelerator):
        accelerator.load_state(str(checkpoint))
    groups = [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]
    for group, kept in zip(groups, options, strict=True):
        group.update(kept)
    # Accelerate goes on in silence where it could not restore them.
    if any(torch.equal(old, new) for old, new in zip(before, _generators(accelerator.device), strict=True)):
        logger.warning(
            "%s has no random state that fits process %d; it draws its masks from a new seed.",
            checkpoint.name,
            accelerator.process_index,
        )
    return state


def _generators(device: torch.device) -> list[torch.Tensor]:
    """The states of torch's generators that a run draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _models(accelerator: Accelerator) -> list[Any]:
    return [accelerator.unwrap_model(encoder).model for encoder in accelerator._models]


@contextmanager
def _plain_names(accelerator: Accelerator) -> Iterator[None]:
    """Saves and loads the model's weights under its own names, without those of what wraps it: any number of processes
    reads what any other wrote, and a checkpoint is a model folder. FSDP and DeepSpeed write their own files and are not
    touched: the lists are empty.
    """

    def before_saving(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
        for i, state in enumerate(weights):
            plain = ((name.removeprefix("module.").removeprefix("model."), value) for name, value in state.items())
            weights[i] = type(state)(plain)

    def before_loading(models: list[Any], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(encoder).model for encoder in models]

    handles = [
        accelerator.register_save_state_pre_hook(before_saving),  # pyright: ignore[reportArgumentType]
        accelerator.register_load_state_pre_hook(before_loading),  # pyright: ignore[reportArgumentType]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
