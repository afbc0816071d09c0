#!/usr/bin/env python
"""Pre-trains FLIP.

    python scripts/pretrain.py                                           # a small model on the embedded data
    python scripts/pretrain.py vit_b16 --train_data 'my/shards/*.tar'    # a recipe, with values of your own
    accelerate launch scripts/pretrain.py vit_b16 --train_data 'my/shards/*.tar'        # on all GPUs of a machine

`--help` lists all options; recipes lie in scripts/recipes.
"""

import logging
import os
import sys
import traceback
from pathlib import Path

from parse_first import finish_import

from flip_hf.console.endings import end_with
from flip_hf.redaction import install
from flip_hf.training.arguments import Arguments
from flip_hf.training.recipes import parse_arguments


def main() -> None:
    """Parses, builds, trains; what goes wrong ends in one line that says what, and every process ends."""
    install()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        arguments = parse_arguments(sys.argv[1:], Path(__file__).parent / "recipes", default_recipe="shapes")
    except (ValueError, OSError) as error:
        end_with(error)
    finish_import()
    train(arguments)


def train(arguments: Arguments) -> None:
    """Builds a run and trains."""
    from flip_hf.training.build import MISTAKES, build_trainer
    from flip_hf.training.failures import explain, is_clear, lost_another
    from flip_hf.training.resume import RunFinished

    rank = int(os.environ.get("RANK", "0"))
    count = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        trainer = build_trainer(arguments)
    except RunFinished as finished:
        return print(finished) if rank == 0 else None
    except MISTAKES as error:
        end_with(error)
    try:
        trainer.run()
    except Exception as error:
        if lost_another(error):
            why = str(error).splitlines()[0][:200]
            sys.exit(f"Process {rank} of {count} ends: it lost another one, whose message says why ({why}).")
        if not is_clear(error):
            traceback.print_exc()
        end_with(explain(error, arguments, rank, count))


if __name__ == "__main__":
    main()
