"""Guards for a long run: steps that would spoil the weights are skipped, and a lost run goes back to a checkpoint."""

import math


class RunDiverged(RuntimeError):
    """Training cannot continue; the message says what was tried and what may help."""


class Health:
    """Watches the gradient.

    A non-finite loss or gradient makes the norm of the gradient, averaged over the processes, non-finite on all of
    them: every process comes to the same answer from its own number.

    Args:
        max_skipped: steps skipped in a row after which the run goes back to its last good checkpoint.
        max_restores: times that it may go back before it writes a new good checkpoint.

    Attributes:
        in_a_row: number of latest steps that were all skipped.
        restores: times the run went back since its last good checkpoint; both are part of a checkpoint.
    """

    def __init__(self, max_skipped: int, max_restores: int = 3):
        self.max_skipped = max_skipped
        self.max_restores = max_restores
        self.in_a_row = 0
        self.restores = 0

    def is_good(self, grad_norm: float) -> bool:
        """Returns whether the step may be taken, and counts the skipped ones."""
        good = math.isfinite(grad_norm)
        self.in_a_row = 0 if good else self.in_a_row + 1
        return good

    def is_lost(self) -> bool:
        """Returns whether so many steps in a row were skipped that the weights themselves must be spoilt.

        Raises:
            RunDiverged: the run has gone back too often already.
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
        """Resets the count of restores: the weights and the last step were finite."""
        self.restores = 0

    def no_way_back(self) -> RunDiverged:
        """Makes the error for a lost run without a good checkpoint."""
        return RunDiverged(
            f"{self.max_skipped} steps in a row had a loss or gradient that is not finite, and there is no checkpoint "
            "to go back to. Lower --base_lr, set --max_grad_norm 1, or write checkpoints earlier with "
            "--checkpoint_samples."
        )

    def spoilt_weights(self, samples: int, kept: str) -> RunDiverged:
        """Makes the error for a run that would be saved with non-finite weights.

        Args:
            samples: samples seen so far.
            kept: the newest good checkpoint, in words.
        """
        return RunDiverged(
            f"After {samples:,} samples the weights are not finite, so neither a model nor a checkpoint was written; "
            f"{kept}. Lower --base_lr, set --max_grad_norm 1, or look at the data and the precision."
        )
