#!/usr/bin/env python
"""Pre-trains FLIP.

    python scripts/pretrain.py                                           # a small model on the embedded data
    python scripts/pretrain.py vit_b16 --train_data 'my/shards/*.tar'    # a recipe, with values of your own
    accelerate launch scripts/pretrain.py vit_b16 --train_data 'my/shards/*.tar'        # on all GPUs of a machine

`--help` lists all options and names the recipes. `flip-hf pretrain` is the same.
"""

import sys

from flip_hf.commands.pretrain import main

if __name__ == "__main__":
    main(sys.argv[1:])
