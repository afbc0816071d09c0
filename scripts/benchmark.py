#!/usr/bin/env python
r"""Measures speed as ratios against a peer, in one run, on this machine.

    python scripts/benchmark.py step --repeats 5
    python scripts/benchmark.py step --device cuda --precision bf16 --architecture L/16 --batch_size 256 --repeats 20 \
        --compile --peers open_clip open_clip-strong clip
    python scripts/benchmark.py inference --repeats 7
    python scripts/benchmark.py zero-shot --repeats 3
    python scripts/benchmark.py loss --repeats 3
    python scripts/benchmark.py loader --batch_size 128
    python scripts/benchmark.py end-to-end --device cuda --precision bf16 --architecture L/16 --batch_size 256 \
        --mask_ratios 0.75 --steps 50 --compile
    python scripts/benchmark.py mae --architecture L/16 --batch_size 8 --repeats 5
    python scripts/benchmark.py mae --device cuda --precision bf16 --architecture L/16 --batch_size 128 --repeats 20
    python scripts/benchmark.py loss --device cuda --pairs 512 4096 32768 65536 --tile_sizes 2048 4096 8192

`step` is a whole training step (forward, loss, backward, AdamW) at several mask ratios: FLIP, open_clip as installed
and as strong as it can be made, and Transformers' CLIPModel, all of the same shapes on the same images and texts.
`inference` is the features of whole images and texts, of the same models. `zero-shot` is the classification of images
by 1,000 labels with a tiny model: ZeroShotClassifier, its labels encoded, and Transformers' pipeline on the same model.
`loss` is the time and the peak memory of the contrastive loss and its gradient: in tiles, as a user writes it with the
whole matrix, and open_clip's where that is installed. `loader` is how many samples one worker process makes of tar
shards: ours at several mask ratios, and open_clip's own pipeline where that is installed. `end-to-end` runs the
training programs themselves on such shards, ours and open_clip's, and says how long their steps wait for data. `mae` is
a training step of MAE, encoder and decoder, at several mask ratios against full images with the same decoder, and
Transformers' ViTMAEForPreTraining.
Candidates take turns, so that a machine whose speed drifts drifts for all; medians and ratios are printed, and written
as JSON and Markdown under scripts/results.
"""

import sys

from flip_hf.commands.benchmark import main

if __name__ == "__main__":
    main(sys.argv[1:])
