#!/usr/bin/env python
"""Encodes a whole data set, pictures and if asked captions, into parquet files of features.

    python scripts/embed.py runs/mine 'shards/{00000..00999}.tar' features
    python scripts/embed.py openai/clip-vit-base-patch16 my/images features --split test --texts --index flat
    accelerate launch --num_processes 8 scripts/embed.py runs/mine 'shards/{00000..00999}.tar' features

The same command goes on where an earlier one was ended. `search.py` finds pictures in what it writes.
"""

import sys

from flip_hf.commands.embed import main

if __name__ == "__main__":
    main(sys.argv[1:])
