"""The exponential moving average of the weights, as torch's `AveragedModel`."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """An exponential moving average of a model's parameters that is updated without a wait for the device.

    `AveragedModel.update_parameters` decides on the host, by its count of updates.

    Args:
        model: the model; its weights after the first update become the average.
        decay: share of the average that stays at each update.
        device: the model's device.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device):
        super().__init__(model, device)
        self.decay = decay
        self.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, skipped: torch.Tensor) -> None:
        """Updates the average with the weights after a step, unless `skipped` () is 1."""
        share = torch.where(self.n_averaged == 0, 1.0, 1 - self.decay) * (1 - skipped)
        for mean, value in zip(self.module.parameters(), model.parameters(), strict=True):
            mean.lerp_(value, share.to(mean.dtype))
        self.n_averaged += 1 - skipped.to(self.n_averaged.dtype)


def make_average(accelerator: Accelerator, model: nn.Module, half_life: int | None, batch_size: int) -> Average | None:
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
    return Average(model, 0.5 ** (batch_size / half_life), accelerator.device)
