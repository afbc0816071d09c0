"""Images drawn from all over a data set: folders are sorted by class, and the first images are all of one."""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Any

import torch
from PIL import Image

from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.reading import Place, Reader, read_rows
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.sources import Source

# Maximum number of rows to choose images from: rows that are not decoded are still read.
MAX_ROWS = 2**14
# Side of a picture among many, in pixels.
THUMBNAIL = 160


def _rows(source: Source) -> Iterator[tuple[Place, dict]]:
    return read_rows(source.shards, Reader(0, 1), epoch=0, seed=None, report=lambda *reasons: None)


def spread_places(source: Source, count: int, seed: int, max_rows: int = MAX_ROWS) -> list[Place]:
    """Draws places of rows evenly from the first ones (algorithm R, Vitter 1985), in the data's order.

    Args:
        source: the data.
        count: maximum number of places.
        seed: seed of the draw.
        max_rows: number of rows to read; `count`, if that is more.
    """
    draw = random.Random(seed)
    kept: list[Place] = []
    for number, (place, _) in zip(range(max(count, max_rows)), _rows(source), strict=False):
        if number < count:
            kept.append(place)
        else:
            replaced = draw.randrange(number + 1)
            if replaced < count:
                kept[replaced] = place
    return sorted(kept)


def _batch(images: list[torch.Tensor], places: list[Place], refused: Counter[str]) -> dict[str, Any]:
    targets = [None] * len(images)
    return {"images": torch.stack(images), "targets": targets, "places": places, "refused": dict(refused)}


def batches_at(
    source: Source,
    places: list[Place],
    transform: Callable[[Image.Image], torch.Tensor],
    batch_size: int,
    background: Colour = WHITE,
) -> Iterator[dict[str, Any]]:
    """Yields batches of the images (B, ...) at some places, without targets, like `EvalStream`.

    `refused` counts images that could not be decoded since the last batch, by reason.
    """
    wanted = set(places)
    images: list[torch.Tensor] = []
    found: list[Place] = []
    refused: Counter[str] = Counter()
    for place, row in _rows(source):
        if not wanted:
            break
        if place not in wanted:
            continue
        wanted.remove(place)
        try:
            images.append(transform(decode_image(source.image(row), background)))
            found.append(place)
        except RefusedSample as error:
            refused[error.reason] += 1
        if len(found) == batch_size:
            yield _batch(images, found, refused)
            images = []
            found = []
            refused = Counter()
    if found:
        yield _batch(images, found, refused)


def pictures_at(
    source: Source, places: Collection[Place], side: int, background: Colour = WHITE
) -> dict[Place, Image.Image]:
    """Decodes the pictures at some places, and shrinks each to a thumbnail that many can be held of.

    Each shard is read from its first place to its last one alone.

    Args:
        source: the data.
        places: shard and row of each picture.
        side: the thumbnails' longer side, in pixels, at most.
        background: colour of transparent parts.

    Returns:
        The thumbnails; of pictures that cannot be decoded, or are no longer there, it has none.
    """
    found: dict[Place, Image.Image] = {}
    for shard in sorted({shard for shard, _ in places}):
        wanted = {place for place in places if place[0] == shard}
        rows = read_rows(
            source.shards,
            Reader(0, 1),
            epoch=0,
            seed=None,
            start=min(wanted),
            stop=shard + 1,
            report=lambda *reasons: None,
        )
        for place, row in rows:
            if place in wanted:
                wanted.remove(place)
                with suppress(RefusedSample):
                    found[place] = decode_image(source.image(row), background)
                    found[place].thumbnail((side, side))
            if not wanted:
                break
    return found
