"""Loads batches in worker processes, with a state from which any number of them can resume."""

import copy
import logging
import os
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from flip_hf.data.joining import split
from flip_hf.data.positions import SourcePosition, deal_again
from flip_hf.data.refusals import BadDataError, add_counts
from flip_hf.data.stream import TrainStream, initial_state
from flip_hf.data.workers import open_batches, start_worker

logger = logging.getLogger(__name__)


def make_loader(stream: IterableDataset, *, num_workers: int, **options: Any) -> DataLoader:
    """Makes a DataLoader over ready-made batches that leaves torch's default generator to the model.

    Args:
        stream: yields batches.
        num_workers: number of worker processes; 0 loads in this process.
        options: further options of the DataLoader, such as `pin_memory`.
    """
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),
        worker_init_fn=start_worker,
        **options,
    )


class TrainLoader:
    """Batches of a [`TrainStream`], and the position after the last one taken.

    Args:
        stream: an endless stream of batches.
        num_workers: number of worker processes; 0 loads in this process.
        pin_memory: pins batches for asynchronous copies to a GPU.
        states: results of `state_dict` in every process of a run, by rank, to resume from. The number of processes
            and workers may differ: what the old readers had left of their epochs is dealt to the new ones, each row
            once (see `positions.py`).

    Attributes:
        counts: this process's samples drawn, refused and held out since the run began, by source:
            `{"drawn": {source: n}, "refused": {source: {reason: n}}, "held_out": {source: n}}`. After a change in the
            number of processes, the first one has the sum of all counts.

    Raises:
        ValueError: the states were written with another seed or block size, so their positions are meaningless.
    """

    def __init__(
        self, stream: TrainStream, *, num_workers: int, pin_memory: bool, states: Sequence[dict[str, Any]] | None = None
    ):
        self._stream = stream
        self._slots = max(1, num_workers)
        self._workers = [initial_state(len(stream.sources)) for _ in range(self._slots)]
        self._next = 0
        self.counts: dict[str, dict] = {
            "drawn": {source.name: 0 for source in stream.sources},
            "refused": {},
            "held_out": {},
        }
        if states:
            self._restore(states)
        if num_workers > 0:
            # The tokenizer is used here and in forked workers; its threads would be lost in the fork.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._loader = make_loader(stream, num_workers=num_workers, pin_memory=pin_memory)

    def begin_at(self, samples: int) -> None:
        """Sets the number of samples that the run has seen, which determines the views of subsequent batches."""
        self._stream.samples = samples

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        """Yields `patches`, `ids_keep` and tokenized captions forever, from the current position on.

        Close the generator to end its workers: an exception's traceback would keep it, and them, alive.

        Raises:
            BadDataError: most of the data, or all of one reader's, cannot be used.
            WaitEnded: a signal ended the wait for a batch.
        """
        self._stream.workers = list(self._workers)
        self._stream.first_worker = self._next
        with open_batches(self._loader) as batches:
            for message in batches:
                if "error" in message:
                    raise BadDataError(message["error"])
                worker = message["worker"]
                self._workers[worker] = message["state"]
                self._next = (worker + 1) % self._slots
                add_counts(self.counts, message["counts"])
                yield split(message["batch"])

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns a JSON-serialisable snapshot of the position after the last batch taken and the counts up to it."""
        stream = self._stream
        return {
            "processes": stream.process.count,
            "seed": stream.seed,
            "shuffle_block": stream.shuffle_block,
            "sources": {source.name: source.shards.num_shards for source in stream.sources},
            "workers": list(self._workers),  # states are replaced, never modified
            "next_worker": self._next,
            "counts": copy.deepcopy(self.counts),
        }

    def _restore(self, states: Sequence[dict[str, Any]]) -> None:
        stream = self._stream
        rank = self._stream.process.index
        for name, now in (("seed", stream.seed), ("shuffle_block", stream.shuffle_block)):
            if states[0][name] != now:
                raise ValueError(
                    f"The checkpoint's data positions are for --{name} {states[0][name]}, not {now}: resume with that."
                )
        sources = {source.name: source.shards.num_shards for source in stream.sources}
        same_readers = len(states) == stream.process.count and all(len(s["workers"]) == self._slots for s in states)
        if same_readers and list(states[0]["sources"].items()) == list(sources.items()):
            self._workers = list(states[rank]["workers"])
            self._next = states[rank]["next_worker"]
            add_counts(self.counts, states[rank]["counts"])
            return
        if not same_readers and rank == 0:
            logger.warning(
                "The checkpoint was written by %d readers in %d process(es), this run has %d in %d: the rest of their "
                "epochs is redistributed. No sample is lost or repeated.",
                sum(len(state["workers"]) for state in states),
                len(states),
                stream.process.count * self._slots,
                stream.process.count,
            )
        self._deal(states, sources)
        if rank == 0:
            for state in states:
                add_counts(self.counts, state["counts"])

    def _deal(self, states: Sequence[dict[str, Any]], sources: dict[str, int]) -> None:
        """Deals this process's workers their share of what all old workers had left, source by source."""
        old = [worker for state in states for worker in state["workers"]]
        known = list(states[0]["sources"])
        first = self._stream.process.index * self._slots
        count = self._stream.process.count * self._slots
        for worker in self._workers:
            worker["draws"] = max(state["draws"] for state in old)
        level = logging.WARNING if first == 0 else logging.DEBUG  # warn once, in the first process
        for index, (name, num_shards) in enumerate(sources.items()):
            if name not in known:
                logger.log(level, "%r was not among the checkpoint's sources; it is read from the beginning.", name)
                continue
            positions = [SourcePosition.from_json(worker["sources"][known.index(name)]) for worker in old]
            if states[0]["sources"][name] == num_shards:
                dealt = deal_again(positions, count, num_shards)
            else:
                epoch = max(position.next_epoch for position in positions)
                logger.log(
                    level,
                    "%r had %d shards when the checkpoint was written and now has %d: it is read from the beginning, "
                    "as epoch %d, and samples of the last epoch may be repeated.",
                    name,
                    states[0]["sources"][name],
                    num_shards,
                    epoch + 1,
                )
                dealt = [SourcePosition([], epoch) for _ in range(count)]
            for worker, position in zip(self._workers, dealt[first : first + self._slots], strict=True):
                worker["sources"][index] = position.to_json()
