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


def check_several(labels: Sequence[str]) -> None:
    """Checks that labels have an alternative: a single one always gets 100 %.

    Raises:
        ValueError: there is one label; the message shows how to give several, also those that commas separate.
    """
    if len(labels) > 1:
        return
    listed = [each.strip() for each in labels[0].split(",") if each.strip()]
    shown = " ".join(f'"{each}"' for each in (listed if len(listed) > 1 else [*listed, "something else"]))
    raise ValueError(f"--labels are compared with each other, and {labels[0]!r} is only one: give --labels {shown}.")


def format_answer(path: str, scores: list[dict]) -> str:
    """One line a label, best first, with a bar."""
    width = max(len(entry["label"]) for entry in scores)
    lines = [
        f"  {entry['label']:<{width}}  {entry['score']:6.1%}  {'█' * round(BAR_WIDTH * entry['score'])}"
        for entry in scores
    ]
    return "\n".join([f"{path}: {scores[0]['label']}", *lines])


def sort_out(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the paths of usable pictures, and what is wrong with each of the others, in sentences.

    Pictures are decoded for that and not kept, as they may be many.
    """
    from flip_hf.data.decode import open_picture

    usable: list[str] = []
    problems: list[str] = []
    for path in paths:
        try:
            open_picture(path)
            usable.append(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return usable, problems


def answer(arguments: argparse.Namespace, images: list[str]) -> Any:
    """The scores of all labels for each image; what is wrong with the model ends in one line."""
    from transformers.utils import logging

    from flip_hf import ZeroShotClassifier

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        classify = ZeroShotClassifier.from_pretrained(arguments.model)
        return classify(images, arguments.labels, arguments.template)
    except (OSError, ValueError) as error:
        end_with(error)


def main(argv: Sequence[str]) -> None:
    """Loads the model once and answers for each image; those that cannot be used are named at the end, as an error."""
    install()
    arguments = make_parser().parse_args(argv)
    try:
        check_labels(arguments.labels)
        check_several(arguments.labels)
        resolve_templates(arguments.template)
    except ValueError as error:
        end_with(error, MISTAKE)
    images, problems = sort_out(arguments.images)
    answers = answer(arguments, images) if images else []
    for path, scores in zip(images, answers, strict=True):
        print(format_answer(path, scores))
    if problems:
        end_with(" ".join(problems))
