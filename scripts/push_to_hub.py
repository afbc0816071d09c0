#!/usr/bin/env python
"""Publishes a model folder: model, processor, code, card, recipe, curves, logs and results; private unless asked.

    python scripts/push_to_hub.py runs/shapes you/flip-shapes                       # again: only what has changed
    python scripts/push_to_hub.py runs/shapes you/flip-shapes --dry_run to_upload   # no network: a folder to look at
    python scripts/push_to_hub.py runs/tuned you/clip-tuned --export_clip --public  # a stock CLIPModel, for everyone

FOLDER is what pretrain.py or convert.py left, or a checkpoint. Log in with `hf auth login`, or set HF_TOKEN.
"""

import sys

from flip_hf.commands.push import main

if __name__ == "__main__":
    main(sys.argv[1:])
