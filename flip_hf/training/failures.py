"""Explanations, in one line, of why a run ended: what happened, in which process, and how to resume."""

import errno
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from flip_hf.data.refusals import BadDataError
from flip_hf.training.agreement import PeerFailed
from flip_hf.training.arguments import Arguments
from flip_hf.training.checkpoint import DamagedCheckpointError, find_checkpoints
from flip_hf.training.health import RunDiverged
from flip_hf.training.states import StateError

# Failures whose own message needs no explanation.
_CLEAR = (BadDataError, RunDiverged, DamagedCheckpointError, StateError)
# How gloo and NCCL report that another process is gone.
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|gloo|nccl|timed out waiting", re.IGNORECASE)
_KILLED = re.compile(r"DataLoader worker \(pid\(?s?\)?:? ?[\d, ]+\) (is killed by signal: (\w+)|exited unexpectedly)")


def is_clear(error: BaseException) -> bool:
    """Returns whether an error's message says what happened, so that no traceback is needed."""
    return isinstance(error, _CLEAR) or _in_words(error) is not None


def explain(error: BaseException, arguments: Arguments, rank: int, count: int) -> str:
    """Explains why a process of a run ended, and how to resume.

    Args:
        error: the error that ended it.
        arguments: the run's arguments.
        rank, count: the process's rank and the number of processes.
    """
    what = str(error) if isinstance(error, _CLEAR) else _in_words(error) or f"{type(error).__name__}: {error}"
    where = f"process {rank} of {count}: " if count > 1 else ""
    return f"{where}{what.rstrip('.')}. {_way_on(Path(arguments.run.output_dir))}"


def lost_another(error: BaseException) -> bool:
    """Returns whether a process ended because another one did, which explains itself if it can."""
    if isinstance(error, PeerFailed):
        return True
    of_torch = isinstance(error, (torch.distributed.DistError, RuntimeError))
    return of_torch and torch.distributed.is_initialized() and _LOST.search(str(error)) is not None


def _in_words(error: BaseException) -> str | None:
    killed = _KILLED.search(str(error)) if isinstance(error, RuntimeError) else None
    if killed:
        how = f" by {killed.group(2)}" if killed.group(2) else ""
        return (
            f"A loader worker was killed{how}, most often because memory ran out. Use fewer --num_workers or a "
            "smaller --shuffle_block"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return f"The device is out of memory: {str(error).splitlines()[0]} Use a smaller --micro_batch_size"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full{_named(error)}. Free some space"
    if isinstance(error, SafetensorError) and "os error" in str(error):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}{_named(error)}"
    return None


def _named(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def _way_on(output_dir: Path) -> str:
    found = find_checkpoints(output_dir)
    if not found:
        return "No checkpoint was written yet."
    return f"The last checkpoint is {found[-1]}; --resume_from_checkpoint auto resumes from it."
