"""Classifies images by labels of your own, and prints the answer as a person reads it.

flip-hf zero-shot runs/shapes photo.jpg --labels "red circle" "blue square"
flip-hf zero-shot runs/shapes *.jpg --labels "red circle" "blue square" --template clip_80
"""

import argparse
from collections.abc import Sequence
from typing import Any

from flip_hf.console.endings import MISTAKE, end_with
from flip_hf.console.parsers import ScriptParser
from flip_hf.evaluation.templates import check_labels, resolve_templates
from flip_hf.redaction import install

BAR_WIDTH = 30


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ScriptParser(prog="flip-hf zero-shot", description="Classifies images by labels of your own.")
    parser.add_argument("model", help="folder or Hub id of a FLIP or CLIP model")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--labels", nargs="+", required=True, help="what may be in the image")
    parser.add_argument("--template", default="a photo of a {}.", help="prompt, {} is the label; or clip_7, clip_80")
    return parser


def format_answer(path: str, scores: list[dict]) -> str:
    """One line a label, best first, with a bar."""
    width = max(len(entry["label"]) for entry in scores)
    lines = [
        f"  {entry['label']:<{width}}  {entry['score']:6.1%}  {'█' * round(BAR_WIDTH * entry['score'])}"
        for entry in scores
    ]
    return "\n".join([f"{path}: {scores[0]['label']}", *lines])


def answer(arguments: argparse.Namespace) -> Any:
    """The scores of all labels for each image; what is wrong with an image or the model ends in one line."""
    from transformers.utils import logging

    from flip_hf import ZeroShotClassifier
    from flip_hf.data.decode import open_picture

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        for path in arguments.images:  # before the model is loaded; they are not kept, as they may be many
            open_picture(path)
        classify = ZeroShotClassifier.from_pretrained(arguments.model)
        return classify(arguments.images, arguments.labels, arguments.template)
    except (OSError, ValueError) as error:
        end_with(error)


def main(argv: Sequence[str]) -> None:
    """Loads the model once and answers for each image."""
    install()
    arguments = make_parser().parse_args(argv)
    try:
        check_labels(arguments.labels)
        resolve_templates(arguments.template)
    except ValueError as error:
        end_with(error, MISTAKE)
    answers = answer(arguments)
    for path, scores in zip(arguments.images, answers, strict=True):
        print(format_answer(path, scores))
