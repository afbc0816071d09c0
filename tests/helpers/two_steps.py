"""Two steps of one process, and the script that takes them in several."""

from collections.abc import Sequence
from typing import Literal

import torch

from flip_hf.modeling import FlipModel
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.freezing import freeze, read_frozen
from flip_hf.training.lora import add_adapters, read_ranks
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.speed_ups import speed_up
from tests.helpers.contrast import BIASES, backward, make_batch, make_model, make_smaller_batch

LORA = "lora="  # in front of a tower and a rank
SPEED_UP = "speed_up="
RUN = """
import os, sys, torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import IMAGE_INPUTS, PairEncoder
from flip_hf.training.step import train_step
from flip_hf.training.optimization import make_optimizer
from tests.helpers.contrast import BIASES, PAIRS, make_batch, make_model, make_smaller_batch, take, with_grid
from tests.helpers.two_steps import set_parts

kind, pieces, out, max_norm = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]) or None
if kind == "zero2":
    # Without a GPU, Accelerate takes each process for the only one; this tells it of the others.
    import deepspeed
    from accelerate.utils import DeepSpeedPlugin
    deepspeed.init_distributed("gloo")
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1))
    both = {"num_processes": torch.distributed.get_world_size(), "process_index": torch.distributed.get_rank()}
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state.update(both)
else:
    accelerator = Accelerator(cpu=True)
if kind == "fsdp2":
    # Accelerate offers FSDP on accelerators alone; this puts its own FSDP2 code on gloo.
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["FlipEncoderLayer"],
        cpu_ram_efficient_loading=False, reshard_after_forward=True,
    )
smaller = "SMALLER" in os.environ
model = make_model(bias=BIASES[sys.argv[6]], positions="learned" if smaller else "sincos2d")
model = model.float() if kind == "zero2" else model
set_parts(model, sys.argv[7:])
options = OptimizationArguments(base_lr=1.0, optimizer=sys.argv[5])
def optimizer(module):
    made = make_optimizer(module, options)
    for group in made.param_groups:
        group["lr"] = 0.01
    return made
compiler = "aot_eager" if kind == "compiled" else None  # the same graphs as of the default, without its minutes
distribution = Distribution(accelerator, PairEncoder(model), optimizer, max_norm, compiler)
size = PAIRS // accelerator.num_processes // pieces
first = accelerator.process_index * size * pieces
dtype = next(model.parameters()).dtype
whole = make_smaller_batch() if smaller else make_batch()
batches = [take(whole, slice(first + i * size, first + (i + 1) * size)) for i in range(pieces)]
for batch in batches:
    images = "patches" if smaller else "pixel_values"
    batch[images] = batch[images].to(dtype)
norms = []
for step in range(2):
    result = train_step(distribution, batches, with_grid, learning_rate=0.01, reconstruction_weight=1.0)
    norms.append(result.grad_norm)
    if step == 0:
        losses = accelerator.reduce(result.batch.loss, "mean")
encoder = distribution.whole_encoder()
if accelerator.is_main_process:  # one process alone: nothing here may wait for the others
    with torch.no_grad():
        images = {n: v for n, v in with_grid(batches[0]).items() if n in (["pixel_values"], IMAGE_INPUTS)[smaller]}
        features = encoder.eval().get_image_features(**images).pooler_output
    assert torch.isfinite(features).all()
if compiler:
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # with and without gradients
distribution.reset_moments()
states = distribution.optimizer.state.values()
moments = [v for state in states for name, v in state.items() if name.startswith(("exp", "momentum"))]
assert moments and all(float(moment.abs().sum()) == 0 for moment in moments)
weights = distribution.state_dict()
if accelerator.is_main_process:
    torch.save({"loss": losses, "norms": torch.tensor(norms, dtype=torch.float64), **weights}, out)
distribution.end()
threads = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
if kind == "ddp":  # gloo's threads would abort the process now and then
    assert not any("gloo_runloop" in name for name in threads), threads
"""


def set_parts(model: FlipModel, parts: Sequence[str]) -> None:
    """Freezes what `--freeze` would name, and adds adapters, the same in every process, and speed-ups."""
    speed_up(model, [part.removeprefix(SPEED_UP) for part in parts if part.startswith(SPEED_UP)])
    parts = [part for part in parts if not part.startswith(SPEED_UP)]
    ranks = read_ranks([part.removeprefix(LORA) for part in parts if part.startswith(LORA)])
    frozen = read_frozen([part for part in parts if not part.startswith(LORA)])
    freeze(model, {**frozen, **dict.fromkeys(ranks)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        add_adapters(model, ranks)


def one_process(
    max_norm: float | None = None,
    optimizer_name: Literal["adamw", "muon"] = "adamw",
    loss: str = "softmax",
    parts: Sequence[str] = (),
    smaller: bool = False,
) -> dict[str, torch.Tensor]:
    """Two plain steps on the whole batch."""
    model = make_model(bias=BIASES[loss], positions="learned" if smaller else "sincos2d")
    set_parts(model, parts)
    optimizer = make_optimizer(model, OptimizationArguments(optimizer=optimizer_name))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    losses = []
    norms = []
    for _ in range(2):
        losses.append(backward(model, [make_smaller_batch() if smaller else make_batch()])[0])
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf")))
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": torch.tensor(losses[0], dtype=torch.float64), "norms": torch.stack(norms), **model.state_dict()}
