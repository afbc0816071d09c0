"""A tiny CLIP, and two shards of pictures with captions, one of which is damaged."""

from pathlib import Path

import pytest

from tests.helpers.clip_folder import make_clip_folder
from tests.helpers.pairs import write_tar


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval") / "clip"
    make_clip_folder(folder)
    return folder


@pytest.fixture(scope="session")
def tars(tmp_path_factory, samples) -> Path:
    """31 and 29 samples, so that their last blocks are not full; the sample of row 5 has no picture."""
    folder = tmp_path_factory.mktemp("tars")
    shown = [(key, b"no picture" if key == "00005" else image, caption) for key, image, caption in samples]
    write_tar(folder / "0.tar", shown[:31])
    write_tar(folder / "1.tar", shown[31:60])
    return folder
