"""Which patches stay visible.

Letters: B samples, L patches of an image, K kept patches, C channels, P patch side, H x W patches in the grid.
A mask is the tensor `ids_keep` (B, K) of patch indices in raster order; the encoder sees nothing else. The order of the
indices does not change a result, so they are kept sorted: better locality, and reproducible.
"""

import torch


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Number K of patches kept: `int(L * (1 - mask_ratio))`, in floating point as in the official FLIP and MAE code.

    Raises:
        ValueError: `mask_ratio` is outside [0, 1), or no patch would be left.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio is the fraction of patches dropped and must be in [0, 1), got {mask_ratio!r}.")
    kept = int(num_patches * (1 - mask_ratio))
    if kept < 1:
        raise ValueError(f"mask_ratio={mask_ratio} keeps none of the {num_patches} patches; use a lower one.")
    return kept


def random_masking(batch_size: int, num_patches: int, mask_ratio: float, device: torch.device | str) -> torch.Tensor:
    """Draws for each sample its own uniformly random subset of the patches.

    The noise is drawn on `device` from torch's default generator (`torch.manual_seed` makes it repeatable), and the
    patches of smallest noise are kept, as in MAE and FLIP.

    Returns:
        `ids_keep` (B, K), int64, sorted along K.

    Raises:
        ValueError: see [`num_kept`].
    """
    kept = num_kept(num_patches, mask_ratio)
    noise = torch.rand(batch_size, num_patches, device=device)  # (B, L)
    return noise.argsort(dim=1)[:, :kept].sort(dim=1).values  # (B, K)


def check_ids_keep(ids_keep: torch.Tensor, batch_size: int, num_patches: int) -> None:
    """Checks the shape and type of a caller's `ids_keep`; its values are not read, which would stall a GPU.

    Raises:
        ValueError: it is not an integer tensor of shape (batch_size, K) with 1 <= K <= num_patches.
    """
    shape_fits = ids_keep.ndim == 2 and ids_keep.shape[0] == batch_size and 1 <= ids_keep.shape[1] <= num_patches
    if not shape_fits or ids_keep.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"ids_keep must be an integer tensor of shape ({batch_size}, K) with 1 <= K <= {num_patches}, "
            f"got {ids_keep.dtype} of shape {tuple(ids_keep.shape)}."
        )


def cut_patches(pixel_values: torch.Tensor, patch_size: int, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
    """Cuts images into patches and copies only those in `ids_keep`: dropped pixels are never moved.

    Args:
        pixel_values: (B, C, height, width); a remainder that fills no patch is left out, as a strided convolution does.
        patch_size: P.
        ids_keep: (B, K) indices in raster order; all patches if None.

    Returns:
        (B, K, C * P * P), or (B, L, C * P * P) if `ids_keep` is None; flattened in the order of a convolution's kernel.
    """
    batch_size, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    pixel_values = pixel_values[:, :, : rows * patch_size, : columns * patch_size]
    grid = pixel_values.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    grid = grid.permute(0, 2, 4, 1, 3, 5)  # (B, H, W, C, P, P), a view
    if ids_keep is None:
        return grid.reshape(batch_size, rows * columns, -1)  # (B, L, C * P * P)
    samples = torch.arange(batch_size, device=ids_keep.device)[:, None]  # (B, 1)
    return grid[samples, ids_keep // columns, ids_keep % columns].flatten(2)  # (B, K, C * P * P)
