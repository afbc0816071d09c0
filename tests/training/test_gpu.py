"""What only a GPU can show: steps with each speed-up, compiled and recorded, are those without. None has run yet."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from flip_hf import FlipModel
from flip_hf.benchmarks.speed_ups import possible_speed_ups
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.packing import pack_texts
from flip_hf.training.speed_ups import COMPILED, speed_up
from flip_hf.training.step import train_step
from tests.helpers.contrast import make_batch
from tests.helpers.models import randomize, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
COMPILER = "inductor"
STEPS = 6  # a graph is warmed up, recorded and replayed
# The relative error of a loss or a gradient's norm in bfloat16, and in float8.
NEAR = 0.05
NEARER_TO_FLOAT8 = 0.3


def make_batches(model: FlipModel) -> list[dict[str, torch.Tensor]]:
    """Two batches of different shapes in pinned memory, as the loader gives them."""
    made = []
    for pairs in (12, 8):
        batch = {name: value[:pairs] for name, value in make_batch().items()}
        texts = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
        batch |= pack_texts(**texts, text_config=model.config.get_text_config())
        batch["pixel_values"] = batch["pixel_values"].float()
        made.append({name: value.pin_memory() if DEVICE == "cuda" else value for name, value in batch.items()})
    return made


def take_steps(names: Sequence[str], compiled: bool, spoilt: int | None = None) -> list[list[float]]:
    """The losses and the norms of the gradients of some steps, of which one may have an infinite pixel."""
    torch.manual_seed(0)
    model = randomize(FlipModel(tiny_config(vision={"intermediate_size": 64}, text={"intermediate_size": 64}))).train()
    speed_up(model, names)
    batches = make_batches(model)
    distribution = Distribution(
        Accelerator(mixed_precision="no", cpu=DEVICE == "cpu"),
        PairEncoder(model, torch.bfloat16),
        partial(make_optimizer, options=OptimizationArguments()),
        max_grad_norm=1.0,
        compiler=COMPILER if compiled else None,
        cuda_graphs="cuda_graphs" in names,
    )

    def prepare(batch: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        inputs = {name: value.to(DEVICE, non_blocking=True) for name, value in batch.items()}
        if number == spoilt:
            inputs["pixel_values"] = inputs["pixel_values"] + torch.inf
        return inputs

    numbers = []
    for number in range(STEPS):
        result = train_step(
            distribution,
            [batches[number % 2]],
            partial(prepare, number=number),
            learning_rate=1e-3,
            reconstruction_weight=1.0,
        )
        numbers.append([result.batch.loss, result.grad_norm])  # read after all steps, as a run does
    return [[float(value) for value in values] for values in numbers]


def possible() -> list[list[str]]:
    names = possible_speed_ups(DEVICE) if torch.cuda.is_available() else ["fused_qkv", "bf16_residual", *COMPILED]
    return [[], *([name] for name in names), list(names)]


@pytest.mark.parametrize("names", possible(), ids=lambda names: " ".join(names) or "none")
def test_compiled_steps_with_speed_ups_are_the_steps_without(names):
    expected = torch.tensor(take_steps([], compiled=False))
    ours = torch.tensor(take_steps(names, compiled=True))
    error = (ours - expected).abs() / expected
    assert error.max() < (NEARER_TO_FLOAT8 if "fp8" in names else NEAR), (ours, expected)


@pytest.mark.parametrize("names", [[], ["cuda_graphs"]], ids=["compiled", "recorded"])
def test_a_step_that_is_not_finite_spoils_no_later_one(names):
    numbers = torch.tensor(take_steps(names, compiled=True, spoilt=3))
    assert numbers.isfinite().all(dim=1).tolist() == [number != 3 for number in range(STEPS)]
