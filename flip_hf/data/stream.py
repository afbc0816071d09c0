"""Makes the batches of one worker: draws samples from the sources, cuts out visible patches, tokenizes captions.

Letters: B samples per batch, S side of an image in pixels, P side of a patch, L patches, K kept patches, T tokens.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from flip_hf.data.joining import join
from flip_hf.data.positions import SourcePosition
from flip_hf.data.reading import Reader
from flip_hf.data.refusals import BadDataError, Refusals
from flip_hf.data.samples import MAX_BLOCK_BYTES, SourceReader, Transform
from flip_hf.data.sources import Source

# Images are collected up to this size before their patches are cut: a call for each costs as much as its copying where
# images are small, and larger pieces leave the processor's cache.
_CUT_BYTES = 2**20
_DRAWS = 1024  # numbers drawn at once, as making a generator costs more than drawing
_MASKS = 1  # distinguishes the seeds of masks from others made of the same numbers


@dataclass(frozen=True)
class View:
    """The visible part of a batch's images and texts.

    Attributes:
        image_size: side S of the images, in pixels.
        draw: draws the kept patches (B, K) for a batch of B from torch's default generator, or the noise that `choose`
            takes; None if all are kept.
        choose: maps (images (B, 3, S, S), their noise) to their kept patches (B, K), where those depend on the images.
        text_length: tokens that texts are cut to; the model's context if None.
        text_noise: random numbers drawn for each text, from its sample's own generator, to mask it; 0 if it is whole.
        text_kept: tokens kept of each text, where it is masked.
    """

    image_size: int
    draw: Callable[[int], torch.Tensor] | None = None
    choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    text_length: int | None = None
    text_noise: int = 0
    text_kept: int = 0

    def ids_keep(self, images: torch.Tensor, drawn: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the kept patches (B, K) of images for which `draw` drew; None if all are kept."""
        return drawn if drawn is None or self.choose is None else self.choose(images, drawn)


@dataclass(frozen=True)
class PatchPlan:
    """The way from images to patches.

    Attributes:
        transform: maps (encoded image, generator, S) to a uint8 tensor (3, S, S).
        cut: maps (images (B, 3, S, S), `ids_keep` (B, K) or None) to patches (B, K, 3 * P * P), all L of them for None.
        view_at: maps the number of samples seen when a step begins to that step's view.
        num_micro: batches of a process per step.
        whole: whether all patches are sent with the mask, for a loss on the dropped ones.
    """

    transform: Transform
    cut: Callable[..., torch.Tensor]
    view_at: Callable[[int], View]
    num_micro: int = 1
    whole: bool = False


class TrainStream(IterableDataset):
    """An endless stream of training batches for one process.

    Args:
        sources: the data; their `target_column` holds captions, if these are read.
        plan: the way from images to patches.
        tokenize: maps a list of captions to the text tower's arguments, a dict of tensors; see
            [`Tokenize`][flip_hf.training.packing.Tokenize] for its further arguments, which come from the view. None
            without captions.
        batch_size: samples per batch.
        process: this process among all.
        seed: seed of order, mixture, augmentation and masks.
        shuffle_block: rows of a source shuffled together; 1 keeps the shards' own order.
        weights: sampling weight of each source, in any unit; equal if None.
        max_bad_fraction: a larger fraction of unusable samples among a worker's last ones ends the run.

    [`TrainLoader`] sets `workers`, the states from which this process's workers resume (see `_Worker.state`),
    `first_worker`, whose batch comes next, and `samples`, the number seen by the run when that batch's step begins.
    `block_bytes` limits the rows that a worker holds for shuffling, over all sources.
    """

    def __init__(
        self,
        sources: list[Source],
        plan: PatchPlan,
        tokenize: Callable[..., dict[str, torch.Tensor]] | None,
        *,
        batch_size: int,
        process: Reader,
        seed: int,
        shuffle_block: int,
        weights: list[float] | None = None,
        max_bad_fraction: float = 1.0,
    ):
        self.sources = sources
        self.plan = plan
        self.tokenize = tokenize
        self.batch_size = batch_size
        self.process = process
        self.max_bad_fraction = max_bad_fraction
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.weights = np.array(weights or [1.0] * len(sources)) / sum(weights or [1.0] * len(sources))
        self.workers: list[dict] = []
        self.first_worker = self.samples = 0
        self.block_bytes = MAX_BLOCK_BYTES

    def view(self, number: int) -> View:
        """Returns the view of the `number`-th batch of this process, counted from `samples` on."""
        step = self.batch_size * self.plan.num_micro * self.process.count
        return self.plan.view_at(self.samples + number // self.plan.num_micro * step)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields each `batch`, joined, with its `worker`, that worker's `state`, and the `counts` since the last one.

        If the data cannot be used any further, the last item is `{"error": message}`: an exception would reach the main
        process as a page of traceback.
        """
        info = get_worker_info()
        num_workers, turn = (info.num_workers, info.id) if info else (1, 0)
        number = (turn + self.first_worker) % num_workers
        reader = Reader(self.process.index * num_workers + number, self.process.count * num_workers)
        worker = _Worker(self, reader, self.workers[number])
        try:
            # A DataLoader takes batches from its workers in turn.
            for batch in worker.batches(map(self.view, itertools.count(turn, num_workers))):
                message = {"worker": number, "state": worker.state(), "counts": worker.refusals.take()}
                yield {"batch": join(batch), **message}
        except BadDataError as error:
            yield {"error": str(error)}


class _Worker:
    """One reader of all sources."""

    def __init__(self, stream: TrainStream, reader: Reader, state: dict):
        self.stream = stream
        self.reader = reader
        self.refusals = Refusals(stream.max_bad_fraction, tuple(state["window"]))
        self.draws = state["draws"]
        self.positions = [SourcePosition.from_json(values) for values in state["sources"]]

    def state(self) -> dict:
        """Returns a JSON-serialisable state to resume from: draws, window of refusals, a position per source."""
        return {
            "draws": self.draws,
            "window": [self.refusals.good, self.refusals.bad],
            "sources": [position.to_json() for position in self.positions],
        }

    def batches(self, views: Iterator[View]) -> Iterator[dict[str, torch.Tensor]]:
        """Yields `{"patches" (B, K, 3 * P * P) uint8, "ids_keep" (B, K)}` and the results of `tokenize`.

        If a view shows every patch there is no `ids_keep`; if the plan sends whole images, K is L in `patches`.
        """
        stream = self.stream
        readers = [
            SourceReader(
                source,
                stream.plan.transform,
                self.reader,
                position,
                seed=stream.seed,
                shuffle_block=stream.shuffle_block,
                block_bytes=stream.block_bytes // len(stream.sources),
                refusals=self.refusals,
            )
            for source, position in zip(stream.sources, self.positions, strict=True)
        ]
        samples = [reader.samples() for reader in readers]
        for view in views:
            drawn = self._draw(view)
            for reader in readers:
                reader.image_size = view.image_size
                reader.text_noise = view.text_noise
            patches = []
            masks = []
            captions = []
            noise = []
            images = []  # whose patches are not cut yet
            for number in range(1, stream.batch_size + 1):
                sample = next(samples[self._draw_source()])
                image = sample.image
                images.append(image)
                captions.append(sample.caption)
                noise.append(sample.noise)
                if number == stream.batch_size or len(images) * image.nbytes >= _CUT_BYTES:
                    pixels = _stack(images)
                    mask = view.ids_keep(pixels, None if drawn is None else drawn[number - len(images) : number])
                    patches.append(stream.plan.cut(pixels, ids_keep=None if stream.plan.whole else mask))
                    masks.append(mask)
                    images = []
            ids_keep = {"ids_keep": torch.cat(masks)} if drawn is not None else {}
            texts = {}
            if stream.tokenize is not None:
                numbers = torch.from_numpy(np.stack(noise)) if view.text_noise else None
                texts = stream.tokenize(captions, view.text_length, numbers, view.text_kept)
            yield {"patches": torch.cat(patches), **ids_keep, **texts}

    def _draw(self, view: View) -> torch.Tensor | None:
        """Draws what the view draws for a batch, determined by the seed, the reader and the number of draws before."""
        if view.draw is None:
            return None
        key = (self.stream.seed, self.reader.index, self.reader.count, self.draws, _MASKS)
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):  # without workers the model draws from the same generator
            torch.default_generator.manual_seed(int(seed))
            return view.draw(self.stream.batch_size)

    def _draw_source(self) -> int:
        """Draws the source of the next sample, determined by the seed, the reader and the number of draws before."""
        block, number = divmod(self.draws, _DRAWS)
        self.draws += 1
        if len(self.positions) == 1:
            return 0
        if number == 0 or not hasattr(self, "_drawn"):
            rng = np.random.default_rng((self.stream.seed, self.reader.index, self.reader.count, block))
            self._drawn = rng.choice(len(self.positions), size=_DRAWS, p=self.stream.weights)
        return int(self._drawn[number])


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    """Stacks images (3, S, S) whose channels are last in memory to (B, 3, S, S) whose channels are."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def initial_state(sources: int) -> dict:
    """Returns the state of a worker that has read nothing; see `_Worker.state`."""
    return {"draws": 0, "window": [0, 0], "sources": [SourcePosition([]).to_json() for _ in range(sources)]}
