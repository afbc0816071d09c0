"""The differences between Accelerate's kinds of distribution: accumulation, gradient norms, whole weights.

Accelerate launches and wraps; this file only evens out what its interface leaves to the caller, so that the loop reads
the same on one CPU, under DistributedDataParallel, FSDP2 and DeepSpeed ZeRO-1 and 2.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from flip_hf.training.encoder import PairEncoder
from flip_hf.training.muon import MuonWithAdamW, skip_where

MAX_GRAPHS = 64


class Distribution:
    """The prepared model and optimizer of a run, whatever wraps them.

    Args:
        accelerator: the process layer.
        encoder: the model, on any device.
        make_optimizer: makes the optimizer of a module.
        max_grad_norm: norm that gradients are clipped to; None does not clip.
        compiler: torch.compile's backend for the encoder; None does not compile.
        cuda_graphs: record what is compiled as CUDA graphs, and replay them.

    Raises:
        ValueError: Accelerate is configured in a way that the contrastive loss or the compiler does not allow.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        encoder: PairEncoder,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        max_grad_norm: float | None,
        compiler: str | None = None,
        cuda_graphs: bool = False,
    ):
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.max_grad_norm = max_grad_norm
        self.cuda_graphs = cuda_graphs
        self.is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self._check()
        if compiler is not None:
            self._compile(encoder, compiler)
        if self.is_deepspeed:
            self._configure_deepspeed()
        optimizer = make_optimizer(encoder)
        if self.is_deepspeed and isinstance(optimizer, MuonWithAdamW):
            raise ValueError(
                "--optimizer muon needs whole matrices, and DeepSpeed flattens them. Leave it out, or launch with "
                "--use_fsdp --fsdp_version 2 or --multi_gpu."
            )
        self.model, self.optimizer = accelerator.prepare(encoder, optimizer)
        if self.is_deepspeed:
            # Skips the step, on all processes, where a gradient is not finite; off by default in float32.
            self.model.optimizer.check_grad_overflow = True

    def _check(self) -> None:
        if self.accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "Accelerate is configured with gradient_accumulation_steps, which would contrast each piece of a batch "
                "with itself alone. Set it to 1 and give --micro_batch_size, which is exact."
            )
        if self.accelerator.distributed_type == DistributedType.FSDP and not self.accelerator.is_fsdp2:
            raise ValueError(
                "FSDP version 1 is not supported; set fsdp_version: 2 in Accelerate's configuration, or launch with "
                "--fsdp_version 2."
            )
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed else None
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed ZeRO-3 is not supported; set zero_stage: 2 in Accelerate's configuration, or launch with "
                "--zero_stage 2, or with --use_fsdp --fsdp_version 2."
            )

    def _compile(self, encoder: PairEncoder, compiler: str) -> None:
        """Compiles in place, so that weights keep their names, and before wrapping, so that DDP can overlap."""
        if self.is_deepspeed or self.accelerator.is_fsdp2:
            raise ValueError("--compile works with one process or DistributedDataParallel; leave it out here.")
        # One graph for each number of patches and rows of texts, with and without gradients.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
        # Else a model with other hooks (bf16_residual) would run the graph of one that was compiled before it.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        mode = "reduce-overhead" if self.cuda_graphs else None
        encoder.compile(fullgraph=True, dynamic=False, backend=compiler, mode=mode)

    def _configure_deepspeed(self) -> None:
        plugin: Any = self.accelerator.state.deepspeed_plugin
        # Pieces of a batch are added up, not averaged, and the loop says when a step is due.
        plugin.deepspeed_config["gradient_accumulation_steps"] = 1
        # Nominal values, since the loader makes the batches; but DeepSpeed checks that they agree.
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        plugin.deepspeed_config["train_batch_size"] = self.accelerator.num_processes
        plugin.deepspeed_config["gradient_clipping"] = self.max_grad_norm or 0.0

    # -- a step --------------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Lets replayed graphs reuse the memory of the last step, whose outputs and gradients are gone."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which gradients add up on each process and are not averaged over processes."""
        state = self.accelerator.gradient_state
        state._set_sync_gradients(False)  # tells DeepSpeed that no step is due
        try:
            with self.accelerator.no_sync(self.model):
                yield
        finally:
            state._set_sync_gradients(True)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradients of a scalar."""
        self.accelerator.backward(loss)

    def clip_and_norm(self) -> torch.Tensor:
        """Clips the gradients if configured, and returns their norm before that, over all parameters and processes.

        The norm () is on the device, and not finite where a loss or gradient of any process was not.
        """
        if self.is_deepspeed:  # has clipped, and stepped or skipped, within the last backward
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 0.0)
            known = float("nan") if self.accelerator.optimizer_step_was_skipped or norm is None else float(norm)
            return torch.tensor(known, device=self.device)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if self.max_grad_norm is not None:
            norm: Any = self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)
        else:
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        return _whole(norm)

    def step(self, skipped: torch.Tensor) -> None:
        """Takes the optimizer's step; where `skipped` () is 1, parameters, moments and counts stay as they are."""
        if not self.is_deepspeed:
            skip_where(skipped, self.optimizer.optimizer)
        self.optimizer.step()

    def reset_moments(self) -> None:
        """Zeroes the optimizer's moments; in place, since shards may refer to them."""
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()

    def end(self) -> None:
        """Leaves the process group and ends the trackers; model and optimizer are gone afterwards.

        The wrapper goes first: while it holds the process group, gloo's threads outlive the interpreter's shutdown,
        where freeing a tensor aborts the process, and the launcher would report a finished run as failed.
        """
        del self.model, self.optimizer
        self.accelerator.free_memory()
        self.accelerator.end_training()

    # -- whole weights -------------------------------------------------------------------------------------------------

    def whole_encoder(self) -> PairEncoder:
        """Returns the encoder with all its weights on each process, for passes that processes do not run together.

        Sharded weights are gathered into a copy; every process must call it.
        """
        encoder = self.accelerator.unwrap_model(self.model)
        if not self.accelerator.is_fsdp2:
            return encoder
        model = type(encoder.model)._from_config(copy.deepcopy(encoder.model.config)).to(self.accelerator.device)
        for name, value in model.state_dict().items():
            value.copy_(_whole(encoder.model.state_dict()[name]))
        return PairEncoder(model, encoder.autocast_dtype)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the whole model's weights on the CPU of the main process, for saving; every process must call it."""
        sharded = self.accelerator.unwrap_model(self.model).model.state_dict()
        weights = {}
        for name, value in sharded.items():
            whole = _whole(value)
            if self.accelerator.is_main_process:
                weights[name] = whole.cpu()
        return weights


def _whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
