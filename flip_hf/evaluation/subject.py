"""One model on one data set, with shared features computed once for several tasks."""

import logging
from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from flip_hf.data.class_names import spoken
from flip_hf.data.processes import from_main
from flip_hf.data.sources import Source
from flip_hf.data.workers import default_workers
from flip_hf.evaluation.encoder import EncodeImages, Encoder, masked_images
from flip_hf.evaluation.features import Features, extract, extract_texts
from flip_hf.evaluation.label_cache import LabelCache, default_folder
from flip_hf.evaluation.labels import LabelEmbeddings
from flip_hf.evaluation.loading import check_apart, eval_loader, named_classes, open_split
from flip_hf.evaluation.options import EvaluationOptions
from flip_hf.evaluation.registry import DataSet
from flip_hf.evaluation.result import Result
from flip_hf.evaluation.spread import THUMBNAIL, pictures_at
from flip_hf.evaluation.templates import resolve_templates
from flip_hf.evaluation.zero_shot import normalized, prompt_embeddings, warn_of_confused

logger = logging.getLogger(__name__)


class Subject:
    """The model and data set of a task. Every process must request the same things in the same order.

    Args:
        encoder: the model.
        described: the data set.
        options: options of the evaluation.
        accelerator: the processes.

    Raises:
        ValueError, FileNotFoundError: the data set's test split cannot be opened; see [`open_split`].
    """

    def __init__(self, encoder: Encoder, described: DataSet, options: EvaluationOptions, accelerator: Accelerator):
        self.encoder = encoder
        self.options = options
        self.accelerator = accelerator
        self._described = described
        self._sources: dict[str, Source] = {}
        self._features: dict[tuple[str, str], Features] = {}
        self.data_set = named_classes(described, self.source("test"), options.data_dir)

    # -- images --------------------------------------------------------------------------------------------------------

    def source(self, split: str) -> Source:
        """Opens a split, once.

        Raises:
            ValueError: the training data share a file with the test data; see also [`open_split`].
        """
        if split not in self._sources:
            opened = open_split(self._described, split, self.options.data_dir)
            if split == "train":
                check_apart(opened, self._sources["test"])
            self._sources[split] = opened
        return self._sources[split]

    def has(self, split: str) -> bool:
        """Returns whether the data set has a split."""
        return split in self.data_set.splits

    def features(self, split: str, kind: str = "images") -> Features:
        """Returns the features of a split, in its order.

        Args:
            split: `train`, `validation` or `test`.
            kind: `images` (N, E), to compare with texts; `trunk` (N, D), before the projection; `view` and `views`
                (N, E), of one masked view and of all complementary views.

        Raises:
            ValueError: no image of the split could be used.
        """
        if (split, kind) not in self._features:
            loader = eval_loader(
                self.data_set,
                self.source(split),
                self.encoder.transform,
                self.accelerator,
                batch_size=self.options.batch_size,
                num_workers=default_workers() if self.options.num_workers is None else self.options.num_workers,
            )
            features = extract(self._encode(kind), loader, self.accelerator, f"{self.data_set.name} {split}, {kind}")
            if not features.targets:
                why = ", ".join(f"{count} x {reason}" for reason, count in features.refused.items())
                raise ValueError(f"No image of {self.data_set.title} ({split}) can be used: {why or 'there is none'}.")
            self._features[split, kind] = features
        return self._features[split, kind]

    def _encode(self, kind: str) -> EncodeImages:
        if kind in ("view", "views"):
            options = self.options
            return masked_images(self.encoder, options.mask_ratio, ensemble=kind == "views", seed=options.seed)
        return {"images": self.encoder.images, "trunk": self.encoder.trunk}[kind]

    def pictures(self, split: str, numbers: set[int]) -> dict[int, Image.Image]:
        """Returns thumbnails of images of a split, by their number among its features."""
        wanted = {self.features(split).places[number]: number for number in numbers}
        found = pictures_at(self.source(split), wanted, THUMBNAIL, self.encoder.transform.background)
        return {wanted[place]: image for place, image in found.items()}

    def labels(self, split: str) -> np.ndarray:
        """Returns the labels (N,) of a split's features, or (N, C) where images show several classes."""
        features = next(features for (name, _), features in self._features.items() if name == split)
        return np.array(features.targets)

    @property
    def refused(self) -> Counter[str]:
        """Unusable images so far, by reason, each split counted once."""
        by_split = {split: features.refused for (split, _), features in self._features.items()}
        return sum(by_split.values(), Counter())

    # -- texts ---------------------------------------------------------------------------------------------------------

    def texts(self, texts: list[str]) -> np.ndarray:
        """Returns features (N, E) of N texts."""
        return extract_texts(self.encoder.texts, texts, self.accelerator, self.options.batch_size)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C class names, in the order of the labels; empty in retrieval."""
        return self.data_set.class_names or ()

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompts for classes: those configured, else the data set's own."""
        asked = self.options.templates
        return resolve_templates(asked[0] if len(asked) == 1 else asked) if asked else self.data_set.templates

    @cached_property
    def class_weights(self) -> np.ndarray:
        """One embedding per class (C, E), as by [`class_embeddings`], from the cache on disk if they are there.

        With prompts divided among the processes; the sum over prompts has the same order for any number of them, and so
        is bit-identical.
        """
        model = self.encoder.model
        names = tuple(map(spoken, self.class_names))
        tokenizer = self.encoder.processor.tokenizer
        if self.accelerator.is_main_process:
            warn_of_confused(model, tokenizer, names, self.templates[0])
        cache = LabelCache(default_folder(), model, tokenizer, "stacked") if self.accelerator.is_main_process else None

        def kept() -> LabelEmbeddings | None:
            return None if cache is None else cache.load(names, self.templates)

        found = from_main(self.accelerator, kept)
        if found is not None:
            return found.weights.numpy()
        weights = self._encoded_classes(names)
        if cache is not None:
            cache.save(LabelEmbeddings(names, self.templates, weights, cache.fingerprint))
        return weights.numpy()

    def _encoded_classes(self, names: tuple[str, ...]) -> torch.Tensor:
        turns = range(self.accelerator.process_index, len(self.templates), self.accelerator.num_processes)
        bar = tqdm(turns, desc="prompts", leave=False, disable=not self.accelerator.is_main_process)
        mine = [(turn, self._prompted(names, self.templates[turn]).cpu()) for turn in bar]
        embeds = dict(gather_object(mine))
        return normalized(torch.stack([embeds[turn] for turn in range(len(embeds))]).sum(dim=0))

    def _prompted(self, names: tuple[str, ...], template: str) -> torch.Tensor:
        model = self.encoder.model
        return prompt_embeddings(model, self.encoder.processor.tokenizer, names, template, model.device)


def make_result(
    subject: Subject, task: str, metrics: dict[str, float], metric: str, samples: int, **more: Any
) -> Result:
    """Makes the result of a task on a subject."""
    described = subject.data_set
    refused = dict(sorted(subject.refused.items()))
    split = described.splits["test"]
    return Result(described.name, described.title, task, metric, metrics, samples, refused, split=split, **more)
