"""A run's weights, optimizer, average and random states as safetensors: names and tensors, which cannot run code.

Accelerate's `save_state` and torch's distributed checkpoints load parts of theirs by pickle (registered objects, the
metadata of shards), so a checkpoint from somebody else could run arbitrary code. Here every file is a safetensors file
of whole tensors under the model's own names; each process takes its shard of them, so any number of processes can read
what any other number wrote. DeepSpeed's optimizer is read by DeepSpeed's own code, under torch's restricted unpickler
(see [`restricted_unpickling`]).
"""

import json
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flip_hf.console.files import share_weights

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
AVERAGE = "average.safetensors"
ADAPTED = "lora.safetensors"  # layers with adapters: the weights before merging, and the adapters
# The form in which safetensors reports errors of the operating system.
_OS_ERROR = re.compile(r"os error (\d+)")


class StateError(ValueError):
    """This run cannot load a checkpoint's file; the message names the file and the difference."""


def random_states_file(rank: int) -> str:
    """Returns the name of the file of a process's random states."""
    return f"random_states_{rank}.safetensors"


def whole(value: torch.Tensor) -> torch.Tensor:
    """Gathers a tensor that may be sharded; every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: torch.Tensor) -> torch.Tensor:
    """Returns this process's shard of a tensor that may be sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def whole_tensors(tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Gathers tensors one by one, onto the CPU if `keep`; every process must call it.

    Returns:
        All of them if `keep`, else none.
    """
    kept = {}
    for name, value in tensors.items():
        gathered = whole(value.detach())
        if keep:
            kept[name] = gathered.cpu().contiguous().clone()  # safetensors refuses shared memory
    return kept


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns an optimizer's state as `{parameter/kind: tensor}`, such as `logit_scale/exp_avg`; shards stay shards."""
    state = optimizer.state
    return {
        f"{name}/{kind}": value
        for name, parameter in module.named_parameters()
        for kind, value in state.get(parameter, {}).items()
    }


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the disk is full, or the folder is gone.
    """
    try:
        save_file(tensors, path, metadata)
        share_weights(path.parent)
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from None


def save_random_states(path: Path) -> None:
    """Writes the states of Python's, NumPy's and torch's generators of this process."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    plain = {"python": [version, gauss], "numpy": [name, int(position), int(has_gauss), float(cached)]}
    write_tensors(tensors, path, {"states": json.dumps(plain)})


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Opens a safetensors file.

    Raises:
        StateError: it is not one, or cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} cannot be read: {error}. Resume from another checkpoint.") from None


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads the names and shapes of a safetensors file's tensors from its header.

    Raises:
        StateError: it cannot be read.
    """
    with open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


@torch.no_grad()
def load_tensors(path: Path, targets: dict[str, torch.Tensor]) -> None:
    """Copies a file's tensors into tensors of the same names and shapes, which may be sharded.

    Raises:
        StateError: names or shapes differ; nothing is copied.
    """
    with open_tensors(path) as file:
        _check(path, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, targets)
        for name, target in targets.items():
            target.copy_(_shard(file.get_tensor(name), target))


def difference(there: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]]) -> str | None:
    """Describes the tensors in which a file and a model differ, those in both first; None where they agree.

    Args:
        there, here: shapes by name, of the file and of the model.
    """
    shared = [name for name in here if name in there and there[name] != here[name]]
    only_there = [name for name in there if name not in here]
    only_here = [name for name in here if name not in there]
    differing = [*shared, *only_there, *only_here]
    if not differing:
        return None
    name = differing[0]
    shapes = f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
    return f"{name} is {shapes} ({len(differing)} tensors differ)."


def shapes_in(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the whole shapes, by name, of tensors that may be sharded."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _check(path: Path, there: dict[str, tuple[int, ...]], targets: dict[str, torch.Tensor]) -> None:
    found = difference(there, shapes_in(targets))
    if found is not None:
        raise StateError(f"{path} does not fit this run: {found}")


def _shard(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Takes this process's shard of a whole tensor, as `target` is sharded."""
    if not isinstance(target, DTensor):
        return value
    # Every process has read the same file, so nothing is sent.
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def load_optimizer(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores an optimizer's state; learning rate, weight decay and momenta remain this run's.

    Raises:
        StateError: the file has a tensor for an unknown parameter, or of another shape.
    """
    parameters = dict(module.named_parameters())
    numbers = {id(parameter): index for index, parameter in enumerate(_in_groups(optimizer))}
    state: dict[int, dict[str, torch.Tensor]] = {}
    with open_tensors(path) as file:
        for key in file.keys():
            name, _, kind = key.rpartition("/")
            parameter = parameters.get(name)
            number = numbers.get(id(parameter))
            value = file.get_tensor(key)
            if parameter is None or number is None or value.shape not in (parameter.shape, torch.Size([])):
                raise StateError(f"{path} does not fit this run: it has no place for {key} {tuple(value.shape)}.")
            of_parameter = value.shape == parameter.shape and kind != "step"
            state.setdefault(number, {})[kind] = _shard(value, parameter) if of_parameter else value
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": own})


def _in_groups(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Lists the parameters in the order of the optimizer's `state_dict`."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def load_random_states(path: Path) -> bool:
    """Restores the states that [`save_random_states`] wrote.

    Returns:
        False where there is no such file, or it comes from another kind of machine.
    """
    if not path.is_file():
        return False
    with open_tensors(path) as file:
        try:
            plain = json.loads((file.metadata() or {})["states"])
            version, gauss = plain["python"]
            name, position, has_gauss, cached = plain["numpy"]
            keys = file.get_tensor("numpy").numpy().astype(np.uint32)
            random.setstate((version, tuple(file.get_tensor("python").tolist()), gauss))
            np.random.set_state((name, keys, position, has_gauss, cached))
            torch.set_rng_state(file.get_tensor("torch"))
            if torch.cuda.is_available():
                states = [file.get_tensor(f"cuda.{i}") for i in range(torch.cuda.device_count())]
                torch.cuda.set_rng_state_all(states)
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError):
            return False
    return True


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Restricts every `torch.load` inside to tensors and plain values, whatever its arguments.

    For DeepSpeed, whose own code reads its checkpoints and allows everything.
    """
    from deepspeed.runtime.fp16 import loss_scaler  # pyright: ignore[reportMissingImports]
    from deepspeed.runtime.zero.config import ZeroStageEnum  # pyright: ignore[reportMissingImports]
    from deepspeed.utils.tensor_fragment import fragment_address  # pyright: ignore[reportMissingImports]

    allowed = [loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address]
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
