"""Shards in which damage of twelve kinds, exact duplicates and near ones are planted, and where they are."""

import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from flip_hf.data.decode import decode_image
from tests.helpers import damaged

Place = tuple[int, int]


@dataclass
class Planted:
    """What was planted; places are (shard, row)."""

    samples: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    pairs: set[Place] = field(default_factory=set)
    images: set[Place] = field(default_factory=set)
    near: set[Place] = field(default_factory=set)

    @property
    def usable(self) -> int:
        return self.samples - self.refused.total()


def _encoded_again(members: damaged.Members, number: int) -> damaged.Members:
    """The same picture as another file: at a lower quality, larger, or smaller and as a PNG."""
    pixels = decode_image(members[0][1])
    form = number % 3
    side = (24, 40, 20)[form]
    buffer = io.BytesIO()
    kind = "PNG" if form == 2 else "JPEG"
    pixels.resize((side, side), Image.Resampling.BICUBIC).save(buffer, kind, quality=60)
    return [("png" if form == 2 else "jpg", buffer.getvalue()), ("txt", f"{number:05d} copy".encode())]


def write_planted(folder: Path, shards: int, per_shard: int, bad: int, exact: int, near: int) -> Planted:
    """Writes tar shards, each with so many damaged samples, exact and near duplicates; half of the exact ones have
    captions of their own. The copies are of earlier samples, which have one each."""
    planted = Planted()
    originals: list[int] = []
    kind = 0
    for part in range(shards):
        rng = np.random.default_rng(part)
        # The first rows are sound, so that the first shard, too, has something to copy.
        first = per_shard // 2
        special = iter(first + rng.permutation(per_shard - first))
        roles = {
            int(next(special)): role
            for role, count in (("bad", bad), ("exact", exact), ("near", near))
            for _ in range(count)
        }
        originals += [part * per_shard + row for row in range(first)]
        samples = []
        for row in range(per_shard):
            number = part * per_shard + row
            role = roles.get(row)
            members = damaged.good(number)
            if role == "bad":
                members, reason = damaged.damaged(kind % damaged.KINDS, number)
                planted.refused[reason] += 1
                planted.damage["damaged tar header"] += kind % damaged.KINDS == damaged.KINDS - 1
                kind += 1
            elif role is not None:
                members = damaged.good(originals.pop(int(rng.integers(len(originals)))))
            if role == "exact":
                other = len(planted.pairs) > len(planted.images)
                members = [members[0], ("txt", f"{number:05d} another".encode())] if other else members
                (planted.images if other else planted.pairs).add((part, row))
            elif role == "near":
                members = _encoded_again(members, number)
                planted.near.add((part, row))
            samples.append((f"{number:05d}", members))
        (folder / f"{part:04d}.tar").write_bytes(damaged.shard(samples, cut=True))
        planted.damage["truncated shard"] += 1
    planted.samples = shards * per_shard
    return planted
