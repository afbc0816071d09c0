#!/usr/bin/env python
"""Checks a data set before training, or writes it as shuffled shards.

python scripts/data.py check 'shards/{00000..00999}.tar' checks/web
python scripts/data.py shard my/images sharded --format parquet --resize 256
"""

import sys

from flip_hf.commands.data import main

if __name__ == "__main__":
    main(sys.argv[1:])
