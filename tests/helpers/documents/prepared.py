"""Preparations in a program's process before its first line: the Hub is on this machine, and benchmarks are small."""

import os
import sys
from functools import partial

from huggingface_hub import constants

HUB = "DOCS_TEST_HUB"  # the variable with the local server's address


def use_local_hub() -> None:
    """The Hub's client speaks to the server of tests/helpers/hub_server.py; it has read its settings before."""
    constants.ENDPOINT = os.environ[HUB]
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_DISABLE_XET = True


def use_local_hub_to_push() -> None:
    """The same for a program that publishes if its options ask for it, and needs no Hub otherwise."""
    if "--push_to_hub" in sys.argv:
        use_local_hub()


def serve_and_leave() -> None:
    """The page is served in threads, and not until somebody comes to end it."""
    from flip_hf.demo import page

    page.serve = partial(page.serve, prevent_thread_lock=True)


def small_benchmarks() -> None:
    """Every architecture is tiny, data sets are a few images, and nothing is compiled."""
    from flip_hf.benchmarks import loader, models, zero_shot

    for architecture in models.ARCHITECTURES.values():
        architecture.update(vision=(64, 1, 2), text=(64, 1, 2), patch=32, embed=16)
    loader.PER_SHARD = 32
    loader.DISTINCT = 2
    zero_shot.LABELS = 4
    zero_shot.IMAGES = 2
