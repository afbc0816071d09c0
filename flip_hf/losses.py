"""Contrastive loss over all processes, computed in tiles, with exact gradients for every parameter.

The N x N similarities are never materialised. One pass over tiles of them yields, for every image and every text, the
maximum and the sum of exponentials that a softmax needs; the backward pass recomputes each tile (the idea of
FlashAttention; for this loss Inf-CL, Cheng et al. 2024). One tile serves both directions, so the loss and its gradient
cost four products of all images with all texts: one forward, three backward.

Letters: N pairs in total, n of them on this process, E the length of an embedding.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# Rows and columns of a tile: two tiles of 16 MiB in float32 are held at a time. On a CPU, 512 to 2048 are equally fast
# and 4096 is slower.
TILE_SIZE = 2048

# torch 2.13 renames both and warns about the old names; a build without torch.distributed has neither.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Casts lower precisions to float32: bfloat16 logits at a scale of 100 are off by 0.1."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _num_processes() > 1 else 0


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """Gathers all processes' rows, (n, ...) -> (N, ...); returns the input itself if there is one process."""
    if _num_processes() == 1:
        return rows
    gathered = rows.new_empty(_num_processes() * rows.shape[0], *rows.shape[1:])
    _ALL_GATHER(gathered, rows.contiguous())
    return gathered


def _sum_and_scatter(rows: torch.Tensor) -> torch.Tensor:
    """Returns this process's part of the sum over processes, (N, ...) -> (n, ...)."""
    if _num_processes() == 1:
        return rows
    own = rows.new_empty(rows.shape[0] // _num_processes(), *rows.shape[1:])
    _REDUCE_SCATTER(own, rows)
    return own


class _LogSumExp:
    """Running log-sum-exp of many rows, kept as a maximum and a sum so that no logits make it overflow."""

    def __init__(self, count: int, like: torch.Tensor):
        self.maximum = like.new_full((count,), -torch.inf)
        self.total = like.new_zeros(count)

    def add(self, where: slice, logits: torch.Tensor, maximum: torch.Tensor, dim: int) -> None:
        """Adds logits of the rows `where`, given their maximum along `dim`."""
        maximum = torch.maximum(self.maximum[where], maximum)
        shrink = (self.maximum[where] - maximum).exp_()
        self.total[where] = self.total[where] * shrink + (logits - maximum.unsqueeze(dim)).exp_().sum(dim)
        self.maximum[where] = maximum

    def sum_over_processes(self) -> None:
        """Combines what each process has seen of the same rows."""
        if _num_processes() > 1:
            own_maximum = self.maximum.clone()
            dist.all_reduce(self.maximum, dist.ReduceOp.MAX)
            self.total *= (own_maximum - self.maximum).exp_()
            dist.all_reduce(self.total)


def _tiles(count: int, total: int, first: int, size: int) -> Iterator[tuple[slice, slice, int]]:
    """Yields rows and columns of each tile of the (n, N) logits, and the offset of the diagonal with the pairs."""
    for row in range(0, count, size):
        for column in range(0, total, size):
            rows = slice(row, min(row + size, count))
            columns = slice(column, min(column + size, total))
            yield rows, columns, first + row - column


class _ContrastiveLoss(torch.autograd.Function):
    """Local images against all texts; what columns need from other processes' images is summed over processes."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, tile_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = images.shape[0]
        first = _rank() * count  # the label of the first row
        all_texts = _gather(texts)  # (N, E)
        scaled = images * scale  # (n, E)
        per_image = _LogSumExp(count, images)
        per_text = _LogSumExp(all_texts.shape[0], images)
        pair_logits = images.new_empty(count)
        best = torch.zeros(count, dtype=torch.long, device=images.device)  # the best text of each image so far
        for rows, columns, offset in _tiles(count, all_texts.shape[0], first, tile_size):
            logits = scaled[rows] @ all_texts[columns].T
            maximum, index = logits.max(dim=1)
            best[rows] = torch.where(maximum > per_image.maximum[rows], index + columns.start, best[rows])
            per_image.add(rows, logits, maximum, dim=1)
            per_text.add(columns, logits, logits.amax(dim=0), dim=0)
            pairs = logits.diagonal(offset)
            start = rows.start + max(-offset, 0)
            pair_logits[start : start + len(pairs)] = pairs
        per_text.sum_over_processes()

        own = slice(first, first + count)
        loss_per_image = per_image.maximum - pair_logits + per_image.total.log()
        loss_per_text = per_text.maximum[own] - pair_logits + per_text.total[own].log()
        labels = torch.arange(first, first + count, device=images.device)
        accuracy = (best == labels).float().mean()
        ctx.tile_size = tile_size
        ctx.mark_non_differentiable(accuracy)
        ctx.save_for_backward(
            images, all_texts, scale, per_image.maximum, per_image.total, per_text.maximum, per_text.total
        )
        return (loss_per_image + loss_per_text).mean() / 2, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        images, all_texts, scale, image_maximum, image_total, text_maximum, text_total = ctx.saved_tensors
        count = images.shape[0]
        scaled = images * scale
        # A column belongs to the loss of the process that holds its text.
        weight = grad / (2 * count)
        image_weight = weight / image_total  # (n)
        text_weight = _gather(weight.expand(count)) / text_total  # (N)
        image_grads = torch.zeros_like(images)
        text_grads = torch.zeros_like(all_texts)
        with torch.autocast(images.device.type, enabled=False):
            for rows, columns, offset in _tiles(count, all_texts.shape[0], _rank() * count, ctx.tile_size):
                logits = scaled[rows] @ all_texts[columns].T
                softmax = (logits - image_maximum[rows, None]).exp_().mul_(image_weight[rows, None])
                logit_grads = logits.sub_(text_maximum[columns]).exp_().mul_(text_weight[columns]).add_(softmax)
                logit_grads.diagonal(offset).sub_(2 * weight)
                image_grads[rows].addmm_(logit_grads, all_texts[columns])
                if ctx.needs_input_grad[1]:
                    text_grads[columns].addmm_(logit_grads.T, scaled[rows])
        scale_grad = (image_grads * images).sum().reshape(scale.shape)
        text_grads = _sum_and_scatter(text_grads) if ctx.needs_input_grad[1] else None
        return image_grads.mul_(scale), text_grads, scale_grad, None


@torch.compiler.disable(reason="Every tile would be compiled separately: minutes for a large batch.")
def contrastive_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor, *, tile_size: int = TILE_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the symmetric cross-entropy of n local pairs against all N pairs, in memory linear in N.

    The mean of the results over processes is the loss of the whole batch, so the mean of their gradients, which
    DistributedDataParallel takes, is exactly the gradient of one process with all N pairs. Every process must pass the
    same number of pairs. Differentiable once. Computed in float32 even under autocast; torch.compile does not compile
    it, at the price of a graph break.

    Args:
        image_embeds: (n, E), normalised.
        text_embeds: (n, E), normalised, paired with the images.
        logit_scale: (1,), the factor applied to cosine similarities.
        tile_size: rows and columns of the similarities computed at a time. The result does not depend on it.

    Returns:
        The loss, float32 (float64 for float64 inputs), and the fraction of local images whose best text among all N is
        their own.

    Raises:
        ValueError: images and texts do not pair up.
    """
    if image_embeds.dim() != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError(
            "contrastive_loss needs as many image_embeds as text_embeds, both (n, E), but they are "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    image_embeds, text_embeds, logit_scale = map(at_least_float32, (image_embeds, text_embeds, logit_scale))
    with torch.autocast(image_embeds.device.type, enabled=False):
        return _ContrastiveLoss.apply(image_embeds, text_embeds, logit_scale, tile_size)
