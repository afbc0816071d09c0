#!/usr/bin/env python
"""Plans a run on hardware that is not at hand: memory, time, data, network, cost.

    python scripts/plan.py vit_l16 --gpu H100-SXM --gpus 8 --nodes 4
    python scripts/plan.py vit_b16 --gpu A100-80GB --mfu scripts/results/step_vit_b16_a100.json --batch_size 16384
    python scripts/plan.py --check                # plan against measurement, on the device at hand

RECIPE and all options of pretrain.py are understood. What is assumed is printed below the tables.
"""

import sys

from flip_hf.commands.plan import main

if __name__ == "__main__":
    main(sys.argv[1:])
