"""The plan of a run on GPUs that are not at hand: memory and what fits (time and traffic: cost.py).

Memory is traced on the real step (memory.py). The rest is assumed, and printed with the plan.

Letters: W processes (GPUs), b pairs per micro-batch, n per process, N per step.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from flip_hf.console.fields import require
from flip_hf.losses import TILE_SIZE
from flip_hf.modeling import FlipConfig
from flip_hf.planning.memory import TRACED_SPEED_UPS, TracedStep, model_bytes, trace_loss, trace_step
from flip_hf.training.accelerators import DeviceSheet
from flip_hf.training.arguments import Arguments
from flip_hf.training.models import make_config
from flip_hf.training.speed_ups import SpeedUp
from flip_hf.training.stage_checks import check_stages_fit

STRATEGIES = ("DDP", "FSDP2", "ZeRO-2")
PARTS = ("weights", "gradients", "optimizer", "buffers", "inputs", "loss", "activations", "other")
# DeepSpeed's default `reduce_bucket_size`, in elements.
ZERO_BUCKET = 500_000_000
# Context, kernels and libraries of a CUDA process with NCCL, and the caching allocator's loss to fragmentation.
CONTEXT_BYTES = 1.5e9
FRAGMENTS = 0.05
# Two points of a straight line, large enough that activations, not gradients, make the peak.
TRACED_PAIRS = (128, 256)


@dataclass(frozen=True)
class Cluster:
    """The hardware, and the assumptions about it.

    Attributes:
        gpu: kind of GPU.
        gpus: total number of GPUs.
        mfu: fraction of the GPU's peak at which operations are executed, by mask ratio; the nearest ratio counts.
        samples_per_core: pairs that one CPU core reads, decodes and augments per second.
        sample_bytes: bytes of an image with its caption in storage.
        dollars: price of a GPU-hour.
    """

    gpu: DeviceSheet
    gpus: int
    mfu: dict[float, float]
    samples_per_core: float
    sample_bytes: float
    dollars: float

    def mfu_at(self, mask_ratio: float) -> float:
        return self.mfu[min(self.mfu, key=lambda ratio: abs(ratio - mask_ratio))]


@dataclass(frozen=True)
class PlannedRun:
    """The training to plan: model, N pairs per step, precision and text length.

    Attributes:
        micro_batch_size: b, where the recipe sets it.
        attention: the attention implementation.
        speed_ups: those of the run.
    """

    config: FlipConfig
    batch_size: int
    micro_batch_size: int | None
    text_tokens: int
    bf16: bool
    attention: str = "sdpa"
    speed_ups: tuple[SpeedUp, ...] = ()

    @property
    def records_graphs(self) -> bool:
        """Whether steps are recorded and replayed, with inputs copied to where the recorded step reads them."""
        return "cuda_graphs" in self.speed_ups


def make_run(arguments: Arguments, text_tokens: int | None) -> PlannedRun:
    """Makes the run to plan of the arguments of a run.

    Args:
        arguments: the run's arguments.
        text_tokens: length that texts are padded to; the model's context if None.

    Raises:
        OptionError: the run reconstructs, or texts are longer than the context.
        ValueError: the model or the stages do not fit.
    """
    require(
        not arguments.objective.reconstructs, "A plan supports only the contrastive objective: leave --objective out."
    )
    config = make_config(arguments.model, arguments.objective)
    check_stages_fit(arguments, config)
    options = arguments.optimization
    text: Any = config.get_text_config()
    learned = arguments.data.tokenizer is None and arguments.model.model_name_or_path is None
    if learned and "vocab_size" not in arguments.model.tower_configs()["text_config"]:
        text.vocab_size = arguments.data.tokenizer_vocab_size
    tokens = text_tokens or text.max_position_embeddings
    context = text.max_position_embeddings
    require(1 <= tokens <= context, f"--text_tokens must be in [1, {context}], the model's context; got {tokens}.")
    bf16 = options.precision != "fp32"
    attention = arguments.model.attn_implementation
    attention = attention if attention == "eager" else "sdpa"  # all fused kernels keep as much
    speed_ups = tuple(options.speed_ups or ())
    return PlannedRun(config, options.batch_size, options.micro_batch_size, tokens, bf16, attention, speed_ups)


@dataclass(frozen=True)
class Activations:
    """Peak memory of a micro-batch, `fixed + per_pair * b` bytes, and the gradients allocated by then."""

    fixed: float
    per_pair: float
    gradients: int
    inputs_per_pair: float


class MemoryModel:
    """Predicts the bytes on one GPU for any micro-batch, number of processes and strategy, from a few traced steps."""

    def __init__(self, run: PlannedRun):
        self.run = run
        self.model = model_bytes(run.config)
        self._traces: dict[TracedStep, Activations] = {}

    def _trace(self, step: TracedStep) -> Counter[str]:
        return trace_step(self.run.config, step, self.run.attention)

    def activations(self, mask_ratio: float, checkpointing: bool) -> Activations:
        """Traces the activations, once for each setting."""
        run = self.run
        step = TracedStep(
            TRACED_PAIRS[1],
            mask_ratio=mask_ratio,
            text_tokens=run.text_tokens,
            bf16=run.bf16,
            checkpointing=checkpointing,
            speed_ups=tuple(name for name in TRACED_SPEED_UPS if name in run.speed_ups),
        )
        if step not in self._traces:
            few, many = TRACED_PAIRS
            traced = self._trace(step)
            peak = traced["activations"]
            known = [a.fixed for s, a in self._traces.items() if s.checkpointing == checkpointing]
            if known:  # copies of weights do not depend on the mask
                fixed = known[0]
            else:
                low = self._trace(replace(step, micro_batch_size=few))["activations"]
                fixed = max(0.0, peak - (peak - low) * many / (many - few))
            inputs = traced["inputs"] / many
            self._traces[step] = Activations(fixed, (peak - fixed) / many, traced["gradients"], inputs)
        return self._traces[step]

    def loss(self, local: int, total: int) -> float:
        """Returns the loss's bytes: local rows, tiles of similarities, all processes' texts and their gradients."""
        width = self.run.config.projection_dim
        sigmoid = self.run.config.logit_bias_init_value is not None
        few = 3 * TILE_SIZE
        many = 4 * TILE_SIZE
        if local <= many:
            alone = trace_loss(local, width, sigmoid)
        else:  # linear once tiles are whole
            slope = (trace_loss(many, width, sigmoid) - trace_loss(few, width, sigmoid)) / (many - few)
            alone = trace_loss(many, width, sigmoid) + slope * (local - many)
        side = min(TILE_SIZE, local)
        wider_tiles = 2 * 4 * side * (min(TILE_SIZE, total) - side)
        return alone + wider_tiles + (total - local) * width * 2 * 4

    def parts(
        self, strategy: str, gpus: int, micro: int, mask_ratio: float, checkpointing: bool, other: bool = True
    ) -> dict[str, float]:
        """Returns the peak bytes on one GPU, by `PARTS`.

        Args:
            strategy: one of `STRATEGIES`.
            gpus: W.
            micro: b.
            mask_ratio, checkpointing: settings of the step.
            other: include memory outside of tensors.
        """
        model = self.model
        local = self.run.batch_size // gpus
        traced = self.activations(mask_ratio, checkpointing)
        cached = local > micro
        fixed = traced.fixed
        moving = traced.per_pair * micro
        # Between micro-batches all gradients exist; in a single one they grow as activations are freed.
        gradients = model.gradients if cached else max(traced.gradients, model.gradients - moving - fixed)
        parts = {
            "weights": float(model.weights),
            "gradients": float(gradients),
            "optimizer": float(model.optimizer),
            "buffers": 0.0,
            **_sharded(strategy, model.weights, model.trainable, model.largest_block, gpus, cached),
            "inputs": (1 + self.run.records_graphs) * traced.inputs_per_pair * micro,
            "loss": self._loss_beside(local, cached, fixed + moving),
            "activations": fixed + moving,
        }
        return {**parts, "other": other * (CONTEXT_BYTES + FRAGMENTS * parts["activations"])}

    def _loss_beside(self, local: int, cached: bool, activations: float) -> float:
        """Returns what the loss of this many pairs of a process adds to the bytes of activations."""
        loss = self.loss(local, self.run.batch_size)
        if not cached:
            return loss
        # Gradient caching computes it between the passes, without activations, and keeps both embeddings three times:
        # in pieces, concatenated, and as gradients.
        return local * self.run.config.projection_dim * 2 * 3 * 4 + max(0.0, loss - activations)


def _sharded(strategy: str, weights: int, trainable: int, block: int, gpus: int, cached: bool) -> dict[str, float]:
    """Returns the parts of one GPU's memory that a strategy changes: weights, gradients, optimizer, buffers.

    All are float32, since the towers run under autocast with every wrapper.
    """
    if gpus == 1:
        return {}
    if strategy == "DDP":  # every gradient is copied into buckets
        return {"buffers": float(trainable)}
    if strategy == "FSDP2":  # two whole blocks, the current and the prefetched one, with gradients
        parts = {"weights": weights / gpus, "optimizer": 2 * trainable / gpus, "buffers": 4.0 * block}
        # Without synchronisation between micro-batches, gradients stay whole.
        return {**parts, "gradients": float(trainable) if cached else trainable / gpus}
    # ZeRO (Rajbhandari et al. 2020): whole weights; gradients, a second copy of the weights and moments sharded.
    return {
        "gradients": trainable / gpus,
        "optimizer": 3 * trainable / gpus,
        "buffers": float(min(trainable, 4 * ZERO_BUCKET)),
    }


@dataclass(frozen=True)
class Choice:
    """One way to run the step, its bytes on one GPU, and whether they fit."""

    strategy: str
    checkpointing: bool
    micro: int
    parts: dict[str, float]
    fits: bool

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def micro_batch_sizes(run: PlannedRun, gpus: int) -> list[int]:
    """Lists micro-batch sizes to try, largest first: the recipe's, else the process's batch, halved repeatedly.

    Raises:
        ValueError: the batch cannot be divided over the GPUs; the message names a size that can.
    """
    micro = run.micro_batch_size or 1
    if run.batch_size % (gpus * micro) != 0:
        nearest = max(1, round(run.batch_size / (gpus * micro))) * gpus * micro
        raise ValueError(
            f"--batch_size {run.batch_size} cannot be divided over {gpus} GPUs in micro-batches of {micro}; use "
            f"{nearest}."
        )
    if run.micro_batch_size:
        return [run.micro_batch_size]
    if run.records_graphs:
        return [run.batch_size // gpus]
    sizes = [run.batch_size // gpus]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


def choices(memory: MemoryModel, cluster: Cluster, mask_ratio: float) -> Iterator[Choice]:
    """Yields the largest micro-batch that fits, for each strategy with and without activation checkpointing."""
    strategies = STRATEGIES if cluster.gpus > 1 else STRATEGIES[:1]
    for checkpointing in (False, True):
        for strategy in strategies:
            tried = []
            for micro in micro_batch_sizes(memory.run, cluster.gpus):
                parts = memory.parts(strategy, cluster.gpus, micro, mask_ratio, checkpointing)
                fits = sum(parts.values()) <= cluster.gpu.memory
                tried.append(Choice(strategy, checkpointing, micro, parts, fits))
                if fits:
                    break
            yield tried[-1]
