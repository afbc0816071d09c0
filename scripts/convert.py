#!/usr/bin/env python
"""Converts models to FLIP and back; every source tensor is used, every target tensor filled, or nothing is written.

python scripts/convert.py flip-official flip_large16_laion2b_v2.zip models/flip-l16 --vocab vocab.txt
python scripts/convert.py clip openai/clip-vit-large-patch14 models/flip-from-clip
python scripts/convert.py to-clip models/flip-from-clip models/clip-again
"""

import sys

from flip_hf.commands.convert import main

if __name__ == "__main__":
    main(sys.argv[1:])
