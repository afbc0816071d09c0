"""The plan of a run as its recipe has it: one way to run the step for all of its phases, and their sum."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flip_hf.console.json_types import JsonObject
from flip_hf.modeling.masking_flip import num_kept
from flip_hf.planning.cost import Schedule, schedule
from flip_hf.planning.plan import Choice, Cluster, MemoryModel, PlannedRun, choices
from flip_hf.training.masks import kept_tokens
from flip_hf.training.phases import Phase


@dataclass(frozen=True)
class Part:
    """Samples of a run that all cost the same: a phase, or the part of it with one mask ratio.

    Attributes:
        name: name of the phase.
        samples: number of samples.
        mask_ratio: fraction of the patches dropped.
        memory: the run with this part's images and texts.
        cluster: the hardware, with the rate of steps of about as many patches.
    """

    name: str
    samples: float
    mask_ratio: float
    memory: MemoryModel
    cluster: Cluster


def plan_run(phases: Sequence[Phase], memory: MemoryModel, cluster: Cluster) -> JsonObject:
    """Plans all phases of a run with the same strategy, checkpointing and micro-batch.

    Args:
        phases: the run's phases.
        memory: the run with images of the model's own size; its traces are used where they fit.
        cluster: the hardware.

    Returns:
        The way that executes the fewest FLOPs of those that fit in every phase, as `chosen`, None where nothing fits;
        `phases`, a row each, and their sums `samples`, `flops`, `days` and `dollars`.

    Raises:
        ValueError: the batch cannot be divided, a mask keeps no patch, or the GPU lacks bfloat16.
    """
    parts = list_parts(phases, memory, cluster)
    ways = zip(*(choices(part.memory, cluster, part.mask_ratio) for part in parts), strict=True)
    fitting = [_common(way) for way in ways if all(choice.fits for choice in way)]
    if not fitting:
        return {"chosen": None}
    plans = [(choice, [_schedule(part, choice) for part in parts]) for choice in fitting]
    choice, schedules = min(plans, key=lambda plan: _executed(parts, plan[1]))
    rows = [_row(part, planned) for part, planned in zip(parts, schedules, strict=True)]
    sums = {name: sum(row[name] for row in rows) for name in ("samples", "flops", "days", "dollars")}
    chosen = {"strategy": choice.strategy, "checkpointing": choice.checkpointing, "micro_batch_size": choice.micro}
    return {"chosen": chosen, "phases": rows, **sums}


def list_parts(phases: Sequence[Phase], memory: MemoryModel, cluster: Cluster) -> list[Part]:
    """Lists the parts of a run; those with equal images and texts share their traces."""
    run = memory.run
    context = run.config.text_config.max_position_embeddings
    memories = {(run.config.vision_config.image_size, run.text_tokens): memory}
    parts = []
    for phase in phases:
        size = phase.image_size or run.config.vision_config.image_size
        tokens = min(run.text_tokens, phase.text_length or context)
        if phase.text_mask_ratio > 0:
            tokens = min(tokens, kept_tokens(phase.text_length or context, phase.text_mask_ratio))
        if (size, tokens) not in memories:
            memories[size, tokens] = MemoryModel(_resized(run, size, tokens))
        for ratio in phase.mask_ratios:
            samples = (phase.end - phase.start) / len(phase.mask_ratios)
            found = memories[size, tokens]
            parts.append(Part(phase.name, samples, ratio, found, _at_rate(cluster, run, found.run, ratio)))
    return parts


def _resized(run: PlannedRun, image_size: int, text_tokens: int) -> PlannedRun:
    config = copy.deepcopy(run.config)
    config.vision_config.image_size = image_size
    return replace(run, config=config, text_tokens=text_tokens)


def _at_rate(cluster: Cluster, whole: PlannedRun, run: PlannedRun, mask_ratio: float) -> Cluster:
    """Returns the cluster with the rate at the mask that leaves as many patches of the model's own images."""
    kept = num_kept(run.config.vision_config.num_patches, mask_ratio)
    return replace(cluster, mfu={0.0: cluster.mfu_at(1 - kept / whole.config.vision_config.num_patches)})


def _common(way: Sequence[Choice]) -> Choice:
    """Returns the choice that fits in all parts: with the smallest micro-batch of theirs."""
    return min(way, key=lambda choice: choice.micro)


def _schedule(part: Part, choice: Choice) -> Schedule:
    return schedule(part.memory, part.cluster, choice, part.mask_ratio)


def _executed(parts: Sequence[Part], schedules: Sequence[Schedule]) -> float:
    return sum(part.samples * planned.executed for part, planned in zip(parts, schedules, strict=True))


def _row(part: Part, planned: Schedule) -> JsonObject:
    days = planned.days(part.samples)
    return {
        **{"phase": part.name, "samples": part.samples, "mask_ratio": part.mask_ratio},
        "image_size": part.memory.run.config.vision_config.image_size,
        "text_tokens": part.memory.run.text_tokens,
        "flops_per_sample": planned.flops.training,
        "flops": planned.flops.training * part.samples,
        "samples_per_second": planned.samples_per_second,
        "loader_cores": planned.loader_cores,
        "days": days,
        "dollars": days * 24 * part.cluster.gpus * part.cluster.dollars,
    }
