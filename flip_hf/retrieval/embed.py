"""The work behind `flip-hf embed`: features of a data set by all processes, in files with which a restart resumes."""

import itertools
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from flip_hf.console.files import file_digest, is_plain_file
from flip_hf.console.lock import lock_folder, unlock_folder
from flip_hf.data.loader import make_loader
from flip_hf.data.processes import from_main, make_accelerator
from flip_hf.data.reading import Reader
from flip_hf.data.refusals import BadDataError
from flip_hf.data.sources import Source
from flip_hf.data.workers import default_workers, open_batches
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.fingerprints import model_fingerprint
from flip_hf.redaction import shown
from flip_hf.retrieval.blocks import UNREADABLE, Batch, Block, BlockStream, Ending, Sample
from flip_hf.retrieval.folder import (
    MANIFEST,
    Expected,
    Manifest,
    check_folder,
    find_parts,
    finish,
    read_manifest,
    reopen,
    take_folder,
    write_manifest,
)
from flip_hf.retrieval.index import build_index, has_index, require_faiss
from flip_hf.retrieval.opening import open_data
from flip_hf.retrieval.options import EmbedOptions
from flip_hf.retrieval.parts import Part, write_part
from flip_hf.retrieval.texts import have_tokens

logger = logging.getLogger(__name__)

NOT_FINITE = "features are not finite"
# A process that has finished its blocks waits for the others, however long they take.
_PATIENCE = timedelta(days=30)
# Of torch's own memory, in bytes.
ALIGNMENT = 64


def describe(options: EmbedOptions, encoder: Encoder, data: dict[str, Any], earlier: Collection[str] = ()) -> Manifest:
    """Describes what features will be of, by content; `earlier` names the digests in the folder that it is for."""
    return Manifest(
        model={
            "name": shown(options.model),
            "revision": getattr(encoder.model.config, "_commit_hash", None) or options.revision,
            **model_fingerprint(encoder.model, encoder.processor, earlier),
        },
        data=data,
        options={name: getattr(options, name) for name in ("texts", "batch_size", "precision", "rows_per_file")},
        environment={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": encoder.model.device.type,
        },
    )


def align(model: nn.Module) -> None:
    """Moves weights to where torch places tensors itself, at multiples of 64 bytes.

    A file's tensors are used where they lie in it, and not in every run at the same distance from such a multiple. The
    last bits of a product of a single row depend on that.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


@dataclass
class _Open:
    """A block whose batches are being encoded."""

    samples: list[Sample] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)  # float16, on the device


class Embedder:
    """Encodes the missing blocks of this process's share and writes their files.

    Args:
        encoder: the model.
        folder: the folder of the files.
        identity: digest of what decides the features.
        options: the options.
    """

    def __init__(self, encoder: Encoder, folder: Path, identity: str, options: EmbedOptions):
        self.encoder = encoder
        self.width = feature_width(encoder)
        self.folder = folder
        self.identity = identity
        self.options = options
        self._open: dict[Block, _Open] = {}

    @torch.no_grad()
    def run(self, batches: Iterable[dict[str, Any]], bar: Any) -> None:
        """Encodes and writes until the batches end.

        Args:
            batches: those of a [`BlockStream`], in any order of blocks.
            bar: the progress bar; it counts images.

        Raises:
            BadDataError: the data can no longer be read.
        """
        for batch in batches:
            about: Batch = batch["about"]
            if about.error is not None:
                raise BadDataError(about.error)
            if about.unread is not None:
                logger.warning("Not read to the end: %s.", about.unread)
                self._open.pop(about.block, None)
                continue
            opened = self._open.setdefault(about.block, _Open())
            if about.samples:
                images = batch["images"].to(self.encoder.model.device, non_blocking=True)
                opened.features.append(self.encoder.images(images).half())
                opened.samples += about.samples
                bar.update(len(about.samples))
            if about.ending is not None:
                self._write(about.block, self._open.pop(about.block), about.ending)

    def _write(self, block: Block, opened: _Open, ending: Ending) -> None:
        found = _stacked(opened.features, self.width)
        finite = np.atleast_1d(np.isfinite(found).all(axis=1))
        samples = [sample for sample, good in zip(opened.samples, finite, strict=True) if good]
        lost = [sample for sample, good in zip(opened.samples, finite, strict=True) if not good]
        ending.refused += [(sample.row, sample.key, NOT_FINITE) for sample in lost]
        captions = [caption for sample in samples for caption in sample.captions]
        texts = self._texts(captions) if self.options.texts else None
        part = Part(block, self.identity, len(samples), len(captions), ending)
        write_part(self.folder, part, samples, found[finite], texts)

    def _texts(self, captions: Sequence[str]) -> np.ndarray:
        """Encodes M captions to (M, E), float16; zeros stand for those without tokens."""
        size = self.options.batch_size
        found = np.zeros((len(captions), self.width), np.float16)
        for start in range(0, len(captions), size):
            batch = captions[start : start + size]
            numbers = [number for number, usable in enumerate(have_tokens(self.encoder, batch)) if usable]
            if numbers:
                features = self.encoder.texts([batch[number] for number in numbers])
                found[[start + number for number in numbers]] = features.half().cpu().numpy()
        return found


@torch.no_grad()
def feature_width(encoder: Encoder) -> int:
    """Returns E, the length of a model's features, as a plain picture shows."""
    pixels = encoder.transform(Image.new("RGB", (32, 32)))[None]
    return encoder.images(pixels.to(encoder.model.device)).shape[1]


def _stacked(features: Sequence[torch.Tensor], width: int) -> np.ndarray:
    return torch.cat(list(features)).cpu().numpy() if features else np.empty((0, width), np.float16)


def embed(options: EmbedOptions) -> tuple[Manifest, bool]:
    """Encodes a data set, or what is missing of it; each process must call this.

    Returns:
        What is in the folder, and whether this is the first process, which says so.

    Raises:
        ValueError, OSError: a mistake in the options, the model or the data, or a folder that cannot be written; found
            before anything is encoded.
        BadDataError: the data can no longer be read.
    """
    if options.index is not None:
        require_faiss()
    accelerator = make_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    earlier = read_manifest(options.folder).model if (options.folder / MANIFEST).exists() else {}
    source, data = open_data(options)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    more = {} if options.revision is None else {"revision": options.revision}
    encoder = Encoder.from_pretrained(options.model, device=accelerator.device, dtype=dtype, **more)
    if not encoder.knows_texts:
        raise ValueError(f"{options.model} is only a vision tower: give a model of images and texts.")
    align(encoder.model)
    wanted = describe(options, encoder, data, earlier)

    def take() -> Manifest:
        check_folder(options.folder)
        options.folder.mkdir(parents=True, exist_ok=True)
        lock_folder(options.folder)
        try:
            return take_folder(options.folder, wanted)
        except BaseException:
            unlock_folder(options.folder)
            raise

    manifest = from_main(accelerator, take)
    try:
        if not from_main(accelerator, partial(_is_complete, options, manifest)):
            manifest = _encode_missing(options, encoder, source, manifest, accelerator)
        return from_main(accelerator, partial(_with_index, options, manifest)), accelerator.is_main_process
    finally:
        unlock_folder(options.folder)


def _is_complete(options: EmbedOptions, manifest: Manifest) -> bool:
    """Checks every file of a finished folder, and removes those that are not what they were when it was finished.

    A folder in which a shard that cannot be read was left out is complete only if it may be left out now, too.
    """
    whole = manifest.finished and (options.skip_unreadable or UNREADABLE not in manifest.refused)
    for name, about in manifest.files.items():
        path = options.folder / name
        is_there = is_plain_file(path)
        if path.is_symlink() or (is_there and file_digest(path) != about["sha256"]):
            logger.warning("%s has changed since it was written, and will be written again.", path)
            path.unlink()
            is_there = False
        whole = whole and is_there
    return whole


def _encode_missing(
    options: EmbedOptions, encoder: Encoder, source: Source, manifest: Manifest, accelerator: Accelerator
) -> Manifest:
    wanted = Expected(manifest.identity, source.shards.num_shards, options.skip_unreadable)
    from_main(accelerator, partial(reopen, options.folder, manifest))
    there, unusable = from_main(accelerator, lambda: find_parts(options.folder, wanted))
    if accelerator.is_main_process:
        for path in unusable:
            logger.warning("%s is damaged, incomplete or of other features, and counts as missing.", path)
        if there:
            logger.warning("%s has %d files of an earlier run, which is resumed.", options.folder, len(there))
    transform = encoder.transform
    stream = BlockStream(
        source,
        transform.pixels,
        rows=options.rows_per_file,
        batch_size=options.batch_size,
        process=Reader(accelerator.process_index, accelerator.num_processes),
        there=there,
        background=transform.background,
        skip_unreadable=options.skip_unreadable,
    )
    workers = default_workers() if options.workers is None else options.workers
    loader = make_loader(stream, num_workers=workers, pin_memory=accelerator.device.type == "cuda")
    embedder = Embedder(encoder, options.folder, manifest.identity, options)
    hidden = not accelerator.is_main_process
    label = "images of the first process" if accelerator.num_processes > 1 else "images"
    with tqdm(desc="embedding", unit=f" {label}", disable=hidden) as bar, open_batches(loader) as opened:
        embedder.run(opened, bar)
    accelerator.wait_for_everyone()
    return from_main(accelerator, lambda: finish(options.folder, manifest, source.shards.name, embedder.width, wanted))


def _with_index(options: EmbedOptions, manifest: Manifest) -> Manifest:
    """Builds the index that was asked for, unless it is there, whole, or there is nothing to find."""
    kind = options.index
    if kind is not None and manifest.images and not has_index(options.folder, manifest.index, kind):
        manifest.index = build_index(options.folder, list(manifest.files), manifest.width, kind)
        write_manifest(options.folder, manifest)
    return manifest
