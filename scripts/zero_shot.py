#!/usr/bin/env python
"""Classifies images by labels of your own, and prints the answer as a person reads it.

python scripts/zero_shot.py runs/shapes photo.jpg --labels "red circle" "blue square"
python scripts/zero_shot.py runs/shapes *.jpg --labels "red circle" "blue square" --template clip_80
"""

import sys

from flip_hf.commands.zero_shot import main

if __name__ == "__main__":
    main(sys.argv[1:])
