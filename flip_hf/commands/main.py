"""The entry of `flip-hf`: chooses the subcommand, and leaves its options to it.

A subcommand is imported when it is named, and imports torch and Transformers when its options are right.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from flip_hf import __version__
from flip_hf.console.endings import MISTAKE, end_with
from flip_hf.console.parsers import nearest
from flip_hf.console.program import PROGRAM

# What each does; its module has its name, with underscores.
COMMANDS = {
    "pretrain": "train a model on image-text pairs, or on images alone",
    "data": "check a data set before training, or write it as shuffled shards",
    "evaluate": "measure a model: zero-shot, retrieval, probes, fine-tuning",
    "zero-shot": "classify images by labels of your own",
    "embed": "encode a data set into files of features",
    "search": "find pictures of an encoded data set by texts or pictures",
    "convert": "convert models of CLIP, open_clip, the official FLIP and ViTMAE, and back",
    "interpolate": "mix a model with what it was fine-tuned to, and measure the models between",
    "reconstruct": "draw what a model with a decoder reconstructs of masked images",
    "push": "publish a model folder on the Hub",
    "demo": "serve a page to try a model on, or write it as a Space",
    "plan": "plan memory, time, data and cost of a run on hardware that is not at hand",
    "benchmark": "measure speed against other libraries, in one run on this machine",
    "reproduce": "put the paper's claims to the test at a small scale",
    "env": "print the versions and the hardware that a bug report needs",
}
# Of what a plain `pip install flip_hf` leaves out, the module that is imported, and the extra that has it.
EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "evaluate", "matplotlib"), "train"),
    **dict.fromkeys(("scipy", "sklearn", "tensorboard", "tqdm"), "train"),
    "faiss": "search",
    "gradio": "demo",
}


def usage() -> str:
    """The text of `flip-hf --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [--OPTION VALUE ...]",
            "",
            "CLIP pre-training on masked images, for PyTorch and Transformers.",
            "",
            "commands:",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` lists the options of a command; `{PROGRAM} --version` prints the version.",
            "On several GPUs: `accelerate launch -m flip_hf pretrain ...`.",
        ]
    )


def _refuse(word: str) -> NoReturn:
    known = [*COMMANDS, "--help", "--version"]
    near = nearest(word.replace("_", "-"), known)
    end_with(f"there is no command {word!r}.{near} `{PROGRAM} --help` lists the commands.", MISTAKE)


def _run(command: str, words: list[str]) -> None:
    try:
        import_module(f"flip_hf.commands.{command.replace('-', '_')}").main(words)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "")
        if extra is None:
            raise
        end_with(f"`{PROGRAM} {command}` needs {error.name}, which is not installed: pip install 'flip_hf[{extra}]'.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand; without one, prints which there are.

    Args:
        argv: the words behind the program's name; those of this process if None.
    """
    command, *words = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in ("--help", "-h"):
        print(usage())
    elif command == "--version":
        print(f"flip_hf {__version__}")
    elif command in COMMANDS:
        _run(command, words)
    else:
        _refuse(command)
