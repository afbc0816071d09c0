"""The folder that a conversion writes: weights, processor, card; whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from flip_hf.conversion.tables import ConversionError

# Several files of this size: the writer holds one of them in memory beside the model.
MAX_SHARD_SIZE = "2GB"


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        model: the model, in evaluation mode.
        processor: its processor, or None where the source had none.
        title: the card's first line.
        about: Markdown paragraphs of the card.
        data: the card's metadata.
    """

    model: Any
    processor: Any
    title: str
    about: str
    data: ModelCardData

    def save(self, folder: Path) -> None:
        """Writes everything into a folder."""
        self.model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        ModelCard(f"---\n{self.data.to_yaml()}\n---\n\n# {self.title}\n\n{self.about}\n").save(folder / "README.md")


def card_data(source: str | None = None, **kwargs: Any) -> ModelCardData:
    """A card's metadata.

    Args:
        source: what was converted; named as `base_model` if it is a Hub id and not a local path.
        kwargs: further fields of `ModelCardData`.
    """
    if source is not None and not Path(source).exists():
        kwargs["base_model"] = source
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["flip", "clip", "vision"],
        **kwargs,
    )


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when all went well and vanishes when not.

    Raises:
        ConversionError: there is something at `path` already.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConversionError(f"{path} exists already and is not an empty folder. Choose another name or remove it.")
    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        scratch.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
