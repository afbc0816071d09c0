"""The exponential moving average of the weights, by torch's `AveragedModel`."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_average(
    accelerator: Accelerator, model: nn.Module, half_life: int | None, batch_size: int
) -> AveragedModel | None:
    """Makes the average; None where `half_life` is None.

    Args:
        accelerator: the process layer.
        model: on its device.
        half_life: samples after which a weight's share in the average has halved (as in Karras et al. 2022).
        batch_size: samples a step.

    Raises:
        ValueError: weights or optimizer are sharded.
    """
    if half_life is None:
        return None
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "--ema_half_life needs whole weights on each process; leave it out, or launch by "
            "`accelerate launch --multi_gpu`, which shards nothing."
        )
    decay = 0.5 ** (batch_size / half_life)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)


@torch.no_grad()
def update(average: AveragedModel | None, model: nn.Module) -> None:
    """Updates the average with the weights after a step."""
    if average is not None:
        average.update_parameters(model)
