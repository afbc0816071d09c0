#!/usr/bin/env python
"""Interpolates between the weights of two models, such as a CLIP and what it was fine-tuned to (WiSE-FT).

python scripts/interpolate.py openai/clip-vit-base-patch16 runs/mine --alpha 0.5 --output_dir models/between
python scripts/interpolate.py openai/clip-vit-base-patch16 runs/mine --alpha 0 0.25 0.5 0.75 1 \
    --output_dir runs/curve --data my/images --retain_data other/images
"""

import sys

from flip_hf.commands.interpolate import main

if __name__ == "__main__":
    main(sys.argv[1:])
