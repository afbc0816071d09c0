"""Finds the pictures of an embedded data set that are nearest to texts or to other pictures.

flip-hf search features "a photo of a dog" "two people on a beach"
flip-hf search features --image photo.jpg --top 5 --output hits.png

Each text and each picture is a query of its own. Without an index, a query is compared with every picture.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flip_hf.console.endings import end_with, one_line
from flip_hf.console.parsers import ScriptParser
from flip_hf.console.ranges import integer
from flip_hf.redaction import install

if TYPE_CHECKING:
    from flip_hf.retrieval.search import Hit


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ScriptParser(
        prog="flip-hf search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder that `flip-hf embed` has written")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts to search by")
    parser.add_argument("--image", nargs="+", default=[], help="pictures to search by")
    parser.add_argument("--top", type=integer(1, 10_000), default=10, help="pictures to find for each query (10)")
    parser.add_argument(
        "--output", type=Path, help="image file to draw the pictures found into; needs the data that were embedded"
    )
    parser.add_argument("--model", help="folder or Hub id of the model, if it was moved")
    parser.add_argument("--exact", action="store_true", help="compare with every picture, even if there is an index")
    return parser


def table(query: str, hits: "Sequence[Hit]") -> str:
    """A query and its hits, one a line: score, key, and the first caption; what could drive a terminal is quoted."""
    keys = [one_line(hit.key) for hit in hits]
    width = max(map(len, keys), default=0)
    captions = [one_line(" ".join(hit.captions[:1])) for hit in hits]
    lines = [
        f"  {hit.score:6.3f}  {key:<{width}}  {caption}" for hit, key, caption in zip(hits, keys, captions, strict=True)
    ]
    return "\n".join([one_line(query), *(line.rstrip() for line in lines)])


def answer(arguments: argparse.Namespace) -> None:
    """Prints the hits of each query, and draws them if asked.

    Raises:
        ValueError, OSError: the folder, the model, a picture or the data cannot be used.
    """
    from flip_hf.data.decode import open_picture
    from flip_hf.evaluation.plots import try_picture
    from flip_hf.retrieval.search import EmbeddedData

    if arguments.output is not None:
        try_picture(arguments.output, "--output")
    shown = [*arguments.texts]
    for path in arguments.image:  # before the model is loaded
        picture = open_picture(path)
        picture.thumbnail((512, 512))
        shown.append(picture)
    data = EmbeddedData(arguments.folder, model=arguments.model, exact=arguments.exact)
    found = data.search(data.encode(arguments.texts, arguments.image), arguments.top)
    for query, hits in zip([*arguments.texts, *arguments.image], found, strict=True):
        print(table(query, hits))
    if arguments.output is not None:
        data.draw(shown, found, arguments.output)
        print(arguments.output)


def main(argv: Sequence[str]) -> None:
    """Answers each query; a mistake ends in one line."""
    install()
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if not arguments.texts and not arguments.image:
        parser.error("give texts, or pictures with --image.")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        answer(arguments)
    except (ValueError, OSError) as error:
        end_with(error)
