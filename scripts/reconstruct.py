#!/usr/bin/env python
"""Draws images, what a mask leaves of them, and what a model with a decoder (FlipForPreTraining) makes of that.

python scripts/reconstruct.py runs/mae photo.jpg
python scripts/convert.py vit-mae facebook/vit-mae-base models/mae --decoder
python scripts/reconstruct.py models/mae *.jpg --mask_ratios 0.75 --output mae.png
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoConfig, AutoImageProcessor
from transformers.utils import logging

from flip_hf import FlipForPreTraining, FlipPreTrainingConfig
from flip_hf.evaluation.reconstruction import plot_reconstructions


def make_parser() -> argparse.ArgumentParser:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a FlipForPreTraining with its image processor")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--mask_ratios", nargs="+", type=float, default=[0.5, 0.75, 0.9], help="patches dropped")
    parser.add_argument("--output", type=Path, default=Path("reconstruction.png"), help="the picture's file")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    return parser


def open_image(path: str) -> Image.Image:
    """The image in colour.

    Raises:
        ValueError: it is none, or cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None


def draw(arguments: argparse.Namespace) -> None:
    """Draws the picture.

    Raises:
        ValueError, OSError: the model, an image or a ratio is none.
    """
    images = [open_image(path) for path in arguments.images]
    config = AutoConfig.from_pretrained(arguments.model)
    if not isinstance(config, FlipPreTrainingConfig):
        raise ValueError(
            f"{arguments.model} is a checkpoint of type {config.model_type!r}, which has no decoder; expected a "
            "FlipForPreTraining."
        )
    image_processor = AutoImageProcessor.from_pretrained(arguments.model)
    model = FlipForPreTraining.from_pretrained(arguments.model, use_safetensors=True).eval()
    torch.manual_seed(arguments.seed)
    plot_reconstructions(model, image_processor, images, arguments.mask_ratios, arguments.output)


def main() -> None:
    """Draws the picture, or ends with a sentence that says why not."""
    arguments = make_parser().parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        draw(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output}: {len(arguments.images)} images at mask ratios {arguments.mask_ratios}")


if __name__ == "__main__":
    main()
