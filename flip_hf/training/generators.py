"""The state of torch's random generators: taken before a pass, and restored to draw the same again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator_state(device: torch.device) -> list[torch.Tensor]:
    """Returns the state of torch's generators on the CPU and on `device`."""
    if device.type == "cpu":
        return [torch.get_rng_state()]
    which = () if device.type == "mps" else (device,)  # torch.mps knows one device
    return [torch.get_rng_state(), torch.get_device_module(device).get_rng_state(*which)]


def _set_generator_state(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        which = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(state[1], *which)


@contextmanager
def restored_generators(state: list[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Sets torch's generators to `state`, and back to what they were at the end."""
    before = generator_state(device)
    _set_generator_state(state, device)
    try:
        yield
    finally:
        _set_generator_state(before, device)
