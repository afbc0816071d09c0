"""The agreement of all processes before each step: one small reduction, so that none waits for the others in vain.

A process that is asked to stop, or whose data end, must not leave alone: the others would wait for it in the loss until
a timeout. Instead it says so here, where every process arrives once a step with its batch in hand, and all of them save
and leave together. The answer is needed before the step, and a device has the last step still to do by then: so it is
the hosts that agree, over a group of their own, and none of them waits for its device.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from accelerate import Accelerator


class PeerFailed(RuntimeError):
    """Another process ended the run, and its message says why."""


@dataclass(frozen=True)
class Agreement:
    """The wishes of at least one process of a run.

    Attributes:
        stop: the run saves and leaves, because a signal asked for it.
        failed: the run saves and leaves, because a process cannot get its next batch.
        overdue: a checkpoint is due by the clock.
    """

    stop: bool
    failed: bool
    overdue: bool

    @property
    def leave(self) -> bool:
        """True if the run ends here."""
        return self.stop or self.failed


def agree(accelerator: Accelerator, *, stop: bool, failed: bool, overdue: bool) -> Agreement:
    """Combines the wishes of all processes; each must call it once a step, and all get the same answer."""
    if accelerator.num_processes == 1:
        return Agreement(stop, failed, overdue)
    wishes = torch.tensor([stop, failed, overdue], dtype=torch.uint8)
    dist.all_reduce(wishes, dist.ReduceOp.MAX, group=_hosts(dist.group.WORLD, accelerator.device.type))
    return Agreement(*map(bool, wishes.tolist()))


@cache
def _hosts(world: dist.ProcessGroup, device: str) -> dist.ProcessGroup:
    """Returns a group of all processes that reduces in host memory: that of the world itself on CPUs."""
    return world if device == "cpu" else dist.new_group(backend="gloo")  # pyright: ignore[reportReturnType]


def is_first(accelerator: Accelerator, wish: bool) -> bool:
    """Returns whether this process is the first of those with a wish; all must call it."""
    rank = accelerator.process_index
    mine = torch.tensor([rank if wish else accelerator.num_processes], device=accelerator.device)
    first = accelerator.gather(mine).min().item()  # pyright: ignore[reportAttributeAccessIssue]
    return wish and first == rank
