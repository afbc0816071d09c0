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

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def become_the_library() -> None:
    """Loads the library `evaluate` in place of this file, which hides it from the programs that start in this folder.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    here = Path(__file__).resolve().parent
    spec = PathFinder.find_spec(__name__, [path for path in sys.path if Path(path).resolve() != here])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])


if __name__ == "evaluate":
    become_the_library()
elif __name__ == "__main__":
    from flip_hf.commands.evaluate import main

    main(sys.argv[1:])
