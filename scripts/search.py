#!/usr/bin/env python
"""Finds the pictures of an embedded data set that are nearest to texts or to other pictures.

python scripts/search.py features "a photo of a dog" "two people on a beach"
python scripts/search.py features --image photo.jpg --top 5 --output hits.png
"""

import sys

from flip_hf.commands.search import main

if __name__ == "__main__":
    main(sys.argv[1:])
