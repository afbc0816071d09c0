#!/usr/bin/env python
"""Measures a model of CLIP's kind (FLIP, CLIPModel, SigLIP), or a vision tower that FLIP or MAE trained.

    accelerate launch scripts/evaluate.py MODEL --datasets clip27 robustness
    accelerate launch scripts/evaluate.py MODEL --tasks retrieval --datasets retrieval --data_dir copies
    accelerate launch scripts/evaluate.py MODEL --tasks zero-shot linear-probe few-shot --data my/folder \\
        --train_split train --class_names classes.txt
    accelerate launch scripts/evaluate.py TOWER --tasks linear-probe fine-tune --probe mae --data my/folder ...
    python scripts/evaluate.py --list                        # known data sets, their groups and metrics

`--help` lists all options. Results are printed as a table and written as JSON, Markdown and pictures.
"""

import os
import sys

# The library of metrics has this file's name, and this folder, which may be a link, comes before it.
sys.path = [path for path in sys.path if os.path.realpath(path) != os.path.dirname(os.path.realpath(__file__))]

import flip_hf  # noqa: E402, F401  (makes Transformers know FLIP)
from flip_hf.evaluation.command import main  # noqa: E402

if __name__ == "__main__":
    main()
