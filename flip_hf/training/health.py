"""What keeps a long run well: steps that would spoil the weights are skipped, and a run that is lost goes back."""

import math


class RunDiverged(RuntimeError):
    """Training cannot go on; the message says what was tried and what may help."""


class Health:
    """Watches the gradient.

    A loss or gradient that is not finite makes the norm of the gradient, averaged over the processes, not finite on
    all of them: every process comes to the same answer from its own number.

    Args:
        max_skipped: steps skipped in a row after which the run goes back to its last good checkpoint.
        max_restores: times that it may go back before a new good checkpoint was written.

    Attributes:
        in_a_row: the last steps, all of which were skipped.
        restores: times that the run went back since its last good checkpoint; both are part of a checkpoint.
    """

    def __init__(self, max_skipped: int, max_restores: int = 3):
        self.max_skipped = max_skipped
        self.max_restores = max_restores
        self.in_a_row = 0
        self.restores = 0

    def is_good(self, grad_norm: float) -> bool:
        """Tells whether the step may be taken; counts."""
        good = math.isfinite(grad_norm)
        self.in_a_row = 0 if good else self.in_a_row + 1
        return good

    def is_lost(self) -> bool:
        """Tells whether so many steps in a row were skipped that the weights themselves must be taken for spoilt.

        Raises:
            RunDiverged: the run went back too often already.
        """
        if self.in_a_row < self.max_skipped:
            return False
        self.restores += 1
        if self.restores > self.max_restores:
            raise RunDiverged(
                f"The run went back to its last checkpoint {self.max_restores} times, and each time {self.max_skipped} "
                "steps in a row had a loss or gradient that is not finite. Lower --base_lr, set --max_grad_norm 1, or "
                "look at the data and the precision."
            )
        self.in_a_row = 0
        return True

    def good_checkpoint_written(self) -> None:
        """Starts counting anew how often the run goes back: the weights were finite, and so was the last step."""
        self.restores = 0

    def no_way_back(self) -> RunDiverged:
        """Returns what is raised where no good checkpoint was written yet."""
        return RunDiverged(
            f"{self.max_skipped} steps in a row had a loss or gradient that is not finite, and there is no checkpoint "
            "to go back to. Lower --base_lr, set --max_grad_norm 1, or write checkpoints earlier with "
            "--checkpoint_samples."
        )

    def spoilt_weights(self, samples: int, kept: str) -> RunDiverged:
        """Returns what is raised where a run would be saved with weights that are not finite.

        Args:
            samples: seen so far.
            kept: the newest good checkpoint, in words.
        """
        return RunDiverged(
            f"After {samples:,} samples the weights are not finite, so neither a model nor a checkpoint was written; "
            f"{kept}. Lower --base_lr, set --max_grad_norm 1, or look at the data and the precision."
        )
