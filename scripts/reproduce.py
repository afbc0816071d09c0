#!/usr/bin/env python
"""Reproduces the paper's Figure 1 and Table 1 at a small scale, on embedded data.

    python scripts/reproduce.py                     # on two CPU cores: hours; --budget 20 for a look in minutes
    python scripts/reproduce.py --figures_only      # figures and tables again, from the JSON files alone
    python scripts/reproduce.py --only mask75-half  # some of the runs

--budget is the training time of the longest run without masks, in seconds; all other runs are in the paper's
proportions to its number of samples, which is measured once and kept. What has been run is not run again: the same
command goes on where it was stopped. A point's JSON file says by which command it can be run alone.

A GPU needs a model that keeps it busy: --recipe scenes_s16 --budget 150 is for an hour or two on one.
"""

import sys

from flip_hf.commands.reproduce import main

if __name__ == "__main__":
    main(sys.argv[1:])
