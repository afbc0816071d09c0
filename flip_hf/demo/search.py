"""Searches named pictures for those that match a text."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from flip_hf.data.decode import RefusedSample, decode_image
from flip_hf.data.files import StoredFile, files_below
from flip_hf.data.rendering import WHITE, Colour
from flip_hf.data.shapes import CLASS_NAMES, NUM_SAMPLES, generate_test
from flip_hf.demo.model import DemoModel
from flip_hf.evaluation.nearest import nearest

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
BATCH_SIZE = 32
# Side of displayed pictures, in pixels.
MAX_SHOWN = 512
MIN_SHOWN = 256


@dataclass(frozen=True)
class Picture:
    """An encoded image.

    Attributes:
        value: input of [`decode_image`].
        name: name of its file.
        label: its class, if known.
    """

    value: dict[str, object] | StoredFile
    name: str
    label: str | None = None

    def decode(self, background: Colour = WHITE) -> Image.Image:
        """Decodes the image to RGB, with transparent parts on a background.

        Raises:
            RefusedSample: it is damaged, too large, or not an image.
        """
        return decode_image(self.value, background)


def embedded_pictures() -> list[Picture]:
    """Returns the embedded test images."""
    samples = generate_test([0], NUM_SAMPLES["test"], image_size=64, seed=0)
    return [Picture(row["image"], row["image"]["path"], CLASS_NAMES[row["label"]]) for row in samples]


def pictures_below(folder: str | Path) -> list[Picture]:
    """Finds the image files of a folder and its subfolders by their extensions, without decoding them.

    Raises:
        ValueError: there is no such folder, or no image file in it.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}.")
    endings = [form for ending in EXTENSIONS for form in (ending, ending.upper())]
    paths = sorted({path for ending in endings for path in files_below(str(folder), ending)})
    if not paths:
        raise ValueError(f"{folder} has no image files ({', '.join(EXTENSIONS)}).")
    return [Picture(StoredFile(path), Path(path).name) for path in paths]


def fit_to_show(image: Image.Image) -> Image.Image:
    """Scales an image for display: shrinks a large one, and repeats the pixels of a tiny one."""
    shown = image.copy()
    shown.thumbnail((MAX_SHOWN, MAX_SHOWN))
    factor = -(-MIN_SHOWN // max(shown.size))
    return (
        shown if factor == 1 else shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    )


class ImageSearch:
    """Finds the pictures nearest to a text; each is encoded once, at the first search.

    Args:
        model: a model with texts.
        pictures: the pictures to search.
    """

    def __init__(self, model: DemoModel, pictures: Sequence[Picture]):
        self.model = model
        self.pictures = pictures
        self.refused: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._usable: list[Picture] = []
        self._embeds: torch.Tensor | None = None  # (N, E)

    def encode(self, progress: Callable[[int, int], object] = lambda done, total: None) -> torch.Tensor:
        """Encodes the pictures, skips and counts those that cannot be used, and caches the result.

        Args:
            progress: called with the number done and the total.

        Returns:
            Normalised features (N, E).

        Raises:
            ValueError: no picture can be used.
        """
        with self._lock:
            if self._embeds is None:
                self._embeds = self._encode(progress)
            return self._embeds

    def _encode(self, progress: Callable[[int, int], object]) -> torch.Tensor:
        self.refused.clear()
        self._usable = []
        found = []
        background = self.model.transform.background
        for start in range(0, len(self.pictures), BATCH_SIZE):
            progress(start, len(self.pictures))
            images = []
            for picture in self.pictures[start : start + BATCH_SIZE]:
                try:
                    # Transformed at once: a batch of whole photos would take far more memory.
                    images.append(self.model.transform(picture.decode(background)))
                    self._usable.append(picture)
                except RefusedSample as error:
                    self.refused[error.reason] += 1
            if images:
                found.append(self.model.embed_images(torch.stack(images)))
        if not found:
            raise ValueError(f"None of the {len(self.pictures)} pictures can be used ({self.reasons()}).")
        return torch.cat(found)

    def search(self, text: str, count: int) -> list[tuple[Image.Image, str, float]]:
        """Finds the `count` pictures nearest to a text, best first, each with its class or name and cosine similarity.

        Raises:
            ValueError: see [`ImageSearch.encode`].
        """
        embeds = self.encode()
        scores, indices = nearest(self.model.embed_text(text)[None].numpy(), [embeds.numpy()], count)
        answers = []
        for score, index in zip(scores[0].tolist(), indices[0].tolist(), strict=True):
            picture = self._usable[index]
            try:
                shown = fit_to_show(picture.decode(self.model.transform.background))
                answers.append((shown, picture.label or picture.name, score))
            except RefusedSample:  # its file has changed since it was encoded
                continue
        return answers

    def reasons(self) -> str:
        """Describes why pictures were skipped."""
        return ", ".join(f"{count} {reason}" for reason, count in self.refused.most_common())
