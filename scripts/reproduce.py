#!/usr/bin/env python
"""Reproduces the paper's Figure 1 and Table 1 at a small scale, on embedded data.

    python scripts/reproduce.py                     # on two CPU cores: hours; --budget 20 for a look in minutes
    python scripts/reproduce.py --figures_only      # figures and tables again, from the JSON files alone
    python scripts/reproduce.py --only mask75-half  # some of the runs

`--help` explains the budget; `flip_hf/commands/reproduce.py` says more.
"""

import sys

from flip_hf.commands.reproduce import main

if __name__ == "__main__":
    main(sys.argv[1:])
