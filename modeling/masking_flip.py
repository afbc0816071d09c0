"""Masks: the patches of an image, and the tokens of a text, that stay visible.

Letters: B samples, L patches of an image in a grid of H x W, K kept patches, C channels, P patch side, T tokens.
A mask is the tensor `ids_keep` (B, K) of patch indices in raster order; the encoder sees nothing else. The order of the
indices does not affect results, so they are kept sorted, for locality and reproducibility.

The strategies of `MASK_STRATEGIES` differ in which patches they keep, never in how many. All draw on the device, from
torch's default generator (`torch.manual_seed` makes them reproducible), and none synchronises with a GPU. Those of
`TEXT_MASK_STRATEGIES` are given their random numbers.
"""

import math
from collections.abc import Callable

import torch

from .configuration_flip import num_kept

# From GLIP's released code, which calls it a standard deviation; the image spans -1 to 1.
GAUSSIAN_VARIANCE = 0.2
# Which tokens of a text are kept, beside the first and the pooled one:
# - random: any positions of the context, padding or not, so that a short text loses words too (FLIP, table 1c).
# All others drop padding first.
# - prioritized: any tokens (ibidem).
# - block: one run of tokens, at a uniformly random place (CLIPA, Li et al. 2023).
# - frequency: words drawn one after another, each with a probability proportional to its weight among those left, until
#   the text is full; of the last word drawn, the first pieces that fit. The first token is kept, with what is of one
#   word with it. For the weights see CLIPF (Liang and Larson 2024, arXiv 2412.16148).
TEXT_MASK_STRATEGIES = ("random", "prioritized", "block", "frequency")


def random_masking(batch_size: int, num_patches: int, mask_ratio: float, device: torch.device | str) -> torch.Tensor:
    """Draws a uniformly random subset of the patches for each sample.

    The noise is drawn on `device` from torch's default generator (`torch.manual_seed` makes it reproducible), and the
    patches with the smallest noise are kept, as in MAE and FLIP.

    Returns:
        `ids_keep` (B, K), int64, sorted along K.

    Raises:
        ValueError: see [`num_kept`].
    """
    kept = num_kept(num_patches, mask_ratio)
    noise = torch.rand(batch_size, num_patches, device=device)  # (B, L)
    return noise.argsort(dim=1)[:, :kept].sort(dim=1).values  # (B, K)


def block_masking(
    batch_size: int, grid: tuple[int, int], mask_ratio: float, device: torch.device | str
) -> torch.Tensor:
    """Keeps one contiguous block of each image, at a uniformly random position.

    As in CLIPA (Li et al. 2023), which keeps the block; MAE's and BEiT's block-wise masking drops blocks instead. The
    block has the proportions of the grid; where no such rectangle has K patches, its first or last column is shorter.
    The centre is kept more often than the border, as more blocks contain it.

    Returns:
        `ids_keep` (B, K), int64, sorted along K.

    Raises:
        ValueError: see [`num_kept`].
    """
    rows, columns = grid
    kept = num_kept(rows * columns, mask_ratio)
    height = max(-(-kept // columns), round(math.sqrt(kept * rows / columns)))
    width = -(-kept // height)
    top = torch.randint(rows - height + 1, (batch_size, 1), device=device)  # (B, 1)
    left = torch.randint(columns - width + 1, (batch_size, 1), device=device)  # (B, 1)
    ids = torch.arange(kept, device=device)  # down the columns of the block
    block = (ids % height * columns + ids // height).sort().values  # (K), at the top left
    ids_keep = block + top * columns + left  # (B, K)
    # The very last patch would never be kept where the last column is short: rotate half of the masks by 180 degrees.
    turned = torch.rand(batch_size, 1, device=device) < 0.5
    return torch.where(turned, rows * columns - 1 - ids_keep.flip(1), ids_keep)


def _dither_ranks(rows: torch.Tensor, columns: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the ranks of Bayer's ordered dither at places (row, column) of a square of side 2^bits."""
    ranks = torch.zeros_like(rows ^ columns)
    for bit in range(bits):
        pair = 2 * ((rows ^ columns) >> bit & 1) + (rows >> bit & 1)  # 0 ... 3, diagonal neighbours first
        ranks = ranks + (pair << 2 * (bits - 1 - bit))
    return ranks


def grid_masking(batch_size: int, grid: tuple[int, int], mask_ratio: float, device: torch.device | str) -> torch.Tensor:
    """Keeps a regular pattern, shifted at random: one patch of each 2 x 2 at a ratio of 0.75, a chequerboard at 0.5.

    MAE's grid-wise sampling is the pattern at 0.75, always at the same position. For other ratios and grids the pattern
    is that of ordered dithering (Bayer 1973), whose patches are spread as evenly as possible.

    Returns:
        `ids_keep` (B, K), int64, sorted along K.

    Raises:
        ValueError: see [`num_kept`].
    """
    rows, columns = grid
    kept = num_kept(rows * columns, mask_ratio)
    bits = (max(grid) - 1).bit_length()
    shifts = torch.randint(2**bits, (2, batch_size, 1, 1), device=device)
    row = (torch.arange(rows, device=device)[:, None] + shifts[0]) % 2**bits  # (B, H, 1)
    column = (torch.arange(columns, device=device) + shifts[1]) % 2**bits  # (B, 1, W)
    ranks = _dither_ranks(row, column, bits).flatten(1)  # (B, L), unique in each row
    return ranks.argsort(dim=1)[:, :kept].sort(dim=1).values


def gaussian_masking(
    batch_size: int, grid: tuple[int, int], mask_ratio: float, device: torch.device | str
) -> torch.Tensor:
    """Keeps patches near the centre more often: GLIP (Liang and Larson 2024), as in its released code.

    The density of a two-dimensional Gaussian is subtracted from uniform noise, and the K lowest are kept. On an image
    from -1 to 1 with `GAUSSIAN_VARIANCE`, it is 0.8 in the centre and 0.005 in a corner.

    Returns:
        `ids_keep` (B, K), int64, sorted along K.

    Raises:
        ValueError: see [`num_kept`].
    """
    rows, columns = grid
    kept = num_kept(rows * columns, mask_ratio)
    y, x = (torch.linspace(-1, 1, n, device=device) if n > 1 else torch.zeros(1, device=device) for n in grid)
    squares = (y[:, None] ** 2 + x**2).flatten()  # (L), from the centre
    density = torch.exp(-squares / (2 * GAUSSIAN_VARIANCE)) / (2 * math.pi * GAUSSIAN_VARIANCE)
    noise = torch.rand(batch_size, rows * columns, device=device) - density  # (B, L)
    return noise.argsort(dim=1)[:, :kept].sort(dim=1).values


def _random(batch_size: int, grid: tuple[int, int], mask_ratio: float, device: torch.device | str) -> torch.Tensor:
    return random_masking(batch_size, grid[0] * grid[1], mask_ratio, device)


MASK_STRATEGIES: dict[str, Callable[..., torch.Tensor]] = {
    "random": _random,
    "block": block_masking,
    "grid": grid_masking,
    "gaussian": gaussian_masking,
}


def draw_mask(
    strategy: str, batch_size: int, grid: tuple[int, int], mask_ratio: float, device: torch.device | str
) -> torch.Tensor:
    """Draws the patches to keep, by the strategy of this name.

    Args:
        strategy: a key of `MASK_STRATEGIES`.
        batch_size: B.
        grid: rows H and columns W of patches.
        mask_ratio: fraction of the patches dropped.
        device: device to draw the mask on.

    Returns:
        `ids_keep` (B, K), int64, sorted along K.

    Raises:
        ValueError: there is no such strategy; see also [`num_kept`].
    """
    if strategy not in MASK_STRATEGIES:
        raise ValueError(f"mask_strategy must be one of {', '.join(MASK_STRATEGIES)}, got {strategy!r}.")
    return MASK_STRATEGIES[strategy](batch_size, grid, mask_ratio, device)


def check_ids_keep(ids_keep: torch.Tensor, batch_size: int, num_patches: int) -> None:
    """Checks the shape and dtype of a caller's `ids_keep`, but not its values, which would stall a GPU.

    Raises:
        ValueError: it is not an integer tensor of shape (batch_size, K) with 1 <= K <= num_patches.
    """
    shape_fits = ids_keep.ndim == 2 and ids_keep.shape[0] == batch_size and 1 <= ids_keep.shape[1] <= num_patches
    if not shape_fits or ids_keep.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"ids_keep must be an integer tensor of shape ({batch_size}, K) with 1 <= K <= {num_patches}, "
            f"got {ids_keep.dtype} of shape {tuple(ids_keep.shape)}."
        )


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Returns the rows and columns of whole patches in images of height x width pixels.

    Raises:
        ValueError: the images are smaller than a patch.
    """
    rows = height // patch_size
    columns = width // patch_size
    if rows < 1 or columns < 1:
        raise ValueError(
            f"Images of {height} x {width} pixels are smaller than a patch of {patch_size} x {patch_size}: make them "
            "larger."
        )
    return rows, columns


def cut_patches(pixel_values: torch.Tensor, patch_size: int, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
    """Cuts images into patches and copies only those in `ids_keep`: dropped pixels are never copied.

    Args:
        pixel_values: (B, C, height, width); a remainder smaller than a patch is dropped, as by a strided convolution.
        patch_size: P.
        ids_keep: (B, K) indices in raster order; all patches if None.

    Returns:
        (B, K, C * P * P), or (B, L, C * P * P) if `ids_keep` is None; flattened in the order of a convolution's kernel.

    Raises:
        ValueError: the images are smaller than a patch.
    """
    batch_size, channels, height, width = pixel_values.shape
    rows, columns = patch_grid(height, width, patch_size)
    pixel_values = pixel_values[:, :, : rows * patch_size, : columns * patch_size]
    grid = pixel_values.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    grid = grid.permute(0, 2, 4, 1, 3, 5)  # (B, H, W, C, P, P), a view
    if ids_keep is None:
        return grid.reshape(batch_size, rows * columns, -1)  # (B, L, C * P * P)
    samples = torch.arange(batch_size, device=ids_keep.device)[:, None]  # (B, 1)
    return grid[samples, ids_keep // columns, ids_keep % columns].flatten(2)  # (B, K, C * P * P)


def pooled_token(input_ids: torch.Tensor, pooling_type: str, eos_token_id: int | None) -> torch.Tensor:
    """Returns the index (B,) of the token (B, T) that is pooled, for the pooling types that read a single one."""
    if pooling_type == "first":
        return torch.zeros_like(input_ids[:, 0])
    # int32, since ONNX's argmax does not take int64.
    scores = input_ids.int() if pooling_type == "argmax" else (input_ids == eos_token_id).int()
    return scores.argmax(dim=1)


def mask_text(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    noise: torch.Tensor,
    *,
    strategy: str,
    kept: int,
    pooled: torch.Tensor | None = None,
    word_begins: torch.Tensor | None = None,
    word_weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Shortens texts to `kept` tokens, or leaves them whole if they are no longer.

    The kept tokens retain their order and, like patches, their positions: later positions are trained too, and a masked
    text is the whole text with some tokens hidden. The first token and the pooled one are always kept; for the others
    see `TEXT_MASK_STRATEGIES`.

    Args:
        input_ids, attention_mask: (B, T), padded on the right.
        noise: (B, context) random numbers in [0, 1) that decide; texts count as padded to the context.
        strategy: one of `TEXT_MASK_STRATEGIES`.
        kept: number of tokens kept, at least 2.
        pooled: (B,), the index of the token that the model pools; see [`pooled_token`].
        word_begins: (B, T), bool, the tokens that begin a word; for `"frequency"`.
        word_weights: (B, T), positive, the weight of each token's word, infinite to keep it before any other; likewise.

    Returns:
        `input_ids`, `attention_mask` and `position_ids`, (B, min(kept, T)): arguments of the text tower.

    Raises:
        ValueError: there is no such strategy.
    """
    if strategy not in TEXT_MASK_STRATEGIES:
        raise ValueError(f"text_mask_strategy must be one of {', '.join(TEXT_MASK_STRATEGIES)}, got {strategy!r}.")
    length = input_ids.shape[1]
    missing = (0, max(noise.shape[1] - length, 0))
    input_ids, attention_mask = (torch.nn.functional.pad(x, missing) for x in (input_ids, attention_mask))
    always = torch.zeros_like(noise, dtype=torch.bool)  # (B, context)
    always[:, 0] = True
    if pooled is not None:
        always.scatter_(1, pooled[:, None].long(), True)
    is_padding = attention_mask == 0
    if strategy == "random":
        ranks = noise
    elif strategy == "prioritized":
        ranks = noise + is_padding
    elif strategy == "block":
        ranks = _outside_run(noise, ~(always | is_padding), kept - always.sum(dim=1, keepdim=True)) + 2 * is_padding
    else:
        ranks = _race_of_words(noise, word_begins, word_weights).masked_fill(is_padding, torch.inf)
    ranks = ranks.masked_fill(always, -2)  # (B, context), the lowest are kept
    # Sorted, so that text comes before padding; no row has more than T tokens of text.
    position_ids = ranks.argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values[:, :length]  # (B, min(kept, T))
    return {
        "input_ids": input_ids.gather(1, position_ids),
        "attention_mask": attention_mask.gather(1, position_ids),
        "position_ids": position_ids,
    }


def _outside_run(noise: torch.Tensor, is_free: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Returns 0 for a run of `length` (B, 1) free tokens (B, T), at a uniformly random place, and 1 for all others."""
    number = is_free.cumsum(dim=1) - 1  # (B, T), of a free token among the free ones
    last_start = (is_free.sum(dim=1, keepdim=True) - length).clamp(min=0)  # (B, 1)
    start = (noise[:, :1] * (last_start + 1)).long().minimum(last_start)  # a product may round up
    return (~is_free | (number < start) | (number >= start + length)).long()


def _race_of_words(noise: torch.Tensor, begins: torch.Tensor | None, weights: torch.Tensor | None) -> torch.Tensor:
    """Returns a time (B, context) for each token, the same for all of a word, and -1 for those of the first word.

    The times are exponential, with the weights (B, T) as rates: in their order, words are drawn one after another by
    weight (Efraimidis and Spirakis 2006).

    Raises:
        ValueError: the words are missing.
    """
    if begins is None or weights is None:
        raise ValueError('text_mask_strategy="frequency" needs word_begins and word_weights.')
    places = torch.arange(begins.shape[1], device=noise.device)
    first = (places * begins).cummax(dim=1).values  # (B, T), the first token of each token's word
    times = -torch.log1p(-noise.gather(1, first)) / weights
    times = times.masked_fill(first == 0, -1)
    return torch.nn.functional.pad(times, (0, noise.shape[1] - times.shape[1]))
