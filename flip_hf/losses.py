"""The contrastive loss over all processes, exact for every parameter.

Letters: N pairs in all, n of them on this process, E the length of an embedding.
"""

import torch
import torch.distributed as dist
from torch import nn


class _GatherWithGradient(torch.autograd.Function):
    """Rows of all processes (n, E) -> (N, E); the gradient of a row returns to its process, summed over all uses."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.count = rows.shape[0]
        gathered = torch.empty(
            dist.get_world_size() * rows.shape[0], *rows.shape[1:], dtype=rows.dtype, device=rows.device
        )
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.count
        return grad[start : start + ctx.count]


def gather(rows: torch.Tensor) -> torch.Tensor:
    """All processes' rows in the order of their ranks; the input itself where there is one process.

    Every process must bring as many rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherWithGradient.apply(rows)  # pyright: ignore[reportReturnType]


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The loss is computed so whatever the towers' precision: bfloat16 logits at a scale of 100 are off by 0.1."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric cross-entropy of n local pairs against all N pairs.

    Each process computes its own rows and columns of the N x N similarities. The mean over processes of the results is
    the loss of the whole batch, and so the mean of their gradients, which DistributedDataParallel takes, is exactly the
    gradient of one process with all N pairs.

    Args:
        image_embeds: (n, E), normalised.
        text_embeds: (n, E), normalised, paired with the images.
        logit_scale: (1,), the factor on cosine similarities.

    Returns:
        The loss, float32 (float64 from float64), and the share of local images whose best text of all N is their own.
    """
    image_embeds, text_embeds, logit_scale = map(at_least_float32, (image_embeds, text_embeds, logit_scale))
    with torch.autocast(image_embeds.device.type, enabled=False):
        all_images, all_texts = gather(image_embeds), gather(text_embeds)  # (N, E)
        logits_per_image = logit_scale * image_embeds @ all_texts.T  # (n, N)
        logits_per_text = logit_scale * text_embeds @ all_images.T  # (n, N)
    count = image_embeds.shape[0]
    first = dist.get_rank() * count if all_texts.shape[0] > count else 0
    labels = torch.arange(first, first + count, device=image_embeds.device)  # (n)
    loss = (
        nn.functional.cross_entropy(logits_per_image, labels) + nn.functional.cross_entropy(logits_per_text, labels)
    ) / 2
    accuracy = (logits_per_image.detach().argmax(dim=1) == labels).float().mean()
    return loss, accuracy
