"""Serves a page to try a model on: labels for an image, images for a text, masks, reconstruction.

    flip-hf demo runs/shapes
    flip-hf demo openai/clip-vit-base-patch16 --images photos --server_port 7860
    flip-hf demo runs/shapes --space my-space     # a folder that is a Space: `hf upload`, `--repo-type space`

MODEL is a FlipModel, a CLIPModel (no masks) or a FlipForPreTraining (reconstruction, too). It takes
`pip install -e ".[demo]"`.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from flip_hf.console.endings import end_with
from flip_hf.console.files import try_folder
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.ranges import integer
from flip_hf.redaction import install


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ScriptParser(
        prog="flip-hf demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id")
    parser.add_argument("--images", metavar="FOLDER", help="pictures to search; the embedded test images if not given")
    parser.add_argument(
        "--server_port",
        type=integer(1, 65535),
        help="port of the page; 7860, or the next one that is free, if not given",
    )
    parser.add_argument("--share", action="store_true", help="also serve it on a public link, through Gradio's tunnel")
    parser.add_argument(
        "--space", metavar="OUT", type=Path, help="write the page as a Space into this folder, and stop there"
    )
    parser.add_argument(
        "--license", help="licence identifier for the Space's card; that of the model's card if not given"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Serves the page or writes the Space; a mistake ends in one line."""
    install()
    options = make_parser().parse_args(argv)
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    open_page(options)


def open_page(options: argparse.Namespace) -> None:
    """Serves the page or writes the Space."""
    from flip_hf.conversion.folder import new_folder
    from flip_hf.demo.model import DemoModel
    from flip_hf.demo.page import make_page, serve
    from flip_hf.demo.search import embedded_pictures, pictures_below
    from flip_hf.demo.space import write_space

    try:
        if options.space is not None:
            try_folder(options.space, "--space")
            with new_folder(options.space) as folder:
                write_space(folder, options.model, images=options.images, license=options.license)
            print(f"{options.space}: a Space; `hf upload OWNER/NAME {options.space} --repo-type space`")
            return
        pictures = embedded_pictures() if options.images is None else pictures_below(options.images)
        serve(
            make_page(DemoModel.from_pretrained(options.model), pictures),
            server_port=options.server_port,
            share=options.share,
        )
    except (OSError, ValueError) as error:
        end_with(error)
