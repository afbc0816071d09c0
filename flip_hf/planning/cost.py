"""Time, data and network traffic of a planned step, from counted operations (flops.py) and an assumed MFU."""

import math
from dataclasses import dataclass

from flip_hf.planning.plan import Choice, Cluster, MemoryModel, PlannedRun
from flip_hf.training.flops import SampleFlops, sample_flops


@dataclass(frozen=True)
class Schedule:
    """Time and traffic of a step, over the whole cluster unless stated otherwise.

    Attributes:
        flops: FLOPs of one pair.
        executed: FLOPs executed per pair, recomputation included.
        seconds: time per step.
        samples_per_second: throughput over all GPUs.
        mfu: model FLOPs over peak; below the assumed rate where there is recomputation.
        loader_cores: CPU cores needed to keep up.
        storage_rate: bytes per second read from storage.
        network: bytes per step that each GPU receives.
    """

    flops: SampleFlops
    executed: int
    seconds: float
    samples_per_second: float
    mfu: float
    loader_cores: int
    storage_rate: float
    network: float

    def days(self, samples: float) -> float:
        return samples / self.samples_per_second / 86_400


def network_bytes(run: PlannedRun, weights: int, cluster: Cluster, choice: Choice) -> float:
    """Counts the bytes one GPU receives per step, by ring algorithms: gradients, sharded weights, embeddings."""
    share = (cluster.gpus - 1) / cluster.gpus
    local = run.batch_size // cluster.gpus
    num_micro = local // choice.micro
    if choice.strategy == "DDP":
        moved = 2 * weights  # reduce-scatter and all-gather, float32
    elif choice.strategy == "FSDP2":  # weights for every forward and backward; gradients once
        passes = 2 * num_micro + (num_micro if num_micro > 1 else 0)
        moved = (passes + 1) * weights
    else:  # gradients of every micro-batch, updated weights once
        moved = (num_micro + 1) * weights
    # Both embeddings, float32: gathered, and their gradients summed.
    features = 3 * run.batch_size * run.config.projection_dim * 2 * 4
    return share * (moved + features)


def schedule(memory: MemoryModel, cluster: Cluster, choice: Choice, mask_ratio: float) -> Schedule:
    """Computes time, traffic and loader cores of a choice.

    Raises:
        ValueError: the GPU has no bfloat16, which the run asks for.
    """
    run = memory.run
    peak = cluster.gpu.peak("bf16" if run.bf16 else "fp32")
    if peak is None:
        raise ValueError(f"{cluster.gpu.name} has no bfloat16; use --precision fp32.")
    flops = sample_flops(run.config, mask_ratio, run.text_tokens, run.batch_size)
    executed = flops.executed(run.batch_size // cluster.gpus > choice.micro, choice.checkpointing)
    rate = peak * cluster.gpus * cluster.mfu_at(mask_ratio) / executed
    return Schedule(
        flops=flops,
        executed=executed,
        seconds=run.batch_size / rate,
        samples_per_second=rate,
        mfu=rate * flops.training / (peak * cluster.gpus),
        loader_cores=math.ceil(rate / cluster.samples_per_core),
        storage_rate=rate * cluster.sample_bytes,
        network=network_bytes(run, memory.model.weights, cluster, choice) if cluster.gpus > 1 else 0.0,
    )
