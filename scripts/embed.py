#!/usr/bin/env python
"""Encodes a whole data set, pictures and if asked captions, into parquet files of features.

    python scripts/embed.py runs/mine 'shards/{00000..00999}.tar' features
    python scripts/embed.py openai/clip-vit-base-patch16 my/images features --split test --texts --index flat
    accelerate launch --num_processes 8 scripts/embed.py runs/mine 'shards/{00000..00999}.tar' features

If it is interrupted, the same command resumes it. `search.py` finds pictures by the features that it writes.
"""

import sys

from flip_hf.commands.embed import main

if __name__ == "__main__":
    main(sys.argv[1:])
