"""What a run may have cost the climate: power x time x the grid's carbon, with everything that is assumed said.

The form is that of Lacoste et al. 2019 (https://arxiv.org/abs/1910.09700).
"""

from dataclasses import dataclass
from typing import Any

# The mean of the world's electricity in 2023: Ember, Global Electricity Review 2024.
GRID = 0.48
GRID_SOURCE = "the world's mean of 2023 (Ember, Global Electricity Review 2024)"


@dataclass(frozen=True)
class Compute:
    """What a run was computed on.

    Attributes:
        seconds: of training, without evaluation and checkpoints.
        device: its name; None if it was not written down.
        processes: devices, one a process.
        watts: of a device at most, by its data sheet; None if that is not known.
    """

    seconds: float
    device: str | None
    processes: int | None
    watts: float | None

    @classmethod
    def from_results(cls, results: dict[str, Any]) -> "Compute | None":
        """From a run's `results.json`; None if it does not say how long it took."""
        if "seconds" not in results:
            return None
        hardware = results.get("hardware", {})
        return cls(results["seconds"], *(hardware.get(name) for name in ("device", "processes", "watts")))

    @property
    def duration(self) -> str:
        hours = self.seconds / 3600
        return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"

    @property
    def device_hours(self) -> float | None:
        return None if self.processes is None else self.processes * self.seconds / 3600

    @property
    def kilowatt_hours(self) -> float | None:
        if self.device_hours is None or self.watts is None:
            return None
        return self.device_hours * self.watts / 1000

    @property
    def kilograms(self) -> float | None:
        """CO2 equivalent."""
        return None if self.kilowatt_hours is None else self.kilowatt_hours * GRID

    def estimate(self) -> str:
        """The estimate in words, or what it would take."""
        if self.kilograms is None:
            missing = "the devices were not written down" if self.processes is None else "the power is not known"
            return (
                f"Not estimated: {missing}. In the form of [Lacoste et al.](https://arxiv.org/abs/1910.09700) it is "
                f"devices x hours x power of a device x carbon of the electricity, {GRID:g} kg a kWh where nothing "
                f"better is known: {GRID_SOURCE}."
            )
        return (
            f"About **{self.kilograms:.2g} kg of CO2 equivalent**, in the form of "
            f"[Lacoste et al.](https://arxiv.org/abs/1910.09700): {self.processes} x {self.duration} "
            f"x {self.watts:g} W = {self.kilowatt_hours:.3g} kWh, at {GRID:g} kg a kWh. Assumed: every device drew all "
            f"of the power of its data sheet all of the time; the electricity is {GRID_SOURCE}. Not counted: the "
            "machine around the devices, cooling, evaluation, and runs that came before this one."
        )
