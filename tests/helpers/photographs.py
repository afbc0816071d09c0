"""Pictures as rough as photographs."""

import numpy as np
from PIL import Image


def photograph(width: int, height: int) -> Image.Image:
    """Noise of several octaves, as rough as photographs are: their spectrum falls with the frequency."""
    rng = np.random.default_rng(width + height)
    total = np.zeros((height, width, 3))
    for octave in range(7):
        for channel in range(3):
            cells = Image.fromarray(rng.standard_normal((4 * 2**octave, 4 * 2**octave), np.float32))
            total[..., channel] += 0.72**octave * np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((128 + 45 * total / total.std()).clip(0, 255).astype(np.uint8))
