"""Checkpoints: everything a run needs to resume. A folder is complete and verified, or it is not used.

A checkpoint is written under another name, synced to disk with a checksum of every file, and renamed; only then are
older ones removed. So a process may be killed at any moment. Its files are safetensors, JSON and YAML (states.py),
none of which can run code: a checkpoint from somebody else may be resumed.
"""

import itertools
import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn

from flip_hf.console.files import sync
from flip_hf.data.frequencies import WordFrequencies, write_frequencies
from flip_hf.redaction import redacted
from flip_hf.training import states
from flip_hf.training.arguments import Arguments
from flip_hf.training.lora import adapted_tensors, merged, own_tensors
from flip_hf.training.manifest import check_manifest, write_manifest
from flip_hf.training.recipes import write_recipe

logger = logging.getLogger(__name__)

# Twelve digits: another trainer's `checkpoint-500` in the same folder is not ours, and is left alone.
_NAME = re.compile(r"checkpoint-(\d{12,})")
_PARTIAL = "partial-"
_LEFT_OVER = re.compile(rf"{_PARTIAL}(old-)?checkpoint-\d{{12,}}")
# Raised where a checkpoint written by older code cannot be read by newer code.
FORMAT = 2
STATE = "trainer_state.json"
RECIPE = "recipe.yaml"
SET_ASIDE = "set-aside"
DEEPSPEED = "deepspeed"  # the folder of its own files


@dataclass
class TrainState:
    """The position of a run, in samples of all processes and in steps; skipped steps count as steps.

    Attributes:
        skipped_in_a_row: number of latest steps that were all skipped (see health.py).
        restores: times the run went back to a checkpoint since it wrote its last good one.
        compared_on, best_value, best_samples, evaluations_since_best: the record of evaluations; see best.py.
        before: metrics of the model that the run started from, its own and the retained one; see retention.py.
    """

    samples: int = 0
    steps: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    skipped_in_a_row: int = 0
    restores: int = 0
    compared_on: str = ""
    best_value: float | None = None
    best_samples: int = 0
    evaluations_since_best: int = 0
    before: dict[str, dict[str, Any]] = field(default_factory=dict)


class DamagedCheckpointError(ValueError):
    """There are checkpoints, and all of them are damaged."""


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Collects what, besides the recipe, the exact numbers of a run depend on."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, np)}
    return {"processes": accelerator.num_processes, "device": accelerator.device.type, **versions}


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Lists the checkpoints of a run, good or not, oldest first."""
    numbered = ((_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*") if path.is_dir())
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in numbered if match)]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads `trainer_state.json`: `format`, `good`, `state` and `environment`.

    Raises:
        DamagedCheckpointError: it is missing, damaged, or written by another version.
    """
    try:
        read = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        found = read.get("format", 1)
        TrainState(**read["state"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{checkpoint / STATE} cannot be read: {error!r}.") from None
    if found != FORMAT:
        raise DamagedCheckpointError(
            f"{checkpoint} has format {found}, and this version of flip_hf reads format {FORMAT}. Resume with the "
            f"version that wrote it, or start a new run from its weights: --model_name_or_path {checkpoint}."
        )
    return read


def _problems(checkpoint: Path, only_good: bool) -> list[str]:
    problems = check_manifest(checkpoint)
    if problems or not only_good or read_state(checkpoint)["good"]:
        return problems
    return ["it was written while steps were being skipped"]


def newest_good_checkpoint(output_dir: Path, only_good: bool = False) -> Path | None:
    """Finds the newest checkpoint whose files are all as they were written; None where there are no checkpoints.

    Warns about each damaged one that it skips, naming the files. All files are read: let one process call it.

    Args:
        output_dir: the run's folder.
        only_good: also skip those that were written while steps were being skipped.

    Raises:
        DamagedCheckpointError: none can be used; the message lists what is wrong with each.
    """
    damaged = []
    for path in reversed(find_checkpoints(output_dir)):
        problems = _problems(path, only_good)
        if not problems:
            for line in damaged:
                logger.warning("Damaged checkpoint: %s. Resuming from %s instead.", line, path.name)
            return path
        damaged.append(f"{path.name}: {'; '.join(problems)}")
    if damaged:
        raise DamagedCheckpointError(
            f"No checkpoint in {output_dir} can be used:\n  " + "\n  ".join(damaged) + "\nRestore one of them, or "
            "remove them to start over."
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
    processor: Any,
    average: nn.Module | None = None,
    frequencies: WordFrequencies | None = None,
) -> Path:
    """Writes model, optimizer, average, generators, data positions, processor, word frequencies and recipe, and removes
    checkpoints beyond `keep_checkpoints`; all processes must call it, and see the same `output_dir`.

    The weights must be finite: [`weights_are_finite`] checks that. A checkpoint that is written while steps are being
    skipped is marked (`"good": false`) and never replaces a good one.
    """
    output_dir = Path(arguments.run.output_dir)
    final = output_dir / f"checkpoint-{state.samples:012d}"
    partial = output_dir / f"{_PARTIAL}{final.name}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()  # without parents: a folder that was deleted is not recreated half empty
    accelerator.wait_for_everyone()
    _write_tensors(accelerator, partial, average)
    (partial / f"data_{accelerator.process_index}.json").write_text(json.dumps(data_state), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        processor.save_pretrained(partial)
        if frequencies is not None:
            write_frequencies(frequencies, processor.tokenizer, partial)
        _model(accelerator).config.save_pretrained(partial)
        write_recipe(arguments, partial / RECIPE)
        good = state.skipped_in_a_row == 0
        described = {"format": FORMAT, "good": good, "state": asdict(state), "environment": environment(accelerator)}
        (partial / STATE).write_text(json.dumps(described, indent=1), encoding="utf-8")
        write_manifest(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync(output_dir)
        for old in _superseded(output_dir, arguments.run.keep_checkpoints):
            _remove(old)
    accelerator.wait_for_everyone()
    return final


def _write_tensors(accelerator: Accelerator, folder: Path, average: nn.Module | None) -> None:
    main = accelerator.is_main_process
    model = _model(accelerator)
    states.save_random_states(folder / states.random_states_file(accelerator.process_index))
    weights = states.whole_tensors(model.state_dict(), keep=main)
    if main:
        # A model as it is used; what resuming needs of layers with adapters is beside it.
        states.write_tensors(merged(weights), folder / states.WEIGHTS, {"format": "pt"})
        if adapted := adapted_tensors(weights):
            states.write_tensors(adapted, folder / states.ADAPTED)
        if average is not None:
            states.write_tensors(states.whole_tensors(average.state_dict(), keep=True), folder / states.AVERAGE)
    del weights  # frees memory for the moments
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator._models[0].save_checkpoint(str(folder), DEEPSPEED)
        return
    moments = states.whole_tensors(states.optimizer_tensors(model, _optimizer(accelerator)), keep=main)
    if main:
        states.write_tensors(moments, folder / states.OPTIMIZER)


def _superseded(output_dir: Path, keep: int) -> list[Path]:
    """Lists the checkpoints older than the `keep` newest good ones."""
    good = 0
    for index, path in reversed(list(enumerate(found := find_checkpoints(output_dir)))):
        good += _says_good(path)
        if good == keep:
            return found[:index]
    return []


def _says_good(checkpoint: Path) -> bool:
    try:
        return bool(read_state(checkpoint)["good"])
    except DamagedCheckpointError:
        return False


def weights_are_finite(accelerator: Accelerator, average: nn.Module | None = None) -> bool:
    """Returns whether all weights, and those of the average, are finite on every process; each must call it."""
    modules = [_model(accelerator), *([average] if average is not None else [])]
    tensors = [states.local(value) for module in modules for value in module.state_dict().values()]
    bad = [~torch.isfinite(value).all() for value in tensors if value.is_floating_point() and value.numel()]
    count = torch.stack([value.to(accelerator.device) for value in bad]).sum().float()
    return accelerator.reduce(count, "sum").item() == 0  # pyright: ignore[reportAttributeAccessIssue]


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that half of one is never taken for a whole one."""
    partial = checkpoint.with_name(f"{_PARTIAL}old-{checkpoint.name}")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.rename(partial)
    shutil.rmtree(partial)


def tidy(output_dir: Path, samples: int) -> None:
    """Prepares a folder for a run that starts after this many samples; the main process calls it.

    What killed runs left half written is removed. Checkpoints beyond `samples` (damaged, or of a run that now restarts
    from before them) are moved to `set-aside`, where neither rotation nor resuming takes them for this run's.
    """
    for path in output_dir.glob(f"{_PARTIAL}*checkpoint-*"):
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path)
    for path in find_checkpoints(output_dir):
        if int(path.name.removeprefix("checkpoint-")) > samples:
            aside = free_name(output_dir / SET_ASIDE / path.name)
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
            logger.warning(
                "%s is ahead of this run, which starts after %d samples: moved to %s. To resume from it instead, "
                "move it back and use --resume_from_checkpoint auto.",
                path.name,
                samples,
                aside,
            )


def free_name(path: Path) -> Path:
    """Returns the path, with a number appended if it is taken."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_data_states(checkpoint: Path) -> list[dict[str, Any]]:
    """Reads the data positions of all processes that wrote the checkpoint, by rank.

    Raises:
        DamagedCheckpointError: one is not valid JSON.
    """
    paths = (checkpoint / f"data_{rank}.json" for rank in itertools.count())
    found = []
    for path in itertools.takewhile(Path.is_file, paths):
        try:
            found.append(redacted(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error}.") from None
    return found


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, average: nn.Module | None = None) -> TrainState:
    """Restores prepared model, optimizer, average and generators, and returns where the run stood; all processes must
    call it.

    The checkpoint is assumed to be whole: [`newest_good_checkpoint`] checks that. The optimizer keeps this run's weight
    decay and momenta. A process without generators in the checkpoint (it was written by fewer) gets new ones, from a
    seed that depends only on the checkpoint and its rank.

    Raises:
        StateError, DamagedCheckpointError: a file does not fit this run; the message names it.
    """
    state = TrainState(**read_state(checkpoint)["state"])
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        try:
            with states.restricted_unpickling():
                accelerator._models[0].load_checkpoint(str(checkpoint), DEEPSPEED)
        except UnpicklingError as error:
            raise DamagedCheckpointError(
                f"{checkpoint / DEEPSPEED} holds something other than tensors and plain values, which could run code, "
                f"and was not loaded ({str(error).strip().splitlines()[0]})."
            ) from None
    else:
        model = _model(accelerator)
        tensors = model.state_dict()
        states.load_tensors(checkpoint / states.WEIGHTS, own_tensors(tensors))
        if adapted := adapted_tensors(tensors):
            states.load_tensors(checkpoint / states.ADAPTED, adapted)
        states.load_optimizer(checkpoint / states.OPTIMIZER, model, _optimizer(accelerator))
    if average is not None:
        states.load_tensors(checkpoint / states.AVERAGE, average.state_dict())
    set_seed(int(np.random.SeedSequence([state.samples, accelerator.process_index]).generate_state(1)[0]))
    if not states.load_random_states(checkpoint / states.random_states_file(accelerator.process_index)):
        logger.warning(
            "%s has no random state that fits process %d; what its model draws comes from a new seed.",
            checkpoint.name,
            accelerator.process_index,
        )
    return state


def _model(accelerator: Accelerator) -> Any:
    """Returns the unwrapped model, whose parameter names are those of a model folder."""
    return accelerator.unwrap_model(accelerator._models[0]).model


def _optimizer(accelerator: Accelerator) -> torch.optim.Optimizer:
    return accelerator._optimizers[0].optimizer
