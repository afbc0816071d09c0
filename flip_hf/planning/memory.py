"""Memory of a training step, traced on fake tensors.

The real model, loss and backward pass run under `FakeTensorMode`: shapes, dtypes and lifetimes are those of a real
step, and nothing is computed or allocated, so the figures follow the code. The CPU's attention kernel stands in for the
GPU's fused ones; neither keeps an S x S matrix.

Letters: n pairs on this process, N over all processes, E length of an embedding.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flip_hf.losses import contrastive_loss, sigmoid_loss
from flip_hf.modeling import FlipConfig, FlipModel
from flip_hf.modeling.masking_flip import num_kept
from flip_hf.training.encoder import PairEncoder, recompute_activations
from flip_hf.training.speed_ups import SpeedUp, speed_up
from flip_hf.training.step import OneProcess, accumulate_gradients

# Those whose memory follows from what an eager step computes: a trace runs nothing in float8, and records no graphs.
TRACED_SPEED_UPS: tuple[SpeedUp, ...] = ("fused_qkv", "bf16_residual")


class StorageMeter(TorchDispatchMode):
    """Meters the bytes of live storages by kind, now and at the peak.

    Memory that a kernel allocates and frees before it returns is not seen.
    """

    def __init__(self):
        super().__init__()
        self.kind = "other"  # of storages created from now on
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor)
        return result

    def _meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._storages:
            return

        def forget(_: weakref.ref) -> None:
            _, kind, size = self._storages.pop(key)
            self.live[kind] -= size

        self._storages[key] = (weakref.ref(storage, forget), self.kind, size)
        self.live[self.kind] += size
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def rename(self, tensor: torch.Tensor, kind: str) -> None:
        """Counts a live tensor's storage as another kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            reference, old, size = self._storages[key]
            self._storages[key] = (reference, kind, size)
            self.live[old] -= size
            self.live[kind] += size


@dataclass(frozen=True)
class TracedStep:
    """The work of one process between two updates.

    Attributes:
        micro_batch_size: pairs encoded at once.
        num_micro: number of micro-batches.
        mask_ratio: fraction of the patches dropped.
        text_tokens: length that the texts are padded to.
        bf16: run the towers under bfloat16 autocast.
        checkpointing: recompute blocks in backward.
        speed_ups: those of [`TRACED_SPEED_UPS`] that the model computes with.
    """

    micro_batch_size: int
    num_micro: int = 1
    mask_ratio: float = 0.5
    text_tokens: int = 32
    bf16: bool = True
    checkpointing: bool = False
    speed_ups: tuple[SpeedUp, ...] = ()


def make_trained_model(config: FlipConfig, step: TracedStep, attention: str) -> FlipModel:
    """Makes a new model as the step trains it."""
    model = FlipModel._from_config(config, attn_implementation=attention)
    if step.checkpointing:
        recompute_activations(model)
    speed_up(model, step.speed_ups)
    return model.train()


def make_micro_batch(config: FlipConfig, step: TracedStep) -> dict[str, Any]:
    """Makes a micro-batch as the engine prepares it: float patches, their indices, token ids; values are arbitrary."""
    vision = config.vision_config
    size = step.micro_batch_size
    kept = num_kept(vision.num_patches, step.mask_ratio)
    batch: dict[str, Any] = {
        "patches": torch.zeros(size, kept, vision.num_channels * vision.patch_size**2),
        "input_ids": torch.ones(size, step.text_tokens, dtype=torch.long),
        "attention_mask": torch.ones(size, step.text_tokens, dtype=torch.long),
    }
    if kept < vision.num_patches:
        batch["ids_keep"] = torch.arange(kept).expand(size, -1).contiguous()
    return batch


def run_backward(model: FlipModel, step: TracedStep, make_batch: Callable[[], dict[str, Any]]) -> None:
    """Runs forward, loss and backward of all micro-batches like the engine, preparing each when it is encoded."""
    encoder = PairEncoder(model, torch.bfloat16 if step.bf16 else None)
    loaded = [{"input_ids": torch.empty(0)}] * step.num_micro
    accumulate_gradients(OneProcess(encoder, model.device), loaded, prepare=lambda _: make_batch())


def trace_step(config: FlipConfig, step: TracedStep, attention: str = "sdpa") -> Counter[str]:
    """Traces the peak bytes of forward and backward: weights, gradients, inputs, activations.

    The optimizer's states, which do not change meanwhile, are not included. Autocast's copies of the weights, and the
    loss of the micro-batch, count as activations.
    """
    with FakeTensorMode(), StorageMeter() as meter:
        meter.kind = "weights"
        model = make_trained_model(config, step, attention)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: meter.rename(p.grad, "gradients"))

        def make_batch() -> dict[str, Any]:
            meter.kind = "inputs"
            batch = make_micro_batch(config, step)
            meter.kind = "activations"
            return batch

        meter.peak = Counter(meter.live)
        run_backward(model, step, make_batch)
    return meter.peak


@lru_cache
def trace_loss(pairs: int, width: int, sigmoid: bool = False) -> int:
    """Traces the bytes that loss and backward add to the embeddings of this many pairs, with their gradients.

    Args:
        pairs: number of pairs.
        width: length of an embedding.
        sigmoid: trace the loss of a model with a bias, else the softmax loss.
    """
    with FakeTensorMode(), StorageMeter() as meter:
        embeds = [torch.zeros(pairs, width, requires_grad=True) for _ in range(2)]
        before = meter.live.total()
        of_logits = [torch.ones(1, requires_grad=True) for _ in range(1 + sigmoid)]
        compute_loss = sigmoid_loss if sigmoid else contrastive_loss
        loss, _ = compute_loss(*embeds, *of_logits)
        loss.backward()
    return meter.peak.total() - before


@dataclass(frozen=True)
class ModelBytes:
    """Static bytes: parameters and buffers, and what training keeps for each parameter."""

    weights: int
    trainable: int
    largest_block: int

    @property
    def gradients(self) -> int:
        """Bytes of the gradients, float32, one per parameter."""
        return self.trainable

    @property
    def optimizer(self) -> int:
        """Bytes of AdamW's two moments, float32; Muon keeps one of its matrices, so less."""
        return 2 * self.trainable


def model_bytes(config: FlipConfig) -> ModelBytes:
    """Counts the bytes of the float32 model."""
    with torch.device("meta"):
        model = FlipModel._from_config(config)
    parameters = list(model.parameters())
    names = model._no_split_modules or ()
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    return ModelBytes(
        weights=sum(t.nbytes for t in (*parameters, *model.buffers())),
        trainable=sum(p.nbytes for p in parameters if p.requires_grad),
        largest_block=max(sum(p.nbytes for p in block.parameters()) for block in blocks),
    )
