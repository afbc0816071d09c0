"""Faster arithmetic and launches of a step (`--speed_ups`): each is off unless it is named, as none is measured yet.

- `fused_qkv`: queries, keys and values by one matrix product, whose weight is concatenated in each forward pass.
- `bf16_residual`: hidden states between the layers of a block in bfloat16; LayerNorms compute in float32.
- `cuda_graphs`: a compiled step is recorded and replayed, so that its kernels are launched at once.
- `fp8`: matrix products of the blocks in float8, by torchao; weights, gradients and moments stay as they are.

Names of parameters, checkpoints and saved models are the same with each of them. Evaluations of the run use the same
arithmetic as its steps.

Options are read without torch, as all of arguments.py.
"""

from collections.abc import Collection
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from flip_hf.console.fields import require

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flip_hf.training.arguments import Arguments

SpeedUp = Literal["fused_qkv", "bf16_residual", "cuda_graphs", "fp8"]

COMPILED = ("cuda_graphs", "fp8")  # those that only a compiled step has, or gains by
# The first generation with float8 matrix units, Ada Lovelace.
FP8_CAPABILITY = (8, 9)
# Float8 products need inputs and outputs in multiples of this.
_FP8_MULTIPLE = 16


# ---------------------------------------------------------------------------------------------------------------------
# Checks, before work starts
# ---------------------------------------------------------------------------------------------------------------------


def check_speed_ups(arguments: "Arguments") -> None:
    """Checks that the speed-ups fit the other options.

    Raises:
        OptionError: one needs what another option switches off, or torchao is not installed.
    """
    options = arguments.optimization
    names = options.speed_ups or ()
    for name in COMPILED:
        require(
            name not in names or options.compile,
            f"--speed_ups {name} needs a compiled step: add --compile True, or leave it out.",
        )
    for name in ("fused_qkv", "fp8"):
        require(
            name not in names or not arguments.model.lora,
            f"--speed_ups {name} would compute without the adapters of --lora. Leave one of them out.",
        )
    require(
        "bf16_residual" not in names or options.precision != "fp32",
        "--speed_ups bf16_residual rounds to bfloat16, and --precision is fp32. Leave one of them out.",
    )
    require(
        "fp8" not in names or find_spec("torchao") is not None,
        "--speed_ups fp8 needs torchao, which is not installed: pip install 'torchao>=0.18'.",
    )


def check_hardware(
    names: Collection[str],
    device: "torch.device",
    dtype: "torch.dtype | None",
    num_micro: int,
    num_processes: int = 1,
) -> None:
    """Checks that speed-ups can be had on a device.

    Args:
        names: the speed-ups.
        device: the device of this process.
        dtype: the dtype of matrix products; None for float32.
        num_micro: micro-batches of this process a step.
        num_processes: processes of the run.

    Raises:
        ValueError: one cannot be had.
    """
    import torch

    for name in COMPILED:
        if name in names and device.type != "cuda":
            raise ValueError(
                f"--speed_ups {name} needs a CUDA device, and this run is on: {device.type}. Leave it out."
            )
    for name in ("bf16_residual", "fp8"):
        if name in names and dtype is None:
            raise ValueError(f"--speed_ups {name} needs bfloat16, and this run is in float32: give --precision bf16.")
    if "fp8" in names and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ValueError(
            f"--speed_ups fp8 needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or higher, and "
            f"{torch.cuda.get_device_name(device)} has none of its float8 matrix units. Leave it out."
        )
    if "cuda_graphs" in names and num_processes > 1:
        # Their gradients lie in the graphs' memory while DistributedDataParallel averages them from within the backward
        # pass. torch has rules for recording that by hand, and none for what torch.compile records.
        raise ValueError(
            f"--speed_ups cuda_graphs supports a single process, and this run has {num_processes}: torch gives no "
            "rules for recorded steps whose gradients are averaged over processes. Leave it out."
        )
    if "cuda_graphs" in names and num_micro > 1:
        raise ValueError(
            f"--speed_ups cuda_graphs takes a batch in one piece, and --micro_batch_size makes {num_micro} of this "
            "process's: their gradients would be added up in memory that a replay overwrites. Leave one of them out."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Changes to a model
# ---------------------------------------------------------------------------------------------------------------------


def speed_up(model: "nn.Module", names: Collection[str]) -> None:
    """Lets a model compute with the speed-ups of these names, in place; those of its launches are in `Distribution`."""
    if "fused_qkv" in names:
        fuse_projections(model)
    if "bf16_residual" in names:
        round_residuals(model)
    if "fp8" in names:
        compute_in_float8(model)


def fuse_projections(model: "nn.Module") -> None:
    """Lets all attention of a model project by one product; the weights stay three parameters."""
    from flip_hf.modeling.blocks_flip import FlipAttention

    for module in model.modules():
        if isinstance(module, FlipAttention):
            module.fuses_projections = True


def round_residuals(model: "nn.Module") -> None:
    """Lets the blocks of a model pass hidden states on in autocast's dtype, by hooks; without autocast as before.

    Under autocast, linear layers give bfloat16. So a sum with a residual in bfloat16 is in bfloat16, and all sums of a
    tower are where its first block gets bfloat16. LayerNorms compute in float32, and what they give is rounded once
    for all layers that read it.
    """
    from flip_hf.modeling.blocks_flip import FlipEncoder, FlipEncoderLayer

    for module in model.modules():
        if isinstance(module, FlipEncoder):
            module.register_forward_pre_hook(_round_input)
        elif isinstance(module, FlipEncoderLayer):
            for layer_norm in (module.layer_norm1, module.layer_norm2):
                layer_norm.register_forward_pre_hook(_widen_input)
                layer_norm.register_forward_hook(_round_output)


def _autocast_dtype(tensor: "torch.Tensor") -> "torch.dtype | None":
    import torch

    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _round_input(_: "nn.Module", inputs: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
    dtype = _autocast_dtype(inputs[0])
    return inputs if dtype is None else (inputs[0].to(dtype), *inputs[1:])


def _widen_input(_: "nn.Module", inputs: "tuple[torch.Tensor]") -> "tuple[torch.Tensor]":
    # Autocast does it on CUDA, and not on a CPU.
    return inputs if _autocast_dtype(inputs[0]) is None else (inputs[0].float(),)


def _round_output(_: "nn.Module", __: "tuple[torch.Tensor]", output: "torch.Tensor") -> "torch.Tensor":
    dtype = _autocast_dtype(output)
    return output if dtype is None else output.to(dtype)


def compute_in_float8(model: "nn.Module", emulate: bool = False) -> None:
    """Lets the linear layers of a model's blocks compute in float8, each tensor scaled by its largest value.

    Projections that are fused stay in bfloat16, and so do layers whose sides float8 products do not take.

    Args:
        model: its blocks are changed in place; parameters keep their names and dtype.
        emulate: compute in float32 what a GPU would in float8, to try it elsewhere.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    from flip_hf.modeling.blocks_flip import FlipAttention, FlipEncoder, FlipQueryKeyValue

    fused = {
        id(layer)
        for module in model.modules()
        if isinstance(module, FlipAttention) and module.fuses_projections
        for layer in module.children()
        if isinstance(layer, FlipQueryKeyValue)
    }

    def takes(layer: Any, _: str) -> bool:
        fits = layer.in_features % _FP8_MULTIPLE == 0 and layer.out_features % _FP8_MULTIPLE == 0
        return fits and id(layer) not in fused

    # Packed texts need not have a multiple of 16 tokens, over which a weight's gradient is summed.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for module in list(model.modules()):
        if isinstance(module, FlipEncoder):
            convert_to_float8_training(module, module_filter_fn=takes, config=config)
