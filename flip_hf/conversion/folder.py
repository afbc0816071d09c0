"""Writes the folder of a conversion, with weights, processor and card, completely or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from flip_hf.console.files import share_weights
from flip_hf.conversion.errors import ConversionError, reason
from flip_hf.conversion.lineage import base_model_of

# The writer holds one file of this size in memory beside the model.
MAX_SHARD_SIZE = "2GB"


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        model: the model, in evaluation mode.
        processor: its processor, or None if the source had none.
        title: the title of the card.
        about: Markdown paragraphs of the card.
        data: the card's metadata.
    """

    model: PreTrainedModel
    processor: ProcessorMixin | BaseImageProcessor | PreTrainedTokenizerBase | None
    title: str
    about: str
    data: ModelCardData

    def save(self, folder: Path) -> None:
        """Writes everything into a folder.

        Raises:
            OSError: it cannot be written.
        """
        with writing(folder):
            self.model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        ModelCard(f"---\n{self.data.to_yaml()}\n---\n\n# {self.title}\n\n{self.about}\n").save(folder / "README.md")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns safetensors' own error, for example on a full disk, into an OSError, and shares what was written.

    Raises:
        OSError: a weights file cannot be written.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"The weights cannot be written to {folder}: {reason(error)}.") from error
    share_weights(folder)


def card_data(source: str | None = None, **kwargs: Any) -> ModelCardData:
    """Makes a card's metadata.

    Args:
        source: what was converted; the Hub model that it is, or came from, becomes the `base_model`.
        kwargs: more fields of `ModelCardData`.
    """
    base = base_model_of(source) if source is not None else None
    if base is not None:
        kwargs["base_model"] = base
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["flip", "clip", "vision"],
        **kwargs,
    )


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a folder to write into that becomes `path` on success, and is removed on failure.

    Parent folders that were created are removed, too.

    Raises:
        ConversionError: `path` already exists and is not an empty folder, or it cannot be created.
    """
    path = Path(path)
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        raise ConversionError(f"{path} exists already and is not an empty folder. Choose another name or remove it.")
    parent = path.absolute().parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name[:64]}.", dir=parent))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be created: {reason(error)}.") from error
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            scratch.replace(path)
        except OSError as error:
            raise ConversionError(
                f"{path} was created by something else in the meantime ({reason(error)}). Choose another name."
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # in use by now
                folder.rmdir()
