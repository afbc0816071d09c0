"""Measures how many samples a second one worker of the training loader makes of a data set."""

import logging
import time
from contextlib import closing
from functools import partial

from flip_hf.data.loader import TrainLoader
from flip_hf.data.reading import Reader
from flip_hf.data.refusals import BadDataError
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.sources import Source
from flip_hf.data.stream import PatchPlan, TrainStream, View
from flip_hf.data.transforms import TrainTransform
from flip_hf.modeling.masking_flip import cut_patches, random_masking

PATCH_SIZE = 16
_MASK_RATIO = 0.5
_BATCH = 64
# Batches that are ready before the clock runs: DataLoader's two, and the one being made.
_READY = 3
# Rows shuffled together, few enough that reading a block is a small part of the time.
_BLOCK = 256
# Of a few usable samples among millions, a batch takes hours.
_MAX_BAD = 0.9


def loader_rate(source: Source, image_size: int, seconds: float, background: Colour = WHITE) -> float | None:
    """Measures the samples a second of one worker: read, decoded, cropped as in FLIP, cut into visible patches.

    Captions are drawn, but not tokenized, which takes about a hundredth of the time that a photograph does.

    Args:
        source: the data.
        image_size: side to which crops are resized, a multiple of [`PATCH_SIZE`], in pixels.
        seconds: duration of the measurement.
        background: colour of transparent parts.

    Returns:
        The rate; None if the data have nothing to train on, or next to nothing.
    """
    patches = (image_size // PATCH_SIZE) ** 2
    draw = partial(random_masking, num_patches=patches, mask_ratio=_MASK_RATIO, device="cpu")
    view = View(image_size, draw)
    plan = PatchPlan(
        TrainTransform(background=background), partial(cut_patches, patch_size=PATCH_SIZE), lambda samples: view
    )
    stream = TrainStream(
        [source],
        plan,
        None,
        batch_size=_BATCH,
        process=Reader(0, 1),
        seed=0,
        shuffle_block=_BLOCK,
        max_bad_fraction=_MAX_BAD,
    )
    loader = TrainLoader(stream, num_workers=1, pin_memory=False)
    refusals = logging.getLogger("flip_hf.data.refusals")
    level = refusals.level
    refusals.setLevel(logging.ERROR)  # the check counts and names them
    try:
        with closing(iter(loader)) as batches:
            for _ in range(_READY + 1):
                next(batches)
            start = time.perf_counter()
            taken = 0
            while time.perf_counter() - start < seconds:
                next(batches)
                taken += 1
            return taken * _BATCH / (time.perf_counter() - start)
    except BadDataError:
        return None
    finally:
        refusals.setLevel(level)
