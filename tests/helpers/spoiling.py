"""Spoil files as transfers, disks and attackers do."""

import numpy as np


def spoil(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """One to three mutations of a file."""
    spoilt = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        size = max(1, len(spoilt))
        place = int(rng.integers(min(size, 64) if rng.random() < 0.5 else size))  # headers as often as the rest
        length = int(rng.integers(1, max(2, size // 4)))
        kind = rng.integers(7)
        if kind == 0:
            spoilt[place : place + 1] = bytes([int(rng.integers(256))])
        elif kind == 1:
            del spoilt[place : place + length]
        elif kind == 2:
            spoilt[place:place] = spoilt[place : place + length] * int(rng.integers(1, 20))
        elif kind == 3:
            other = others[int(rng.integers(len(others)))]
            spoilt[place:place] = other[: int(rng.integers(len(other))) + 1]
        elif kind == 4:  # a size that is claimed
            number = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF]))
            spoilt[place : place + 4] = number.to_bytes(4, rng.choice(["big", "little"]))
        elif kind == 5:
            del spoilt[place:]
        else:
            spoilt[place : place + length] = rng.bytes(length)
    return bytes(spoilt[: 2 * 2**20])
