"""Measures a model of CLIP's kind (FLIP, CLIPModel, SigLIP), or a vision tower that FLIP or MAE trained.

    flip-hf evaluate MODEL --datasets clip27 robustness
    flip-hf evaluate MODEL --tasks retrieval --datasets retrieval --data_dir copies
    flip-hf evaluate MODEL --tasks zero-shot linear-probe few-shot --data my/folder \\
        --train_split train --class_names classes.txt
    flip-hf evaluate TOWER --tasks linear-probe fine-tune --probe mae --data my/folder ...
    flip-hf evaluate --list                        # known data sets, their groups and metrics

`--help` lists all options. Results are printed as a table and written as JSON, Markdown and pictures.
"""

from collections.abc import Sequence

from flip_hf.console.endings import end_with
from flip_hf.console.program import command_line
from flip_hf.evaluation.options import list_data_sets, parse_command
from flip_hf.redaction import install


def main(argv: Sequence[str]) -> None:
    """Parses, then measures; a mistake ends in one line."""
    install()
    if list(argv) == ["--list"]:
        return list_data_sets()
    try:
        model, options = parse_command(list(argv))
    except (ValueError, OSError) as error:
        end_with(error)
    from flip_hf.evaluation.command import run

    run(model, options, command_line("evaluate", argv))
