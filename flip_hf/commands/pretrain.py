"""Pre-trains FLIP.

    flip-hf pretrain                                           # a small model on the embedded data
    flip-hf pretrain vit_b16 --train_data 'my/shards/*.tar'    # a recipe, with values of your own
    accelerate launch -m flip_hf pretrain vit_b16 --train_data 'my/shards/*.tar'        # on all GPUs of a machine

`--help` lists all options and names the recipes.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from flip_hf.console.endings import end_with
from flip_hf.redaction import install
from flip_hf.training.arguments import Arguments
from flip_hf.training.recipes import parse_arguments


def main(argv: Sequence[str]) -> None:
    """Parses, builds, trains; what goes wrong ends in one line that says what, and every process ends."""
    install()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        arguments = parse_arguments(argv)
    except (ValueError, OSError) as error:
        end_with(error)
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
