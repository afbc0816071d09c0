"""Guards for a long run: steps that would spoil the weights are skipped, and a lost run goes back to a checkpoint."""

import torch


class RunDiverged(RuntimeError):
    """Training cannot continue; the message says what was tried and what may help."""


def is_spoilt(grad_norm: torch.Tensor) -> torch.Tensor:
    """Returns 1 if the norm () of a gradient is not finite, else 0: (), float32, on its device."""
    return (~grad_norm.isfinite()).float()


class Health:
    """Watches the gradient, without making the host wait for the device.

    A non-finite loss or gradient makes the norm of the gradient, averaged over the processes, non-finite on all of
    them: every process comes to the same answer from its own number. Whether a step is skipped is decided and counted
    on the device; the host reads the counts where a line is logged or a checkpoint is due.

    Args:
        max_skipped: steps skipped in a row after which the run goes back to its last good checkpoint.
        device: device of the norms.
        max_restores: times that it may go back before it writes a new good checkpoint.

    Attributes:
        in_a_row: number of latest steps that were all skipped, when the counts were last read.
        restores: times the run went back since its last good checkpoint; both are part of a checkpoint.
    """

    def __init__(self, max_skipped: int, device: torch.device, max_restores: int = 3):
        self.max_skipped = max_skipped
        self.max_restores = max_restores
        self.in_a_row = 0
        self.restores = 0
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._unread = torch.zeros_like(self._in_a_row)  # steps skipped since the last reading

    def judge(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """Counts a step by the norm () of its gradient, and returns [`is_spoilt`]: whether it is skipped."""
        skipped = is_spoilt(grad_norm)
        count = skipped.long()
        self._unread += count
        self._in_a_row += 1
        self._in_a_row *= count
        return skipped

    def read(self) -> int:
        """Waits for the device and updates `in_a_row`; returns the number of steps skipped since the last reading."""
        skipped, self.in_a_row = torch.stack([self._unread, self._in_a_row]).tolist()
        self._unread.zero_()
        return skipped

    def resume(self, in_a_row: int, restores: int) -> None:
        """Continues from a checkpoint's counts."""
        self.in_a_row = in_a_row
        self.restores = restores
        self._in_a_row.fill_(in_a_row)
        self._unread.zero_()

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
