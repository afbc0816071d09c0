#!/usr/bin/env python
"""Pre-trains FLIP.

    accelerate launch scripts/pretrain.py                                       # a small model on the embedded data
    accelerate launch scripts/pretrain.py vit_b16 --train_data 'my/shards/*.tar'  # a recipe, with values of your own

`--help` lists all options; recipes lie in scripts/recipes.
"""

import logging
import sys
from pathlib import Path

from flip_hf.data.refusals import BadDataError
from flip_hf.training.build import MISTAKES, build_trainer
from flip_hf.training.health import RunDiverged
from flip_hf.training.recipes import parse_arguments


def main() -> None:
    """Parses, builds, trains; a mistake in arguments or data ends in one line, before training."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        arguments = parse_arguments(sys.argv[1:], Path(__file__).parent / "recipes", default_recipe="shapes")
        trainer = build_trainer(arguments)
    except MISTAKES as error:
        sys.exit(f"error: {error}")
    try:
        trainer.run()
    except (BadDataError, RunDiverged) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
