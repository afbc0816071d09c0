"""Draws images, what a mask leaves of them, and what a model with a decoder (FlipForPreTraining) makes of that.

flip-hf reconstruct runs/mae photo.jpg
flip-hf convert vit-mae facebook/vit-mae-base models/mae --decoder
flip-hf reconstruct models/mae *.jpg --mask_ratios 0.75 --output mae.png

On a data set, it also measures the error on the dropped patches, beside two baselines that are not learned: each
patch's mean colour, which the model cannot see, and a copy of the nearest visible patch.

flip-hf reconstruct runs/mae --data shapes --baselines
flip-hf reconstruct runs/mae --data my/images --split validation --samples 5000
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from flip_hf.console.endings import end_with
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.ranges import FRACTION, POSITIVE, SEED
from flip_hf.redaction import install

BATCH_SIZE = 64
DRAWN = 8  # images of a data set in the picture, at most


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ScriptParser(
        prog="flip-hf reconstruct", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub id of a FlipForPreTraining with its image processor")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files; or give --data")
    parser.add_argument("--data", help="a data set: shapes, a folder, tar or parquet files, or a Hub id")
    parser.add_argument("--split", default="test", help="split of --data (test)")
    parser.add_argument("--image_column", help="image column of --data; found by its usual names if not given")
    parser.add_argument("--samples", type=POSITIVE, default=1024, help="images of --data to measure, at most (1024)")
    parser.add_argument(
        "--mask_ratios",
        nargs="+",
        type=FRACTION,
        default=[0.5, 0.75, 0.9],
        help="fractions of the patches dropped (0.5 0.75 0.9)",
    )
    parser.add_argument("--baselines", action="store_true", help="also draw the two baselines")
    parser.add_argument(
        "--output", type=Path, default=Path("reconstruction.png"), help="picture to write (reconstruction.png)"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the masks and of the choice of images (0)")
    return parser


def table(measured: dict[float, dict[str, float]]) -> str:
    """The errors at each mask ratio, in Markdown."""
    lines = [
        "| dropped | model | per-patch mean | nearest visible patch | model / better of the two | images |",
        "|---|---|---|---|---|---|",
    ]
    for ratio, found in measured.items():
        model, mean, nearest, images = found.values()
        cells = [f"{ratio:.0%}", *(f"{error:.4f}" for error in (model, mean, nearest))]
        best = min(mean, nearest)
        share = f"{model / best:.2f}" if best else "-"  # of plain images any filling is right
        lines.append(f"| {' | '.join(cells)} | {share} | {images:,.0f} |")
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> None:
    """Prints the errors on images from all over a data set, and draws some of them.

    Raises:
        ValueError, OSError, BadDataError: the model, the data or a ratio cannot be used.
    """
    from flip_hf.data.processes import make_accelerator
    from flip_hf.data.sources import open_source
    from flip_hf.evaluation.encoder import ImageTransform
    from flip_hf.evaluation.reconstruction import draw_reconstructions, load_pretraining
    from flip_hf.evaluation.reconstruction_error import measure_reconstruction
    from flip_hf.evaluation.spread import batches_at, spread_places

    model, image_processor = load_pretraining(arguments.model)
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError("`flip-hf reconstruct` runs in one process; start it without a launcher.")
    model.to(accelerator.device)
    source = open_source(arguments.data, split=arguments.split, image_column=arguments.image_column, kind="image")
    transform = ImageTransform(image_processor)
    background = transform.background
    places = spread_places(source, arguments.samples, arguments.seed)
    measured = {}
    for ratio in arguments.mask_ratios:
        batches = batches_at(source, places, transform, BATCH_SIZE, background)
        measured[ratio] = measure_reconstruction(model, batches, accelerator, ratio, arguments.seed)
        if not measured[ratio]["images"]:
            raise ValueError(f"No image of {source.name!r} can be used.")
    print(table(measured))
    some = sorted(random.Random(arguments.seed).sample(places, min(DRAWN, len(places))))
    # Where none of those can be decoded, others can: some have been measured.
    drawn = next(batches_at(source, some, transform, DRAWN, background), None)
    shown = drawn or next(batches_at(source, places, transform, DRAWN, background))
    draw_reconstructions(
        model,
        shown["images"].to(accelerator.device),
        arguments.mask_ratios,
        arguments.output,
        statistics=(image_processor.image_mean, image_processor.image_std),
        places=shown["places"],
        seed=arguments.seed,
        baselines=arguments.baselines,
    )


def draw(arguments: argparse.Namespace) -> None:
    """Draws image files.

    Raises:
        ValueError, OSError: the model, an image or a ratio cannot be used.
    """
    from flip_hf.data.decode import open_picture
    from flip_hf.data.rendering import background_of
    from flip_hf.evaluation.reconstruction import load_pretraining, plot_reconstructions

    for path in arguments.images:  # before the model is loaded
        open_picture(path)
    model, image_processor = load_pretraining(arguments.model)
    images = [open_picture(path, background_of(image_processor)) for path in arguments.images]
    options = {"seed": arguments.seed, "baselines": arguments.baselines}
    plot_reconstructions(model, image_processor, images, arguments.mask_ratios, arguments.output, **options)


def main(argv: Sequence[str]) -> None:
    """Draws the picture, or ends with a sentence that says why not."""
    install()
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if bool(arguments.images) == bool(arguments.data):
        parser.error("give image files or --data, one of the two.")
    from transformers.utils import logging

    from flip_hf.data.refusals import BadDataError
    from flip_hf.evaluation.plots import try_picture

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        try_picture(arguments.output, "--output")
        if arguments.images:
            draw(arguments)
        else:
            measure(arguments)
    except (OSError, ValueError, BadDataError) as error:
        end_with(error)
    what = f"{len(arguments.images)} images" if arguments.images else f"images from all over {arguments.data}"
    print(f"{arguments.output}: {what} at mask ratios {arguments.mask_ratios}")
