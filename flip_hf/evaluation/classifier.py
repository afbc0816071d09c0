"""Zero-shot classification that encodes labels once, for many labels, many prompts, many images.

Transformers' zero-shot pipeline encodes every label again for every image, and takes one prompt. For a thousand labels
and 80 prompts that is 80,000 texts per image; here it is 80,000 texts once.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from flip_hf.console.loading import check_loaded, loading
from flip_hf.data.decode import open_picture
from flip_hf.evaluation.encoder import ImageTransform
from flip_hf.evaluation.fingerprints import text_fingerprint
from flip_hf.evaluation.label_cache import LabelCache
from flip_hf.evaluation.labels import LabelEmbeddings
from flip_hf.evaluation.templates import check_labels, resolve_templates
from flip_hf.evaluation.zero_shot import (
    check_alternatives,
    class_embeddings,
    label_probabilities,
    normalized,
    warn_of_confused,
)

# A PIL image, an array (H, W, C), a path or a URL.
ImageSource = Image.Image | np.ndarray | str | Path


class LabelScore(TypedDict):
    """A label and its probability."""

    label: str
    score: float


class ZeroShotClassifier:
    r"""Classifies images by labels in words, like the zero-shot pipeline, but encodes the labels once.

    Args:
        model: a FlipModel or another model like CLIP: `get_text_features`, `get_image_features`, softmax over labels.
        processor: its processor, with an image processor and a tokenizer.
        device: device to move the model to; by default it stays where it is.
        cache_dir: folder that caches label embeddings as safetensors between runs; in memory they are always cached.

    Raises:
        ValueError: the model is like SigLIP, whose labels are not alternatives.

    Example:

    ```python
    >>> classify = ZeroShotClassifier.from_pretrained("runs/shapes")
    >>> classify(["a.jpg", "b.jpg"], labels=["red circle", "blue square"], templates="clip_80", top_k=1)
    ```
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        device: torch.device | str | None = None,
        cache_dir: str | Path | None = None,
    ):
        check_alternatives(model)
        self.model = model.eval() if device is None else model.eval().to(device)
        self.processor = processor
        self.transform = ImageTransform(processor.image_processor)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._kept: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[Tensor, int]] = {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: torch.device | str | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> "ZeroShotClassifier":
        """Loads model and processor from a folder or Hub id.

        Args:
            name_or_path: the folder or id.
            device, cache_dir: see [`ZeroShotClassifier`].
            kwargs: `dtype`, `revision`, `attn_implementation`, ... for the model's `from_pretrained`.

        Raises:
            ModelUnreadable: there is no such model, or it is damaged or has no processor.
        """
        # Without trust_remote_code, Transformers asks at the terminal whether to run code.
        options = {"trust_remote_code": False, "use_safetensors": True, **kwargs, "output_loading_info": True}
        shared = {name: options[name] for name in ("revision", "token", "trust_remote_code") if name in options}
        with loading(name_or_path):
            model, report = AutoModelForZeroShotImageClassification.from_pretrained(name_or_path, **options)
        check_loaded(name_or_path, model, report)
        with loading(name_or_path, "processor"):
            processor = AutoProcessor.from_pretrained(name_or_path, **shared)
        return cls(model, processor, device=device, cache_dir=cache_dir)

    # -- labels -------------------------------------------------------------------------------------------------------

    def _version(self) -> int:
        """Returns a value that changes when the text tower is trained, loaded or moved."""
        return hash(tuple((id(p), p._version, p.device) for p in self.model.parameters()))

    def fingerprint(self) -> str:
        """Returns a digest of the text tower and the tokenizer, which identifies label embeddings."""
        return text_fingerprint(self.model, self.processor.tokenizer)

    def encode_labels(self, labels: Sequence[str], templates: str | Sequence[str] = "clip_1") -> LabelEmbeddings:
        """Embeds labels as the normalised mean over templates of normalised text embeddings; cached.

        Args:
            labels: C names.
            templates: a set by name (`"clip_1"`, CLIP's single one; `"clip_7"`; `"clip_80"`), a template, or several.

        Raises:
            ValueError: there are no labels, one is repeated, or a template has no `{}`.
        """
        check_labels(labels)
        labels = tuple(labels)
        templates = resolve_templates(templates)
        warn_of_confused(self.model, self.processor.tokenizer, labels, templates[0])
        cache = LabelCache(self.cache_dir, self.model, self.processor.tokenizer, "one by one")
        found = cache.load(labels, templates)
        if found is not None:
            return found
        bar = tqdm(templates, desc="encoding labels", unit="template", disable=None if len(templates) > 1 else True)
        weights = class_embeddings(self.model, self.processor.tokenizer, labels, bar, self.model.device)
        embeddings = LabelEmbeddings(labels, templates, weights.cpu(), cache.fingerprint)
        cache.save(embeddings)
        return embeddings

    def _check(self, embeddings: LabelEmbeddings, fingerprint: str) -> LabelEmbeddings:
        if embeddings.fingerprint != fingerprint:
            raise ValueError(
                "These label embeddings were made by another model or tokenizer. Encode the labels again with "
                "encode_labels."
            )
        return embeddings

    def _weights(self, labels: "Sequence[str] | LabelEmbeddings", templates: str | Sequence[str]) -> Tensor:
        """Returns label embeddings (C, E) on the model's device, encoded only if new or the model has changed."""
        given = isinstance(labels, LabelEmbeddings)
        key = (labels.labels, labels.templates) if given else (tuple(labels), resolve_templates(templates))
        version = self._version()
        kept = self._kept.get(key)
        if kept is not None and kept[1] == version and not given:
            return kept[0]
        embeddings = self._check(labels, self.fingerprint()) if given else self.encode_labels(*key)
        weights = embeddings.weights.to(self.model.device)
        self._kept[key] = weights, version
        return weights

    # -- images -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, images: Sequence[ImageSource], weights: Tensor) -> Tensor:
        """Returns probabilities (B, C) of labels (C, E) for a batch of B PIL images, arrays, paths or URLs.

        Raises:
            ValueError: a file cannot be read or is not an image; the message names it.
        """
        # One by one: a batch of decoded photographs would take gigabytes.
        pixel_values = torch.stack([self.transform(self._opened(image)) for image in images])
        pixel_values = pixel_values.to(device=self.model.device, dtype=self.model.dtype)
        embeds = normalized(self.model.get_image_features(pixel_values=pixel_values).pooler_output)  # (B, E)
        return label_probabilities(self.model, embeds, weights)

    def _opened(self, image: ImageSource) -> Image.Image | np.ndarray:
        """Opens a path or URL; returns anything else as it is."""
        return open_picture(str(image), self.transform.background) if isinstance(image, (str, Path)) else image

    def __call__(
        self,
        images: ImageSource | Iterable[ImageSource],
        labels: "Sequence[str] | LabelEmbeddings",
        templates: str | Sequence[str] = "clip_1",
        *,
        top_k: int | None = None,
        batch_size: int = 64,
    ) -> list[LabelScore] | list[list[LabelScore]]:
        """Classifies images.

        Args:
            images: one image or an iterable of them: PIL images, arrays (H, W, C), paths or URLs.
            labels: names, or the output of `encode_labels`.
            templates: see [`ZeroShotClassifier.encode_labels`]; not used with encoded labels.
            top_k: number of labels to return; all by default.
            batch_size: images encoded at once.

        Returns:
            For one image, a list of `{"label", "score"}`, best first; for several, a list of such lists.
        """
        if not isinstance(labels, LabelEmbeddings):
            check_labels(labels)
        names = labels.labels if isinstance(labels, LabelEmbeddings) else tuple(labels)
        weights = self._weights(labels, templates)
        one = isinstance(images, (str, Path, Image.Image)) or getattr(images, "ndim", 4) == 3
        several: Iterable[ImageSource] = [images] if one else images  # pyright: ignore[reportAssignmentType]
        answers: list[list[LabelScore]] = []
        for batch in _batches(several, batch_size):
            best = self.scores(batch, weights).topk(min(top_k or len(names), len(names)), dim=1)
            for scores, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                answers.append([{"label": names[i], "score": s} for s, i in zip(scores, indices, strict=True)])
        return answers[0] if one else answers


def _batches(items: Iterable[ImageSource], size: int) -> Iterable[list[ImageSource]]:
    batch: list[ImageSource] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
