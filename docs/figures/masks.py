"""Draws what each mask strategy leaves of an image: `python docs/figures/masks.py` writes masks.png beside itself."""

import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from flip_hf.data.shapes import shapes_dataset
from flip_hf.modeling.masking_flip import MASK_STRATEGIES, draw_mask

GRID = 14  # ViT-B/16 at 224 pixels
PIXELS = 224
RATIOS = (0.5, 0.75)
BLANK = 225


def masked(image: np.ndarray, strategy: str, ratio: float) -> np.ndarray:
    """The image (P, P, 3) with its dropped patches blank."""
    ids_keep = draw_mask(strategy, 1, (GRID, GRID), ratio, "cpu")[0]
    visible = torch.zeros(GRID * GRID, dtype=torch.bool).index_fill(0, ids_keep, True).view(GRID, GRID).numpy()
    visible = visible.repeat(PIXELS // GRID, axis=0).repeat(PIXELS // GRID, axis=1)[..., None]  # (P, P, 1)
    return np.where(visible, image, BLANK).astype(np.uint8)


def main() -> None:
    """A row a ratio, a column a strategy, the whole image before them."""
    torch.manual_seed(0)
    *_, row = shapes_dataset("test", image_size=PIXELS, num_samples=2)
    image = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
    figure = Figure(figsize=(8, 3.5), layout="constrained", facecolor="white")
    panels = figure.subplots(len(RATIOS), 1 + len(MASK_STRATEGIES))
    for ratio, line in zip(RATIOS, panels, strict=True):
        shown = [image, *(masked(image, strategy, ratio) for strategy in MASK_STRATEGIES)]
        for panel, picture in zip(line, shown, strict=True):
            panel.imshow(picture)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        line[0].set_ylabel(f"{ratio:.0%} dropped")
    for panel, name in zip(panels[0], ("image", *MASK_STRATEGIES), strict=True):
        panel.set_title(name, fontsize=11)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
