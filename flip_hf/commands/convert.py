"""Converts models to FLIP and back; every source tensor is used, every target tensor filled, or nothing is written.

flip-hf convert flip-official flip_large16_laion2b_v2.zip models/flip-l16 --vocab vocab.txt
flip-hf convert clip openai/clip-vit-large-patch14 models/flip-from-clip
flip-hf convert to-clip models/flip-from-clip models/clip-again
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flip_hf.console.endings import FAILURE, end_with
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.ranges import FRACTION, integer
from flip_hf.redaction import install

# Sub-command, what it does, what SOURCE is.
COMMANDS = {
    "flip-official": ("official FLIP (JAX, T5X) to FlipModel", "checkpoint folder, or a zip with one in it"),
    "clip": ("Transformers' CLIPModel to FlipModel", "folder or Hub id"),
    "siglip": ("Transformers' SiglipModel (SigLIP, SigLIP 2 at a fixed resolution) to FlipModel", "folder or Hub id"),
    "open-clip": (
        "open_clip's CLIP, CLIPA, SigLIP or SigLIP 2 to FlipModel",
        "folder or Hub id with open_clip_config.json, or a file of weights",
    ),
    "vit-mae": ("the encoder of Transformers' ViTMAE to a FLIP vision tower", "folder or Hub id"),
    "to-clip": ("FlipModel to a stock CLIPModel", "folder or Hub id of a FlipModel"),
    "to-siglip": ("FlipModel to a stock SiglipModel", "folder or Hub id of a FlipModel"),
    "to-open-clip": ("FlipModel to open_clip", "folder or Hub id of a FlipModel"),
}


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ScriptParser(
        prog="flip-hf convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, (does, source) in COMMANDS.items():
        parsers[name] = command = commands.add_parser(name, help=does, description=does)
        command.add_argument("source", metavar="SOURCE", help=source)
        command.add_argument("output", metavar="OUT", type=Path, help="folder to write; must not exist")
    for name in ("clip", "siglip", "open-clip", "vit-mae"):
        parsers[name].add_argument(
            "--mask_ratio", type=FRACTION, default=0.5, help="fraction of the patches dropped in training (0.5)"
        )
    parsers["vit-mae"].add_argument(
        "--decoder", action="store_true", help="keep the decoder: a FlipForPreTraining with a new text tower"
    )
    official = parsers["flip-official"]
    open_clip = parsers["open-clip"]
    official.add_argument("--vocab", required=True, help="BERT's uncased vocab.txt, or a Hub repository with it")
    official.add_argument(
        "--vision_heads",
        type=integer(1, 4096),
        help="attention heads of the image tower, if the checkpoint does not have a released size",
    )
    official.add_argument("--text_heads", type=integer(1, 4096), help="attention heads of the text tower, likewise")
    official.add_argument(
        "--image_pooling", choices=("mean", "cls"), default="mean", help="pooling of images (mean, as released)"
    )
    official.add_argument(
        "--text_pooling", choices=("first", "mean"), default="first", help="pooling of texts (first, as released)"
    )
    open_clip.add_argument("--model_config", help="JSON of the model's configuration, where SOURCE is a file")
    open_clip.add_argument("--tokenizer", help="folder or Hub id of the tokenizer, where SOURCE has none")
    return parser


def convert(command: str, source: str, folder: Path, options: dict[str, Any]) -> str:
    """Fills the folder; returns what it holds, in words."""
    from flip_hf.conversion.clip import convert_from_clip, convert_to_clip
    from flip_hf.conversion.mae import convert_from_mae
    from flip_hf.conversion.official import convert_official
    from flip_hf.conversion.open_clip import convert_from_open_clip, write_open_clip
    from flip_hf.conversion.siglip import convert_from_siglip, convert_to_siglip

    if command == "to-open-clip":
        write_open_clip(source, folder)
        return "an open_clip model"
    functions = {
        "flip-official": convert_official,
        "clip": convert_from_clip,
        "siglip": convert_from_siglip,
        "open-clip": convert_from_open_clip,
        "vit-mae": convert_from_mae,
        "to-clip": convert_to_clip,
        "to-siglip": convert_to_siglip,
    }
    converted = functions[command](source, **options)
    converted.save(folder)
    return f"a {type(converted.model).__name__} of {converted.model.num_parameters():,} parameters"


def main(argv: Sequence[str]) -> None:
    """Converts one model into a new folder, which appears only when it is whole."""
    install()
    arguments = vars(make_parser().parse_args(argv))
    command, source, output = (arguments.pop(name) for name in ("command", "source", "output"))
    from transformers.utils import logging

    from flip_hf.conversion.folder import new_folder

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.monotonic()
    try:
        with new_folder(output) as folder:
            made = convert(command, source, folder, arguments)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        end_with(str(error) or "There is not enough memory.", FAILURE)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {made}, {size / 1e6:,.1f} MB, in {time.monotonic() - start:.1f} s")
