#!/usr/bin/env python
"""Measures a model of CLIP's kind (FLIP, CLIPModel, SigLIP), or a vision tower that FLIP or MAE trained.

    python scripts/evaluate.py MODEL --datasets clip27 robustness
    python scripts/evaluate.py MODEL --tasks retrieval --datasets retrieval --data_dir copies
    python scripts/evaluate.py MODEL --tasks zero-shot linear-probe few-shot --data my/folder \\
        --train_split train --class_names classes.txt
    python scripts/evaluate.py TOWER --tasks linear-probe fine-tune --probe mae --data my/folder ...
    python scripts/evaluate.py --list                        # known data sets, their groups and metrics

`--help` lists all options. Results are printed as a table and written as JSON, Markdown and pictures.
"""

import os
import sys

from parse_first import finish_import

# The library of metrics has this file's name, and this folder, which may be a link, comes before it.
sys.path = [path for path in sys.path if os.path.realpath(path) != os.path.dirname(os.path.realpath(__file__))]

from flip_hf.console.endings import end_with  # noqa: E402
from flip_hf.evaluation.options import list_data_sets, parse_command  # noqa: E402
from flip_hf.redaction import install  # noqa: E402


def main() -> None:
    """Parses, then measures; a mistake ends in one line."""
    install()
    if sys.argv[1:] == ["--list"]:
        return list_data_sets()
    try:
        model, options = parse_command(sys.argv[1:])
    except (ValueError, OSError) as error:
        end_with(error)
    finish_import()
    from flip_hf.evaluation.command import run

    run(model, options)


if __name__ == "__main__":
    main()
