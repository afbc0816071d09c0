#!/usr/bin/env python
"""Draws images, what a mask leaves of them, and what a model with a decoder (FlipForPreTraining) makes of that.

python scripts/reconstruct.py runs/mae photo.jpg
python scripts/convert.py vit-mae facebook/vit-mae-base models/mae --decoder
python scripts/reconstruct.py models/mae *.jpg --mask_ratios 0.75 --output mae.png

Of a data set it also measures the error on the dropped patches, beside those of two fillings that are not learned: each
patch's mean colour, which only an oracle knows, and the nearest visible patch.

python scripts/reconstruct.py runs/mae --data shapes --baselines
python scripts/reconstruct.py runs/mae --data my/images --split validation --samples 5000
"""

import sys

from flip_hf.commands.reconstruct import main

if __name__ == "__main__":
    main(sys.argv[1:])
