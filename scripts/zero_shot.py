#!/usr/bin/env python
"""Classifies images by labels of your own, and prints the answer as a person reads it.

python scripts/zero_shot.py runs/shapes photo.jpg --labels "red circle" "blue square"
python scripts/zero_shot.py runs/shapes *.jpg --labels "red circle" "blue square" --template clip_80
"""

import argparse
from typing import Any

from transformers.utils import logging

from flip_hf import ZeroShotClassifier
from flip_hf.console.endings import end_with
from flip_hf.console.parsers import ScriptParser
from flip_hf.data.decode import open_picture
from flip_hf.redaction import install

BAR_WIDTH = 30


def make_parser() -> argparse.ArgumentParser:
    """The script's options."""
    parser = ScriptParser(description="Zero-shot classification of images.")
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


def main() -> None:
    """Loads the model once and answers for each image."""
    install()
    arguments = make_parser().parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        for path in arguments.images:  # before the model is loaded; they are not kept, as they may be many
            open_picture(path)
        classify = ZeroShotClassifier.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        end_with(error)
    try:
        answers: Any = classify(arguments.images, arguments.labels, arguments.template)
    except ValueError as error:
        end_with(error)
    for path, scores in zip(arguments.images, answers, strict=True):
        print(format_answer(path, scores))


if __name__ == "__main__":
    main()
