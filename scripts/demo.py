#!/usr/bin/env python
"""Serves a page to try a model on: labels for an image, images for a text, masks, reconstruction.

    python scripts/demo.py runs/shapes
    python scripts/demo.py openai/clip-vit-base-patch16 --images photos --server_port 7860
    python scripts/demo.py runs/shapes --space my-space     # a folder that is a Space: `hf upload`, `--repo-type space`

MODEL is a FlipModel, a CLIPModel (no masks) or a FlipForPreTraining (reconstruction, too). It takes
`pip install -e ".[demo]"`.
"""

import sys

from flip_hf.commands.demo import main

if __name__ == "__main__":
    main(sys.argv[1:])
