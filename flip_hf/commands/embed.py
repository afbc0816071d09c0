"""Encodes the pictures of a whole data set, and with --texts its captions, into parquet files of features.

    flip-hf embed runs/mine 'shards/{00000..00999}.tar' features
    flip-hf embed openai/clip-vit-base-patch16 my/images features --split test --texts --index flat
    accelerate launch --num_processes 8 -m flip_hf embed runs/mine 'shards/{00000..00999}.tar' features

If it is interrupted, the same command resumes it. `flip-hf search` finds pictures by the features that it writes.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flip_hf.console.endings import INTERRUPTED, end_with
from flip_hf.console.files import try_folder
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.ranges import integer
from flip_hf.redaction import install
from flip_hf.retrieval.options import BATCH_SIZE, INDEX_KINDS, ROWS_PER_FILE, EmbedOptions

if TYPE_CHECKING:
    from flip_hf.retrieval.folder import Manifest


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ScriptParser(
        prog="flip-hf embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub id of a FLIP, CLIP or SigLIP model")
    parser.add_argument("data", help="a data set: a folder, tar or parquet files, lists, or a Hub id")
    parser.add_argument("folder", type=Path, metavar="out", help="folder of the features: new, or from an earlier run")
    parser.add_argument("--revision", help="the model's revision on the Hub: a branch, tag or commit")
    parser.add_argument("--split", default="train", help="split of the data (train)")
    parser.add_argument("--config", help="configuration of the data, on the Hub or in a folder with a card")
    parser.add_argument("--image_column", help="image column; found by its usual names if not given")
    parser.add_argument("--caption_column", help="column of captions or labels; found by its usual names if not given")
    parser.add_argument("--texts", action="store_true", help="encode captions, too")
    parser.add_argument(
        "--batch_size", type=integer(1, 2**16), default=BATCH_SIZE, help=f"pictures encoded at once ({BATCH_SIZE})"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="precision of the model (fp32)")
    parser.add_argument(
        "--workers",
        type=integer(0, 1024),
        help="loader workers per process; chosen by the number of cores if not given",
    )
    parser.add_argument(
        "--rows_per_file",
        type=integer(1, 2**20),
        default=ROWS_PER_FILE,
        help=f"rows of the data in each file ({ROWS_PER_FILE:,}); each worker loses at most these in an interruption",
    )
    parser.add_argument(
        "--index",
        choices=INDEX_KINDS,
        help="also build a FAISS index: flat (exact); or fast and approximate, hnsw (more memory) or ivf (cells)",
    )
    parser.add_argument(
        "--skip_unreadable", action="store_true", help="leave out the parts of shards that cannot be read"
    )
    return parser


def summary(manifest: "Manifest", folder: Path) -> str:
    """Describes the contents of a finished folder in a few lines."""
    captions = f" with {manifest.captions:,} captions" if manifest.captions else ""
    lines = [f"{folder}: {manifest.images:,} pictures{captions} in {len(manifest.files):,} files"]
    if manifest.refused:
        lines.append(f"not usable: {refused_in_words(manifest)}; listed in {folder / 'refused.jsonl'}")
    if manifest.index is not None:
        lines.append(f"index: {manifest.index['kind']}")
    return "\n".join(lines)


def refused_in_words(manifest: "Manifest") -> str:
    """Lists the reasons why samples could not be used, each with its number."""
    return ", ".join(f"{count:,} x {reason}" for reason, count in manifest.refused.items()) or "there is none"


def check_contents(manifest: "Manifest", options: EmbedOptions) -> None:
    """Checks that a finished folder holds what was asked for.

    Raises:
        ValueError: no picture could be used, or no caption where these were to be encoded.
    """
    if not manifest.images:
        raise ValueError(
            f"No picture of {manifest.data['name']!r} could be used: {refused_in_words(manifest)}. If these are not "
            "pictures, name their column with --image_column, and a new folder."
        )
    if options.texts and not manifest.captions:
        raise ValueError(
            f"{manifest.data['name']!r} has no caption that could be encoded; the pictures were. If the wrong column "
            "was read, name the right one with --caption_column, and a new folder."
        )


def main(argv: Sequence[str]) -> None:
    """Encodes, or resumes; a mistake ends in one line, before anything is encoded."""
    install()
    options = EmbedOptions(**vars(make_parser().parse_args(argv)))
    from transformers.utils import logging

    from flip_hf.data.refusals import BadDataError
    from flip_hf.retrieval.embed import embed

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begin = time.monotonic()
    try:
        try_folder(options.folder, "out")
        manifest, is_main = embed(options)
    except (ValueError, OSError, BadDataError) as error:
        end_with(error)
    except KeyboardInterrupt:
        end_with("Interrupted. The same command resumes from here.", INTERRUPTED)
    if is_main:
        print(summary(manifest, options.folder))
        print(f"{time.monotonic() - begin:,.1f} seconds")
        try:
            check_contents(manifest, options)
        except ValueError as error:
            end_with(error)
