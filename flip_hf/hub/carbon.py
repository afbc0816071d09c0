"""Estimates the carbon footprint of a run, power x time x carbon intensity, with all assumptions stated.

The formula is that of Lacoste et al. 2019 (https://arxiv.org/abs/1910.09700).
"""

from dataclasses import dataclass

from flip_hf.console.json_types import JsonObject

# World average for electricity in 2023, in kg per kWh: Ember, Global Electricity Review 2024.
GRID = 0.48
GRID_SOURCE = "the world average of 2023 (Ember, Global Electricity Review 2024)"


@dataclass(frozen=True)
class Compute:
    """The hardware and time of a run.

    Attributes:
        seconds: training time, without evaluation and checkpoints.
        device: name of the device; None if it was not recorded.
        processes: number of devices, one per process.
        watts: maximum power of a device, by its data sheet; None if unknown.
    """

    seconds: float
    device: str | None
    processes: int | None
    watts: float | None

    @classmethod
    def from_results(cls, results: JsonObject) -> "Compute | None":
        """Makes a `Compute` from a run's `results.json`, or returns None if it has no training time."""
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
        """Estimated kilograms of CO2 equivalent."""
        return None if self.kilowatt_hours is None else self.kilowatt_hours * GRID

    def estimate(self) -> str:
        """Describes the estimate, or what is missing for one."""
        if self.kilograms is None:
            missing = "the devices were not recorded" if self.processes is None else "the power is not known"
            return (
                f"Not estimated: {missing}. By the formula of [Lacoste et al.](https://arxiv.org/abs/1910.09700) it is "
                f"devices x hours x power of a device x carbon intensity of the electricity, {GRID:g} kg per kWh if "
                f"nothing better is known: {GRID_SOURCE}."
            )
        return (
            f"About **{self.kilograms:.2g} kg of CO2 equivalent**, by the formula of "
            f"[Lacoste et al.](https://arxiv.org/abs/1910.09700): {self.processes} x {self.duration} "
            f"x {self.watts:g} W = {self.kilowatt_hours:.3g} kWh, at {GRID:g} kg per kWh. This assumes that every "
            f"device drew the full power of its data sheet all the time, and that the electricity is {GRID_SOURCE}. It "
            "does not include the rest of the machine, cooling, evaluation, or earlier runs."
        )
