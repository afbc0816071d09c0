"""Searches a folder of features by texts and pictures, with its index or exactly."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flip_hf.data.decode import open_picture
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.fingerprints import model_fingerprint
from flip_hf.evaluation.nearest import nearest
from flip_hf.evaluation.plots import plot_retrieval_grid
from flip_hf.evaluation.spread import THUMBNAIL, pictures_at
from flip_hf.retrieval.folder import MANIFEST, Manifest, read_manifest
from flip_hf.retrieval.index import open_index
from flip_hf.retrieval.opening import open_again
from flip_hf.retrieval.parts import read_features, read_samples
from flip_hf.retrieval.texts import have_tokens

# Pictures of a row of the contact sheet.
MAX_SHOWN = 12


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        score: cosine similarity to the query.
        key: the picture's key in its data set.
        shard, row: its place there.
        captions: its captions, if the data have them.
    """

    score: float
    key: str
    shard: int
    row: int
    captions: list[str]


class EmbeddedData:
    """A finished folder of `flip-hf embed` and its model.

    Args:
        folder: the folder.
        model: folder or Hub id of the model, where it no longer has the name that it had.
        exact: compares with every feature, even if there is an index.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: it is not finished, a file is missing or damaged, or the model is another one.
        ModuleNotFoundError: it has an index, and FAISS is not installed.
    """

    def __init__(self, folder: Path, *, model: str | None = None, exact: bool = False):
        self.folder = folder
        self.manifest = _finished(folder)
        self._index: Any = None
        if self.manifest.index is not None and not exact:
            size = (self.manifest.images, self.manifest.width)
            self._index = open_index(folder, self.manifest.index, size)
        self.encoder = _encoder_of(self.manifest, model)
        rows = [each["rows"] for each in self.manifest.files.values()]
        self._ends = list(itertools.accumulate(rows))

    def encode(self, texts: Sequence[str], pictures: Sequence[str]) -> np.ndarray:
        """Encodes queries: texts, then pictures given by path or URL, to (Q, E), float32.

        Raises:
            ValueError: a picture cannot be used, or the tokenizer makes nothing of a text; the message names it.
        """
        encoder = self.encoder
        for text, usable in zip(texts, have_tokens(encoder, texts) if texts else [], strict=True):
            if not usable:
                raise ValueError(f"The model's tokenizer knows no word of the text {text!r}: use other words.")
        background = encoder.transform.background
        found = [encoder.texts(texts)] if texts else []
        with torch.no_grad():
            for picture in pictures:
                pixels = encoder.transform(open_picture(picture, background))[None].to(encoder.model.device)
                found.append(encoder.images(pixels))
        return torch.cat(found).float().cpu().numpy()

    def search(self, queries: np.ndarray, count: int) -> list[list[Hit]]:
        """Finds the `count` nearest pictures to each query (Q, E), best first."""
        if self._index is None:
            scores, numbers = nearest(queries, self._features(), count)
        else:
            scores, numbers = self._index.search(queries, count)
        return [self._hits(*row) for row in zip(scores, numbers, strict=True)]

    def _features(self) -> Iterator[np.ndarray]:
        return itertools.chain.from_iterable(
            read_features(self.folder / name, self.manifest.width, about["rows"])
            for name, about in self.manifest.files.items()
        )

    def _hits(self, scores: np.ndarray, numbers: np.ndarray) -> list[Hit]:
        """Looks up samples by their number over all files; an index marks places that it could not fill with -1."""
        names = list(self.manifest.files)
        by_file: dict[int, list[int]] = {}
        for place, number in enumerate(numbers.tolist()):
            if number >= 0:
                by_file.setdefault(int(np.searchsorted(self._ends, number, side="right")), []).append(place)
        hits: dict[int, Hit] = {}
        for file, places in by_file.items():
            begin = self._ends[file - 1] if file else 0
            samples = read_samples(self.folder / names[file], [int(numbers[place]) - begin for place in places])
            for place, sample in zip(places, samples, strict=True):
                hits[place] = Hit(float(scores[place]), **sample)
        return [hits[place] for place in sorted(hits)]

    def draw(self, queries: Sequence[Any], found: Sequence[Sequence[Hit]], path: Path) -> None:
        """Draws the pictures of hits, a row for each query, as far as the data set can still be opened.

        Args:
            queries: texts or PIL images.
            found: the hits of each query.
            path: the picture's file.

        Raises:
            ValueError, OSError: the data set cannot be opened.
        """
        source = open_again(self.manifest.data)
        shown = [hits[:MAX_SHOWN] for hits in found]
        places = {(hit.shard, hit.row) for hits in shown for hit in hits}
        pictures = pictures_at(source, places, THUMBNAIL, self.encoder.transform.background)
        missing = "no longer there"
        cells = [[(pictures.get((hit.shard, hit.row), missing), None) for hit in hits] for hits in shown]
        plot_retrieval_grid(queries, cells, path)


def _finished(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if not manifest.finished:
        raise ValueError(f"{folder} is not finished: give the command that began it again; it resumes.")
    missing = [name for name in manifest.files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {missing[0]}: give the command that made the folder again; it restores the file."
        )
    if sum(about["rows"] for about in manifest.files.values()) != manifest.images:
        raise ValueError(
            f"{folder / MANIFEST} is damaged: its numbers of pictures differ. Embed the data again, into a new folder."
        )
    if not manifest.images:
        raise ValueError(f"{folder} has no features: no picture of the data could be used.")
    return manifest


def _encoder_of(manifest: Manifest, model: str | None) -> Encoder:
    """Loads the model of a folder, in the precision of its features.

    Raises:
        ValueError: the model cannot be loaded, or is another one.
    """
    name = model or manifest.model["name"]
    dtype = torch.bfloat16 if manifest.options["precision"] == "bf16" else torch.float32
    revision = None if model is not None or Path(name).is_dir() else manifest.model["revision"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = Encoder.from_pretrained(
        name, device=device, dtype=dtype, **({} if revision is None else {"revision": revision})
    )
    digests = model_fingerprint(encoder.model, encoder.processor, manifest.model)
    changed = [part for part, digest in digests.items() if manifest.model.get(part) != digest]
    if changed:
        raise ValueError(
            f"{name} is not the model of these features: its {', '.join(changed)} differ. Name the right one with "
            "--model, or embed the data again."
        )
    return encoder
