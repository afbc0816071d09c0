"""Zero-shot classification of a test set: `flip-hf evaluate`, and CLIP_benchmark's own loop on the same model.

Both read the same tar shards, in CLIP_benchmark's layout, with the same number of workers, and transform pictures by
the same image processor. CLIP_benchmark 1.6.2 does not work with NumPy 2.4 or newer; where it cannot be imported, it is
left out and the table says why.
"""

import argparse
import io
import itertools
import os
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flip_hf import FlipProcessor
from flip_hf.benchmarks.loader import natural_image
from flip_hf.benchmarks.measuring import about, alternate, spread
from flip_hf.benchmarks.models import CONTEXT, IMAGE_SIZE, make_flip
from flip_hf.data.decode import RefusedSample, image_bytes
from flip_hf.data.sources import open_source
from flip_hf.data.targets import ClassIndex
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.data.workers import default_workers
from flip_hf.evaluation.clip_benchmark import BenchmarkModel, register
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.evaluate import evaluate
from flip_hf.evaluation.label_cache import VARIABLE
from flip_hf.evaluation.loading import eval_loader
from flip_hf.evaluation.options import EvaluationOptions
from flip_hf.evaluation.subject import Subject
from flip_hf.evaluation.templates import prompt_set

OURS = "flip_hf"
KEPT = "flip_hf, class embeddings kept"
PEER = "CLIP_benchmark"
TEMPLATES = "clip_7"
PER_SHARD = 1000
# Of drawn pictures, where no data are named.
DISTINCT = 64
DRAWN_CLASSES = tuple(f"drawing {number}" for number in range(10))

Labelled = Iterator[tuple[bytes, int]]


# -- data --------------------------------------------------------------------------------------------------------------


def drawn_pictures() -> Labelled:
    """Yields encoded pictures of 640 x 480 pixels and labels, forever; the first [`DISTINCT`] recur."""
    rng = np.random.default_rng(0)
    encoded: list[bytes] = []
    for number in itertools.count():
        if number < DISTINCT:
            buffer = io.BytesIO()
            natural_image(640, 480, rng).save(buffer, "JPEG", quality=90)
            encoded.append(buffer.getvalue())
        yield encoded[number % DISTINCT], number % len(DRAWN_CLASSES)


def pictures_of(data: str) -> tuple[Labelled, tuple[str, ...]]:
    """Returns the encoded pictures and labels of a data set, and the names of its classes.

    Raises:
        ValueError, FileNotFoundError: it cannot be opened, or its labels have no names.
    """
    source = open_source(data, split="test", kind="label")
    if source.class_names is None:
        raise ValueError(f"--data {source.name}: its labels have no names.")
    read_label = ClassIndex(source.class_names)

    def usable() -> Labelled:
        for row in source.rows():
            try:
                yield image_bytes(source.image(row)), read_label(source.target(row))
            except RefusedSample:
                continue

    return usable(), source.class_names


def write_test_set(folder: Path, pictures: Labelled, classes: tuple[str, ...], count: int) -> tuple[int, float]:
    """Writes pictures in CLIP_benchmark's layout; returns how many there were, and their mean size in bytes."""
    (folder / "test").mkdir()
    sizes: list[int] = []
    shard = 0
    left = zip(range(count), pictures, strict=False)
    while batch := [each for _, each in zip(range(PER_SHARD), left, strict=False)]:
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            for number, (image, label) in batch:
                sizes.append(len(image))
                for extension, data in (("jpg", image), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        shard += 1
    (folder / "test" / "nshards.txt").write_text(str(shard))
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    templates = "".join(f"{template.replace('{}', '{c}')}\n" for template in prompt_set(TEMPLATES))
    (folder / "zeroshot_classification_templates.txt").write_text(templates)
    return len(sizes), statistics.mean(sizes)


# -- candidates --------------------------------------------------------------------------------------------------------


def make_encoder(options: argparse.Namespace, classes: tuple[str, ...]) -> Encoder:
    """Makes a new model of this architecture, and a processor whose tokenizer knows the classes."""
    prompts = [template.format(name) for template in prompt_set(TEMPLATES) for name in classes]
    tokenizer = train_wordpiece(prompts, vocab_size=2000, context_length=CONTEXT)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
    model: Any = make_flip(options.architecture)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    return Encoder(model.to(options.device, dtype), FlipProcessor(image_processor, tokenizer))


@contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Keeps class embeddings in a folder, or nowhere."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "" if folder is None else str(folder)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


class Ours:
    """`flip-hf evaluate` on the test set, with a loaded model."""

    def __init__(self, encoder: Encoder, folder: Path, options: argparse.Namespace, workers: int):
        self.encoder = encoder
        self.accelerator = Accelerator(cpu=options.device == "cpu")
        self.options = EvaluationOptions(
            data=str(folder),
            class_names=str(folder / "classnames.txt"),
            templates=[TEMPLATES],
            batch_size=options.batch_size,
            num_workers=workers,
        )
        self.top1: list[float] = []

    def measure(self, cache: Path | None) -> None:
        """Evaluates, and notes the accuracy."""
        with kept_in(cache):
            results, problems = evaluate(self.encoder, self.options.data_sets(), self.options, self.accelerator)
        if problems:
            raise ValueError("; ".join(problems.values()))
        self.top1.append(results[0].metrics["top1"])

    def decode(self) -> None:
        """Reads, decodes and transforms all pictures, without the model."""
        (described,) = self.options.data_sets()
        subject = Subject(self.encoder, described, self.options, self.accelerator)
        size = self.options.batch_size
        workers = self.options.num_workers
        loader = eval_loader(
            subject.data_set,
            subject.source("test"),
            self.encoder.transform,
            self.accelerator,
            batch_size=size,
            num_workers=workers or 0,
        )
        for _ in loader:
            pass


class Peer:
    """CLIP_benchmark's loop, its loader made as its command makes it.

    Raises:
        ImportError: CLIP_benchmark cannot be used; the message says why.
    """

    def __init__(self, encoder: Encoder, folder: Path, options: argparse.Namespace, workers: int):
        register()
        self.build = import_module("clip_benchmark.datasets.builder").build_dataset
        self.classify = import_module("clip_benchmark.metrics.zeroshot_classification").evaluate
        self.encoder = encoder
        self.model = BenchmarkModel(encoder.model)
        self.folder = folder
        self.device = options.device
        self.in_bf16 = options.precision == "bf16"
        self.batch_size = options.batch_size
        self.workers = workers
        self.top1: list[float] = []

    def _loader(self) -> Any:
        dataset = self.build("wds/test", root=str(self.folder), transform=self.encoder.transform, split="test")
        return dataset, torch.utils.data.DataLoader(
            dataset.batched(self.batch_size), batch_size=None, shuffle=False, num_workers=self.workers
        )

    def measure(self) -> None:
        """Evaluates, and notes the accuracy."""
        dataset, loader = self._loader()
        names = dataset.classes
        templates = dataset.templates
        found = self.classify(
            self.model, loader, self.encoder.text_inputs, names, templates, self.device, amp=self.in_bf16
        )
        self.top1.append(found["acc1"])

    def decode(self) -> None:
        """Reads, decodes and transforms all pictures, without the model."""
        for _ in self._loader()[1]:
            pass


# -- the question ------------------------------------------------------------------------------------------------------


def benchmark_evaluation(options: argparse.Namespace) -> dict:
    """Seconds of a zero-shot evaluation, and of its decoding alone."""
    workers = default_workers() if options.workers is None else options.workers
    pictures, classes = pictures_of(options.data) if options.data else (drawn_pictures(), DRAWN_CLASSES)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "test_set"
        folder.mkdir()
        count, size = write_test_set(folder, pictures, classes, options.images)
        encoder = make_encoder(options, classes)
        ours = Ours(encoder, folder, options, workers)
        steps: dict[str, Callable[[], None]] = {
            OURS: lambda: ours.measure(None),
            KEPT: lambda: ours.measure(Path(root) / "cache"),
            f"{OURS}, decoding alone": ours.decode,
        }
        top1 = {OURS: ours.top1}
        missing = None
        try:
            peer = Peer(encoder, folder, options, workers)
            steps |= {PEER: peer.measure, f"{PEER}, decoding alone": peer.decode}
            top1[PEER] = peer.top1
        except ImportError as error:
            missing = str(error)
        seconds = alternate(steps, options.repeats)
    return {
        "question": "evaluation",
        **{name: getattr(options, name) for name in ("architecture", "batch_size", "precision")},
        **{"images": count, "image_bytes": round(size), "classes": len(classes), "workers": workers},
        "top1": {name: values[-1] for name, values in top1.items()},
        "peer": None if missing else version("clip-benchmark"),
        "missing": missing,
        "seconds": seconds,
    }


def evaluation_markdown(result: dict) -> str:
    """A table of medians and spread, the share of decoding, and ratios to flip_hf."""
    seconds = result["seconds"]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peer = f"{PEER} {result['peer']}" if result["peer"] else f"{PEER} was left out: {result['missing']}"
    lines = [
        f"Zero-shot classification of {result['images']:,} pictures ({result['image_bytes'] / 1000:.1f} kB each) by "
        f"{result['classes']} classes, ViT-{result['architecture']}, {result['precision']}, batches of "
        f"{result['batch_size']}, {result['workers']} loader workers; {peer}. {about(result, len(seconds[OURS]))}",
        "| candidate | seconds (min - max) | decoding alone | share of it | a second | times flip_hf's | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (OURS, KEPT, PEER):
        if name not in seconds:
            continue
        own = name.split(",")[0]
        decoding = medians[f"{own}, decoding alone"]
        lines.append(
            f"| {name} | {spread(seconds[name], '.1f')} | {decoding:.1f} | "
            f"{decoding / medians[name]:.0%} | {result['images'] / medians[name]:,.0f} | "
            f"{medians[name] / medians[OURS]:.2f} | {result['top1'][own]:.4f} |"
        )
    return "\n".join(lines) + "\n"
