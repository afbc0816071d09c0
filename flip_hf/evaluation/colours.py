"""The rescaling and normalisation of an image processor as a table of 256 numbers a channel.

Images then go to the device as bytes, a quarter of the memory, and become there exactly the numbers that the image
processor would have made of them: each is a function of one byte, and the table holds that function's values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

LEVELS = 256
# Size of the picture that a table is tried on: resized by all image processors, and cropped by most. Its bytes have
# another range than the table's, as a function of a whole picture, not of each byte, would show in that.
_TRIED = (40, 24)
_TRIED_LEVELS = (20, 120)


def colour_table(processor: Any, processed: Callable[..., torch.Tensor]) -> torch.Tensor | None:
    """Makes the table (3, 256) of an image processor.

    Args:
        processor: the image processor of a model.
        processed: maps a picture, with options of the image processor, to what that makes of it, (3, S, S).

    Returns:
        The numbers, float32; None for an image processor that does not rescale and normalise, or that does anything
        else to bytes after resizing them, as a trial shows.
    """
    if not (getattr(processor, "do_rescale", False) and getattr(processor, "do_normalize", False)):
        return None
    levels = np.arange(LEVELS, dtype=np.uint8).reshape(16, 16)
    plain = Image.fromarray(np.stack([levels] * 3, axis=2))
    noise = np.random.default_rng(0).integers(*_TRIED_LEVELS, (*_TRIED, 3), dtype=np.uint8)
    tried = Image.fromarray(noise)
    try:
        table = processed(plain, do_resize=False, do_center_crop=False).reshape(3, -1)
        pixels = processed(tried, do_rescale=False, do_normalize=False)
        wanted = processed(tried)
    except (TypeError, ValueError):  # one that does not take these options
        return None
    if pixels.dtype != torch.uint8 or table.shape != (3, LEVELS) or table.dtype != torch.float32:
        return None
    return table if torch.equal(looked_up(pixels[None], table)[0], wanted) else None


def looked_up(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns the numbers (B, 3, S, S), float32, that a table (3, 256) has for bytes (B, 3, S, S)."""
    return (_looked_up_here if pixels.device.type == "cpu" else _looked_up_at_once)(pixels, table)


def _looked_up_at_once(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    starts = LEVELS * torch.arange(3, dtype=torch.int32, device=pixels.device)[:, None, None]
    places = (pixels.int() + starts).reshape(-1)
    return table.reshape(-1).index_select(0, places).view(pixels.shape)


def _looked_up_here(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Looks up in a processor's cache, channel by channel, which takes a third of the time there."""
    # Torch's memory begins at a multiple of 64 bytes, NumPy's anywhere: the last bits of a matrix product depend on it.
    found = torch.empty(pixels.shape)
    levels = table.numpy()
    for image, numbers in zip(pixels.numpy(), found.numpy(), strict=True):
        for channel, row in enumerate(levels):
            np.take(row, image[channel], out=numbers[channel], mode="clip")  # no byte is clipped; others make a copy
    return found
