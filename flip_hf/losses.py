"""Contrastive losses over all processes, computed in tiles, with exact gradients for every parameter.

The N x N similarities are never materialised; the backward pass recomputes each tile of them (the idea of
FlashAttention; for contrastive losses, that of Inf-CL, Cheng et al. 2024). A loss and its gradient cost four products
of all images with all texts: one forward, three backward.

The softmax loss is CLIP's: one pass over the tiles yields, for every image and every text, the maximum and the sum of
exponentials that a softmax needs, so one tile serves both directions. The sigmoid loss is SigLIP's (Zhai et al. 2023):
each image with each text is a binary decision, so a tile needs nothing of any other.

A batch may hold a caption several times, as every batch of labelled images does. With `caption_ids`, all pairs of equal
captions are each other's positives; the target of the softmax is spread evenly over them (UniCL, Yang et al. 2022).

Letters: N pairs in total, n of them on this process, E the length of an embedding.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

# Rows and columns of a tile: two tiles of 16 MiB in float32 are held at a time, three where captions are compared or a
# CPU takes logarithms of sigmoids. On a CPU, 512 to 2048 are equally fast and 4096 is slower.
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


def _tiles(count: int, total: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Yields rows and columns of each tile of the (n, N) logits."""
    for row in range(0, count, size):
        for column in range(0, total, size):
            rows = slice(row, min(row + size, count))
            columns = slice(column, min(column + size, total))
            yield rows, columns


class _BestTexts:
    """The text with the largest logit of each image so far; of equal ones the first, as argmax has it."""

    def __init__(self, count: int, like: torch.Tensor):
        self.maximum = like.new_full((count,), -torch.inf)
        self.texts = torch.zeros(count, dtype=torch.long, device=like.device)

    def add(self, rows: slice, columns: slice, logits: torch.Tensor) -> torch.Tensor:
        """Adds a tile's logits; returns the maximum of each of its rows."""
        maximum, index = logits.max(dim=1)
        self.texts[rows] = torch.where(maximum > self.maximum[rows], index + columns.start, self.texts[rows])
        self.maximum[rows] = torch.maximum(self.maximum[rows], maximum)
        return maximum


class _Pairs:
    """The positives of an image: its own text."""

    def __init__(self, count: int, device: torch.device):
        self.first = _rank() * count  # the label of the first row
        self.labels = torch.arange(self.first, self.first + count, device=device)

    def add(self, sums: torch.Tensor, rows: slice, columns: slice, logits: torch.Tensor) -> None:
        """Adds a tile's logits of positives to their sums (n) per image."""
        offset = self.first + rows.start - columns.start
        logits = logits.diagonal(offset)
        start = rows.start + max(-offset, 0)
        sums[start : start + len(logits)] += logits

    def mean(self, sums: torch.Tensor) -> torch.Tensor:
        """Returns the means of the positives of each image, given their sums."""
        return sums

    def subtract(self, weight: torch.Tensor, rows: slice, columns: slice, grads: torch.Tensor) -> None:
        """Subtracts the gradient of the weighted means from a tile of gradients."""
        grads.diagonal(self.first + rows.start - columns.start).sub_(weight)

    def negate(self, rows: slice, columns: slice, tile: torch.Tensor) -> None:
        """Changes the sign of a tile's values of positives."""
        tile.diagonal(self.first + rows.start - columns.start).neg_()

    def contain(self, texts: torch.Tensor) -> torch.Tensor:
        """Returns whether each image's text of these (n), counted over all processes, is a positive."""
        return texts == self.labels


class _EqualCaptions:
    """The positives of an image: all texts equal to its own. Same methods as [`_Pairs`].

    Over all processes, the sum of the images' means is also the sum of the texts', since pairs of equal captions have
    the same number of positives. So each process takes the means of its images for both directions.
    """

    def __init__(self, caption_ids: torch.Tensor):
        self.own = caption_ids  # (n)
        self.all = _gather(caption_ids)  # (N)
        self.counts = torch.zeros_like(caption_ids)

    def _equal(self, rows: slice, columns: slice) -> torch.Tensor:
        return self.own[rows, None] == self.all[columns]

    def add(self, sums: torch.Tensor, rows: slice, columns: slice, logits: torch.Tensor) -> None:
        equal = self._equal(rows, columns)
        self.counts[rows] += equal.sum(dim=1)
        sums[rows] += logits.where(equal, 0).sum(dim=1)

    def mean(self, sums: torch.Tensor) -> torch.Tensor:
        return sums / self.counts

    def subtract(self, weight: torch.Tensor, rows: slice, columns: slice, grads: torch.Tensor) -> None:
        grads.sub_((weight / self.counts[rows, None]).where(self._equal(rows, columns), 0))

    def negate(self, rows: slice, columns: slice, tile: torch.Tensor) -> None:
        tile.mul_(self._equal(rows, columns).to(tile.dtype).mul_(-2).add_(1))

    def contain(self, texts: torch.Tensor) -> torch.Tensor:
        return self.all[texts] == self.own


def _positives(caption_ids: torch.Tensor | None, count: int, device: torch.device) -> _Pairs | _EqualCaptions:
    return _Pairs(count, device) if caption_ids is None else _EqualCaptions(caption_ids)


class _ContrastiveLoss(torch.autograd.Function):
    """Local images against all texts; what columns need from other processes' images is summed over processes."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        caption_ids: torch.Tensor | None,
        tile_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = images.shape[0]
        positives = _positives(caption_ids, count, images.device)
        all_texts = _gather(texts)  # (N, E)
        scaled = images * scale  # (n, E)
        per_image = _LogSumExp(count, images)
        per_text = _LogSumExp(all_texts.shape[0], images)
        positive_logits = images.new_zeros(count)
        best = _BestTexts(count, images)
        for rows, columns in _tiles(count, all_texts.shape[0], tile_size):
            logits = scaled[rows] @ all_texts[columns].T
            per_image.add(rows, logits, best.add(rows, columns, logits), dim=1)
            per_text.add(columns, logits, logits.amax(dim=0), dim=0)
            positives.add(positive_logits, rows, columns, logits)
        per_text.sum_over_processes()

        own = slice(_rank() * count, (_rank() + 1) * count)
        positive_logits = positives.mean(positive_logits)
        loss_per_image = per_image.maximum - positive_logits + per_image.total.log()
        loss_per_text = per_text.maximum[own] - positive_logits + per_text.total[own].log()
        accuracy = positives.contain(best.texts).float().mean()
        ctx.positives = positives
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
            for rows, columns in _tiles(count, all_texts.shape[0], ctx.tile_size):
                logits = scaled[rows] @ all_texts[columns].T
                softmax = (logits - image_maximum[rows, None]).exp_().mul_(image_weight[rows, None])
                logit_grads = logits.sub_(text_maximum[columns]).exp_().mul_(text_weight[columns]).add_(softmax)
                ctx.positives.subtract(2 * weight, rows, columns, logit_grads)
                image_grads[rows].addmm_(logit_grads, all_texts[columns])
                if ctx.needs_input_grad[1]:
                    text_grads[columns].addmm_(logit_grads.T, scaled[rows])
        scale_grad = (image_grads * images).sum().reshape(scale.shape)
        text_grads = _sum_and_scatter(text_grads) if ctx.needs_input_grad[1] else None
        return image_grads.mul_(scale), text_grads, scale_grad, None, None


class _SigmoidLoss(torch.autograd.Function):
    """Local images against all texts, whose gradients are summed over processes."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        caption_ids: torch.Tensor | None,
        tile_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = images.shape[0]
        positives = _positives(caption_ids, count, images.device)
        all_texts = _gather(texts)  # (N, E)
        scaled = images * scale  # (n, E)
        best = _BestTexts(count, images)
        likelihoods = images.new_zeros(count)  # sums over the texts, of logarithms
        for rows, columns in _tiles(count, all_texts.shape[0], tile_size):
            logits = torch.addmm(bias, scaled[rows], all_texts[columns].T)
            best.add(rows, columns, logits)
            # The logits of negatives, with the sign changed, are those of the right decision.
            positives.negate(rows, columns, logits)
            likelihoods[rows] += nn.functional.logsigmoid(logits.neg_()).sum(dim=1)

        accuracy = positives.contain(best.texts).float().mean()
        ctx.positives = positives
        ctx.tile_size = tile_size
        ctx.mark_non_differentiable(accuracy)
        ctx.save_for_backward(images, all_texts, scale, bias)
        return -likelihoods.mean(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        images, all_texts, scale, bias = ctx.saved_tensors
        count = images.shape[0]
        scaled = images * scale
        weight = grad / count
        image_grads = torch.zeros_like(images)
        text_grads = torch.zeros_like(all_texts)
        bias_grads = torch.zeros_like(images[:, 0])  # (n)
        with torch.autocast(images.device.type, enabled=False):
            for rows, columns in _tiles(count, all_texts.shape[0], ctx.tile_size):
                logits = torch.addmm(bias, scaled[rows], all_texts[columns].T)
                # The probability of the wrong decision: no 1 is subtracted from a number near 1.
                ctx.positives.negate(rows, columns, logits)
                logit_grads = logits.sigmoid_().mul_(weight)
                ctx.positives.negate(rows, columns, logit_grads)
                bias_grads[rows] += logit_grads.sum(dim=1)
                image_grads[rows].addmm_(logit_grads, all_texts[columns])
                if ctx.needs_input_grad[1]:
                    text_grads[columns].addmm_(logit_grads.T, scaled[rows])
        scale_grad = (image_grads * images).sum().reshape(scale.shape)
        bias_grad = bias_grads.sum().reshape(bias.shape)
        text_grads = _sum_and_scatter(text_grads) if ctx.needs_input_grad[1] else None
        return image_grads.mul_(scale), text_grads, scale_grad, bias_grad, None, None


def _check_pairs(
    loss: str, image_embeds: torch.Tensor, text_embeds: torch.Tensor, caption_ids: torch.Tensor | None
) -> None:
    """Checks that images, texts and captions match.

    Raises:
        ValueError: they do not; the message names the loss and the shapes.
    """
    if image_embeds.dim() != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError(
            f"{loss} needs as many image_embeds as text_embeds, both (n, E), but they are "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    if caption_ids is not None and caption_ids.shape != image_embeds.shape[:1]:
        raise ValueError(
            f"{loss} needs one of caption_ids for each of the {len(image_embeds)} pairs, but their shape is "
            f"{tuple(caption_ids.shape)}."
        )


@torch.compiler.disable(reason="Every tile would be compiled separately: minutes for a large batch.")
def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    caption_ids: torch.Tensor | None = None,
    tile_size: int = TILE_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes CLIP's loss, the symmetric cross-entropy of n local pairs against all N, in memory linear in N.

    The mean of the results over processes is the loss of the whole batch, so the mean of their gradients, which
    DistributedDataParallel takes, is exactly the gradient of one process with all N pairs. Every process must pass the
    same number of pairs. Differentiable once. Computed in float32 even under autocast; torch.compile does not compile
    it, at the price of a graph break.

    Args:
        image_embeds: (n, E), normalised.
        text_embeds: (n, E), normalised, paired with the images.
        logit_scale: (1,), the factor applied to cosine similarities.
        caption_ids: (n,), integers that are equal where captions are: those pairs are positives of each other, with
            equal parts of the target. If not given, an image's only positive is its own text.
        tile_size: rows and columns of the similarities computed at a time. The result does not depend on it.

    Returns:
        The loss, float32 (float64 for float64 inputs), and the fraction of local images whose best text among all N is
        a positive.

    Raises:
        ValueError: images, texts and caption_ids do not match.
    """
    _check_pairs("contrastive_loss", image_embeds, text_embeds, caption_ids)
    image_embeds, text_embeds, logit_scale = map(at_least_float32, (image_embeds, text_embeds, logit_scale))
    with torch.autocast(image_embeds.device.type, enabled=False):
        return _ContrastiveLoss.apply(image_embeds, text_embeds, logit_scale, caption_ids, tile_size)


@torch.compiler.disable(reason="Every tile would be compiled separately: minutes for a large batch.")
def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    *,
    caption_ids: torch.Tensor | None = None,
    tile_size: int = TILE_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes SigLIP's loss (Zhai et al. 2023, Algorithm 1) of n local images with all N texts, in memory linear in N.

    Every image with every text is a binary decision with the logit `logit_scale * cosine + logit_bias`: yes for
    positives, no for all others. The loss is the sum of the N * N cross-entropies, divided by N. For everything else,
    processes, precision and compilation, see [`contrastive_loss`].

    Args:
        image_embeds: (n, E), normalised.
        text_embeds: (n, E), normalised, paired with the images.
        logit_scale: (1,), the factor applied to cosine similarities.
        logit_bias: (1,), added to the scaled similarities. Most decisions are no, so it begins far below zero.
        caption_ids: (n,), integers that are equal where captions are: those pairs are positives of each other, each a
            decision of its own. If not given, an image's only positive is its own text.
        tile_size: rows and columns of the similarities computed at a time. The result does not depend on it.

    Returns:
        The loss, float32 (float64 for float64 inputs), and the fraction of local images whose best text among all N is
        a positive.

    Raises:
        ValueError: images, texts and caption_ids do not match.
    """
    _check_pairs("sigmoid_loss", image_embeds, text_embeds, caption_ids)
    image_embeds, text_embeds, logit_scale = map(at_least_float32, (image_embeds, text_embeds, logit_scale))
    logit_bias = logit_bias.to(image_embeds.dtype)
    with torch.autocast(image_embeds.device.type, enabled=False):
        return _SigmoidLoss.apply(image_embeds, text_embeds, logit_scale, logit_bias, caption_ids, tile_size)
