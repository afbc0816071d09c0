"""Pairs of images and captions, and the files that they come in."""

import io
import itertools
import tarfile
from pathlib import Path

from flip_hf.data.shapes import generate_train


def shapes_rows(count: int) -> list[dict]:
    """The first rows, at most 512, of the embedded data, without drawing all of them."""
    return list(itertools.islice(generate_train([0], 512, 64, seed=0), count))


def write_tar(path: Path, samples: list[tuple[str, bytes, bytes]]) -> None:
    """Writes (key, jpeg, caption) triples as a WebDataset shard."""
    with tarfile.open(path, "w") as archive:
        for key, image, caption in samples:
            for extension, data in (("jpg", image), ("txt", caption)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
