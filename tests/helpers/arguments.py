"""The arguments of a run, as the command line of `flip-hf pretrain` gives them."""

from flip_hf.training.arguments import Arguments
from flip_hf.training.recipes import parse_arguments


def parse(*argv: object) -> Arguments:
    return parse_arguments([str(word) for word in argv])
