"""Draws what mask strategies leave of a picture: `python docs/figures/masks.py PICTURE` writes masks.png beside itself.

The picture in masks.png is `chelsea.png` of scikit-image (Stéfan van der Walt, CC0).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from flip_hf.data.decode import open_picture
from flip_hf.data.transforms import EvalTransform
from flip_hf.modeling.masking_flip import MASK_STRATEGIES, draw_mask, num_kept
from flip_hf.training.edges import draw_gumbel, keep_edges

GRID = 14  # ViT-B/16 at 224 pixels
PIXELS = 224
PATCH = PIXELS // GRID
RATIOS = (0.5, 0.75)
BLANK = 225
EDGES = "edges"
STRENGTH = 1.0  # of `edges`; the default, 0.5, can hardly be told from `random` by eye


def kept_patches(image: torch.Tensor, strategy: str, ratio: float) -> torch.Tensor:
    """Draws the ids of the patches of an image (3, P, P) that a strategy keeps."""
    if strategy != EDGES:
        return draw_mask(strategy, 1, (GRID, GRID), ratio, "cpu")[0]
    kept = num_kept(GRID * GRID, ratio)
    return keep_edges(image[None], draw_gumbel(1, GRID * GRID), patch_size=PATCH, kept=kept, strength=STRENGTH)[0]


def masked(image: torch.Tensor, strategy: str, ratio: float) -> np.ndarray:
    """Returns an image (3, P, P) with its dropped patches blank, as an array (P, P, 3)."""
    ids_keep = kept_patches(image, strategy, ratio)
    visible = torch.zeros(GRID * GRID, dtype=torch.bool).index_fill(0, ids_keep, True).view(GRID, GRID).numpy()
    visible = visible.repeat(PATCH, axis=0).repeat(PATCH, axis=1)[..., None]  # (P, P, 1)
    return np.where(visible, image.permute(1, 2, 0).numpy(), BLANK).astype(np.uint8)


def main(picture: str) -> None:
    """Draws a row for each ratio, and a column for each strategy behind the whole image."""
    torch.manual_seed(0)
    image = EvalTransform(PIXELS)(open_picture(Image.open(picture)))
    strategies = (*MASK_STRATEGIES, EDGES)
    figure = Figure(figsize=(9.6, 3.5), layout="constrained", facecolor="white")
    panels = figure.subplots(len(RATIOS), 1 + len(strategies))
    for ratio, line in zip(RATIOS, panels, strict=True):
        shown = [image.permute(1, 2, 0).numpy(), *(masked(image, strategy, ratio) for strategy in strategies)]
        for panel, pixels in zip(line, shown, strict=True):
            panel.imshow(pixels)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        line[0].set_ylabel(f"{ratio:.0%} dropped")
    for panel, name in zip(panels[0], ("image", *strategies), strict=True):
        panel.set_title(name, fontsize=11)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1])
