"""Masks by content: the more edges a patch has, the more often it is kept.

The idea is that of CLIP-PGS (Pei et al. 2025, arXiv 2503.17080), which protects patches with edges from being dropped,
beside other rules. Here it is the only rule, and cheap enough for a worker of the loader: the score is the mean
gradient of a patch, and a mask is a sample of patches, so that every patch is kept at times.

Letters: B samples, S side of an image in pixels, P side of a patch, L patches, K kept patches.
"""

import torch
from torch.nn.functional import avg_pool2d

# Grey levels a pixel, added to each score: the noise of cameras and of JPEG, so that it is not taken for an edge.
NOISE_LEVEL = 1.0
# Patches of this side or more, in pixels, are scored by every second row and column.
_HALVED = 8
_GREEN = 1  # the channel that is scored
_SPAN = 2  # pixels between the two that are compared


def _add_differences(total: torch.Tensor, pixels: torch.Tensor, dim: int, span: int) -> None:
    """Adds to `total` the absolute differences of pixels `span` (1 or 2) apart along a dimension, around each pixel.

    At the border they are `span` times that of neighbours.
    """
    size = pixels.shape[dim]
    inner = (pixels.narrow(dim, span, size - span) - pixels.narrow(dim, 0, size - span)).abs_()
    total.narrow(dim, span - 1, size - span).add_(inner)
    ends = ((0, 1), (size - 1, size - 2))
    for place, neighbour in ends[2 - span :]:  # one apart, only the last has none after it
        difference = (pixels.narrow(dim, place, 1) - pixels.narrow(dim, neighbour, 1)).abs_()
        total.narrow(dim, place, 1).add_(difference, alpha=span)


def edge_scores(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Scores the patches of uint8 images (B, 3, S, S) by their edges.

    The score is the mean of |d/dx| + |d/dy| of green over a patch, by central differences, at every second row and
    column where patches are large. Green is most of a picture's luma, and a third of its bytes to read. On photographs
    the score's rank correlation with the mean magnitude of the luma's Sobel gradient is 0.97 to 0.99 (with all three
    channels, at twice the cost, higher by less than 0.01). Integers keep it exact.

    Returns:
        (B, L), float32, in grey levels a pixel.
    """
    step = 2 if patch_size >= _HALVED and patch_size % 2 == 0 else 1
    span = min(_SPAN // step, images.shape[-1] - 1)
    filled = images.shape[-1] // patch_size * patch_size  # the rest is in no patch
    green = images[:, _GREEN, :filled:step, :filled:step].short()  # (B, S / step, S / step)
    gradient = torch.zeros_like(green)
    for dim in (1, 2):
        _add_differences(gradient, green, dim, span)
    return avg_pool2d(gradient.float(), patch_size // step).flatten(1) / (span * step)


def draw_gumbel(batch_size: int, num_patches: int) -> torch.Tensor:
    """Draws standard Gumbel noise (B, L) from torch's default generator."""
    return -torch.empty(batch_size, num_patches).exponential_().log_()


def keep_edges(
    images: torch.Tensor, gumbel: torch.Tensor, *, patch_size: int, kept: int, strength: float
) -> torch.Tensor:
    """Keeps patches of uint8 images (B, 3, S, S), those with edges more often.

    One after the other is drawn among those left, with a probability proportional to (score + `NOISE_LEVEL`) to the
    power of `strength`. The K largest sums of a log-probability and Gumbel noise are such a sample (Kool et al. 2019,
    arXiv 1903.06059). At strength 0, and on an image without edges, all subsets are equally likely.

    Args:
        images: the images.
        gumbel: (B, L), from [`draw_gumbel`].
        patch_size: P.
        kept: K.
        strength: exponent of the scores.

    Returns:
        `ids_keep` (B, K), int64, sorted along K.
    """
    logits = strength * (edge_scores(images, patch_size) + NOISE_LEVEL).log_()  # (B, L)
    return (logits + gumbel).topk(kept, dim=1).indices.sort(dim=1).values
