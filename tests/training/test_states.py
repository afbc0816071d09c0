"""A checkpoint's tensors: the same from one process, two, and two that share weights and moments out (FSDP2).

What any of them wrote, any other reads; names and shapes are checked before anything is copied.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from flip_hf.training import states
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.checkpoint import FORMAT, load_checkpoint
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.optimization import make_optimizer
from tests.helpers.contrast import make_model
from tests.helpers.programs import run_program
from tests.helpers.two_steps import RUN, one_process

# After two steps: writes, spoils everything, reads it again.
WRITE = """
from pathlib import Path
import json
from flip_hf.training import states
from flip_hf.training.checkpoint import FORMAT, TrainState, _write_tensors, load_checkpoint
folder = Path(out).parent / "checkpoint"
if accelerator.is_main_process:
    folder.mkdir()
    state = {"format": FORMAT, "good": True, "state": {"samples": 5}, "environment": {}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
accelerator.wait_for_everyone()
_write_tensors(accelerator, folder, None)
accelerator.wait_for_everyone()
model = accelerator.unwrap_model(distribution.model).model
def everything():
    tensors = {**model.state_dict(), **states.optimizer_tensors(model, distribution.optimizer.optimizer)}
    return {name: states.local(value).clone() for name, value in tensors.items()}
before = everything()
drawn = torch.rand(3)
with torch.no_grad():
    for parameter in model.parameters():
        states.local(parameter).add_(1)
distribution.optimizer.state.clear()
assert load_checkpoint(accelerator, folder).samples == 5
after = everything()
assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
assert torch.equal(torch.rand(3), drawn)
distribution.end()
"""


# The same with DeepSpeed, whose moments are its own; then with a pickle that acts in place of each of its files.
ATTACK = """
class Acts:
    def __reduce__(self):
        return Path.touch, (folder / "acted",)
if accelerator.is_main_process:
    for path in (folder / "deepspeed").iterdir():
        torch.save({"x": Acts()}, path)
accelerator.wait_for_everyone()
try:
    load_checkpoint(accelerator, folder)
except ValueError as error:
    assert "could run code, and was not loaded" in str(error)
else:
    raise AssertionError("loaded")
assert not (folder / "acted").exists()
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_reads_its_own_and_runs_nothing(tmp_path):
    """Seen with DeepSpeed 0.19.8: its code asks torch to unpickle anything."""
    head, _, _ = RUN.partition("encoder = distribution.whole_encoder()")
    write = WRITE.replace("states.optimizer_tensors(model, distribution.optimizer.optimizer)", "{}")
    write = write.replace("distribution.optimizer.state.clear()\n", "").replace("distribution.end()", ATTACK)
    (tmp_path / "run.py").write_text(head + write)
    environment = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "false"}
    run = run_program(
        tmp_path / "run.py",
        "zero2",
        1,
        tmp_path / "out.pt",
        0.0,
        "adamw",
        "softmax",
        processes=2,
        environment=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def run_and_write(kind: str, folder: Path, optimizer: str = "adamw") -> Path:
    head, _, _ = RUN.partition("encoder = distribution.whole_encoder()")
    (folder / "run.py").write_text(head + WRITE)
    run = run_program(
        *(folder / "run.py", kind, 1, folder / "out.pt", 0.0, optimizer, "softmax"),
        processes=2,
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "checkpoint"


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_checkpoint_of_two_processes_is_read_by_one(kind, tmp_path):
    checkpoint = run_and_write(kind, tmp_path)
    assert all(path.suffix in (".safetensors", ".json") for path in checkpoint.iterdir())
    accelerator = Accelerator(cpu=True)
    model = make_model()
    options = OptimizationArguments()
    prepared = accelerator.prepare(PairEncoder(model), make_optimizer(PairEncoder(model), options))
    load_checkpoint(accelerator, checkpoint)
    expected = one_process()
    for name, value in model.state_dict().items():
        assert (value.double() - expected[name].double()).abs().max() < 1e-8, name
    optimizer = prepared[1].optimizer
    moments = states.optimizer_tensors(model, optimizer)
    assert len(moments) == 3 * len(list(model.parameters())) and all(m.isfinite().all() for m in moments.values())
    assert {float(value) for name, value in moments.items() if name.endswith("/step")} == {2.0}
    # Options are this run's, not the checkpoint's.
    assert [group["weight_decay"] for group in optimizer.param_groups] == [options.weight_decay, 0.0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_muons_moments_of_two_processes_are_read_by_one(kind, tmp_path):
    checkpoint = run_and_write(kind, tmp_path, optimizer="muon")
    model = make_model()
    optimizer = make_optimizer(PairEncoder(model), OptimizationArguments(optimizer="muon"))
    states.load_optimizer(checkpoint / states.OPTIMIZER, model, optimizer)
    matrices = optimizer.param_groups[0]["params"]
    assert len(matrices) == 24 and all(list(optimizer.state[p]) == ["momentum_buffer"] for p in matrices)
    assert len(optimizer.state) == len(list(model.parameters()))
    assert optimizer.state[matrices[0]]["momentum_buffer"].abs().sum() > 0


def test_nothing_is_copied_where_something_differs(tmp_path):
    model = torch.nn.Linear(2, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, spoilt in {
        "weight is (9, 2) there and (3, 2) here": {"weight": torch.zeros(9, 2), "bias": torch.zeros(3)},
        "more is (1,) there and absent here": {**before, "more": torch.zeros(1)},
        "bias is absent there and (3,) here": {"weight": torch.zeros(3, 2)},
    }.items():
        save_file(spoilt, tmp_path / "x.safetensors")
        with pytest.raises(states.StateError) as error:
            states.load_tensors(tmp_path / "x.safetensors", model.state_dict())
        assert name in str(error.value) and "x.safetensors" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_optimizer_takes_no_moments_of_other_parameters(tmp_path):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    for key, value in {"other/exp_avg": torch.zeros(3, 2), "weight/exp_avg": torch.zeros(4, 2)}.items():
        save_file({key: value}, tmp_path / "optimizer.safetensors")
        with pytest.raises(states.StateError, match=f"no place for {key}"):
            states.load_optimizer(tmp_path / "optimizer.safetensors", model, optimizer)


def test_random_states_come_back_and_others_are_refused(tmp_path):
    import random

    import numpy as np

    path = tmp_path / "random.safetensors"
    random.gauss(0, 1)  # which keeps a second number back
    np.random.normal()
    states.save_random_states(path)
    drawn = [(random.gauss(0, 1), np.random.normal(), torch.rand(1).item()) for _ in range(2)]
    assert states.load_random_states(path)
    assert [(random.gauss(0, 1), np.random.normal(), torch.rand(1).item()) for _ in range(2)] == drawn
    assert not states.load_random_states(tmp_path / "missing.safetensors")
    tensors = load_file(path)
    for name, value in {
        "torch": torch.zeros(3, dtype=torch.uint8),
        "python": torch.zeros(2, dtype=torch.int64),
    }.items():
        save_file({**tensors, name: value}, path, {"states": json.dumps({"python": [3, None], "numpy": ["x"]})})
        assert not states.load_random_states(path)


def test_the_format_is_under_test():
    """A change of what a checkpoint holds needs another number, or older ones end in a traceback."""
    assert FORMAT == 2
