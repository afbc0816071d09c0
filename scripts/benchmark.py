#!/usr/bin/env python
"""Measures speed as ratios against a peer, in one run, on this machine.

    python scripts/benchmark.py step --repeats 5
    python scripts/benchmark.py loss --device cuda --pairs 512 4096 32768 65536 --tile_sizes 2048 4096 8192

`flip_hf/commands/benchmark.py` describes every question, with a command for each.
"""

import sys

from flip_hf.commands.benchmark import main

if __name__ == "__main__":
    main(sys.argv[1:])
