"""The paper plan: its memory against what the allocator gave, its arithmetic, its command line."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flip_hf.planning.cost import network_bytes, schedule
from flip_hf.planning.memory import TracedStep, trace_loss
from flip_hf.planning.memory_check import _two_steps, planned_bytes
from flip_hf.planning.plan import Choice, Cluster, MemoryModel, PlannedRun, choices
from flip_hf.training.accelerators import named_accelerator
from tests.helpers.models import tiny_config
from tests.helpers.programs import ROOT, run_program

PLAN = ROOT / "scripts" / "plan.py"
WIDE = {"hidden_size": 64, "intermediate_size": 256}
CONFIG = tiny_config(WIDE, {**WIDE, "image_size": 64})
RUN = PlannedRun(CONFIG, 1024, None, 16, True)
CLUSTER = Cluster(named_accelerator("A100-80GB"), 4, {0.0: 0.5}, 100.0, 20e3, 2.0)


def allocated(step: TracedStep) -> int:
    """Most bytes that the CPU's allocator had given out during two real steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _two_steps(CONFIG, step, torch.device("cpu"))
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "step",
    [
        TracedStep(128, mask_ratio=0.0, text_tokens=16, bf16=False),
        TracedStep(64, num_micro=3, mask_ratio=0.5, text_tokens=16, bf16=False),
        TracedStep(256, num_micro=2, mask_ratio=0.75, text_tokens=16, bf16=True, checkpointing=True),
        TracedStep(64, mask_ratio=0.5, text_tokens=16, speed_ups=("fused_qkv", "bf16_residual")),
    ],
    ids=["whole", "cached", "cached bf16 checkpointed", "with speed-ups"],
)
def test_planned_memory_equals_the_allocators(step):
    assert planned_bytes(CONFIG, step) == pytest.approx(allocated(step), rel=0.1)


def test_sharding_and_checkpointing_save_the_expected_memory():
    memory = MemoryModel(RUN)
    alone = memory.parts("DDP", 1, 256, 0.5, False)
    data_parallel = memory.parts("DDP", 4, 256, 0.5, False)
    sharded, zero = (memory.parts(strategy, 4, 256, 0.5, False) for strategy in ("FSDP2", "ZeRO-2"))
    assert alone["buffers"] == 0 and data_parallel["buffers"] == memory.model.trainable
    assert sharded["optimizer"] == data_parallel["optimizer"] / 4 and sharded["weights"] == memory.model.weights / 4
    assert zero["weights"] == memory.model.weights and zero["optimizer"] == 3 * memory.model.trainable / 4
    whole = memory.parts("DDP", 4, 256, 0.0, False)
    assert data_parallel["activations"] < 0.7 * whole["activations"]
    # Of two blocks, one is whole at a time, and the inputs of both stay.
    assert memory.parts("DDP", 4, 256, 0.0, True)["activations"] < 0.6 * whole["activations"]


def test_speed_ups_change_the_memory_that_follows_from_what_they_compute():
    def parts(*names):
        return MemoryModel(replace(RUN, speed_ups=names)).parts("DDP", 1, 1024, 0.5, False)

    plain = parts()
    # Queries, keys and values read one rounded input instead of a copy each, which each keeps for backward.
    for name in ("fused_qkv", "bf16_residual"):
        assert 0.8 * plain["activations"] < parts(name)["activations"] < 0.95 * plain["activations"], name
    assert parts("fp8") == plain
    assert parts("cuda_graphs") == {**plain, "inputs": 2 * plain["inputs"]}


def test_the_largest_micro_batch_that_fits_is_chosen():
    memory = MemoryModel(replace(RUN, batch_size=4096))
    enough = sum(memory.parts("DDP", 4, 512, 0.5, False).values()) + 1
    small = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory=enough))
    chosen = {(c.strategy, c.checkpointing): c for c in choices(memory, small, 0.5)}
    assert chosen["DDP", False].micro == 512 and chosen["DDP", False].fits
    assert chosen["DDP", True].micro == 1024  # the whole of a process's batch
    nothing = replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory=1e6))
    assert not any(choice.fits for choice in choices(memory, nothing, 0.5))
    recorded = MemoryModel(replace(RUN, batch_size=4096, speed_ups=("cuda_graphs",)))
    assert {c.micro for c in choices(recorded, replace(small, gpus=1), 0.5)} == {4096}  # in pieces, it could not be
    with pytest.raises(ValueError, match="use 1023"):
        list(choices(MemoryModel(RUN), replace(CLUSTER, gpus=3), 0.5))


def test_time_network_and_loader_follow_from_the_assumptions():
    memory = MemoryModel(RUN)
    plain = Choice("DDP", False, 256, {}, True)
    cached = Choice("DDP", False, 64, {}, True)
    once, twice = (schedule(memory, CLUSTER, choice, 0.5) for choice in (plain, cached))
    assert once.mfu == pytest.approx(0.5) and twice.mfu == pytest.approx(0.5 * once.executed / twice.executed)
    assert once.samples_per_second == pytest.approx(4 * 312e12 * 0.5 / once.flops.training)
    assert once.seconds * once.samples_per_second == pytest.approx(1024)
    assert once.days(86_400 * once.samples_per_second) == pytest.approx(1)
    assert once.loader_cores == pytest.approx(once.samples_per_second / 100, abs=1)
    weights = memory.model.weights
    assert network_bytes(RUN, weights, CLUSTER, plain) == 0.75 * (2 * weights + 3 * 1024 * 24 * 2 * 4)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_losss_memory_is_that_of_the_code(sigmoid):
    config = copy.deepcopy(CONFIG)
    config.logit_bias_init_value = -10 if sigmoid else None
    memory = MemoryModel(replace(RUN, config=config))
    width = config.projection_dim
    assert memory.loss(4096, 4096) == trace_loss(4096, width, sigmoid) != trace_loss(4096, width, not sigmoid)
    assert memory.loss(16384, 16384) == pytest.approx(trace_loss(16384, width, sigmoid), rel=1e-3)
    assert memory.loss(1024, 4096) < memory.loss(4096, 4096)


# -- the command line ------------------------------------------------------------------------------------------------


def test_a_recipe_is_planned_from_the_command_line(tmp_path):
    stem = tmp_path / "plan"
    done = run_program(
        PLAN,
        *("shapes", "--gpu", "l4", "--gpus", "2", "--nodes", "2", "--mfu", "0.3", "--batch_size", "4096"),
        *("--precision", "bf16", "--output", str(stem), "--plot", str(tmp_path / "plan.png")),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(stem.with_suffix(".json").read_text())
    assert [mask["mask_ratio"] for mask in report["masks"]] == [0, 0.5, 0.75]
    assert "2 x 2 L4: 24 GB, 121 TFLOP/s dense bf16 each" in done.stdout and "2,500 TPU-v3-core-days" in done.stdout
    days = [mask["data_sets"]["LAION-400M"]["days"] for mask in report["masks"]]
    assert days == sorted(days, reverse=True) and "executed at 0.30 of the GPU's peak (given)" in done.stdout
    assert stem.with_suffix(".md").read_text() == done.stdout.rstrip("\n") + "\n"
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_mistakes_are_named_with_the_known_values():
    for argv, message in [
        (["shapes", "--gpu", "H300"], "no GPU 'H300' in the table"),
        (["vit_z"], "one of: cifar10, mae_b16, mae_l16, mae_shapes, scenes, scenes_s16, shapes, vit_b16, vit_h14"),
        (["shapes", "--mfu", "fast"], "--mfu 'fast' is neither a number nor a file"),
    ]:
        done = run_program(PLAN, *argv)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr[-800:]
