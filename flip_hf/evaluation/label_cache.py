"""Keeps the embeddings of class prompts on disk between evaluations.

A file is found by the content of everything that decides its numbers: the text tower's weights and settings, the
tokenizer, the names, the prompts, the kind of device and the version of torch. Another model under the same name, or
other prompts, never find it.
"""

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from flip_hf.evaluation.fingerprints import text_fingerprint
from flip_hf.evaluation.labels import FORMAT, LabelEmbeddings

logger = logging.getLogger(__name__)

# The folder, in place of the one below HF_HOME; empty for none.
VARIABLE = "FLIP_HF_CACHE"
# Of all files together; those that were not used for longest are removed.
MAX_BYTES = 256 * 2**20


def default_folder() -> Path | None:
    """Returns the folder for label embeddings: below $FLIP_HF_CACHE, else below HF_HOME; None if that is empty."""
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    root = Path(constants.HF_HOME) / "flip_hf" if named is None else Path(named).expanduser()
    return root / "labels"


class LabelCache:
    """The embeddings of labels by one model, in files of a folder.

    Args:
        folder: the folder, which may not exist yet; None keeps nothing.
        model: the model.
        tokenizer: its tokenizer. Nothing is kept for one in Python alone, whose content cannot all be read off.
        summed: how the embeddings of prompts are added up, as its order decides the last bits.
    """

    def __init__(self, folder: Path | None, model: Any, tokenizer: Any, summed: str):
        self.folder = folder if getattr(tokenizer, "is_fast", False) else None
        self.fingerprint = text_fingerprint(model, tokenizer)
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        self._made_by = [FORMAT, self.fingerprint, model.device.type, attention, torch.__version__, summed]

    def _path(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Path | None:
        if self.folder is None:
            return None
        key = hashlib.sha256(json.dumps([*self._made_by, labels, templates]).encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def load(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> LabelEmbeddings | None:
        """Returns the embeddings of labels, or None if they are not there; a damaged file counts as not there."""
        path = self._path(labels, templates)
        if path is None:
            return None
        try:
            if not path.is_file():
                return None
            found = LabelEmbeddings.load(path)
        except (ValueError, OSError) as error:
            logger.warning("%s The labels are encoded again.", error)
            return None
        if (found.labels, found.templates, found.fingerprint) != (labels, templates, self.fingerprint):
            logger.warning("%s holds other label embeddings than its name says. The labels are encoded again.", path)
            return None
        with suppress(OSError):
            os.utime(path)  # used: one of the last to be removed
        return found

    def save(self, embeddings: LabelEmbeddings) -> None:
        """Keeps embeddings, if the folder can be written; a reader meets the whole file or none."""
        path = self._path(embeddings.labels, embeddings.templates)
        if path is None:
            return
        scratch = path.with_suffix(f".{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            embeddings.save(scratch)
            scratch.replace(path)
        except Exception as error:  # safetensors has an error of its own for a full disk
            logger.warning("Label embeddings could not be kept in %s: %s.", path.parent, error)
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            return
        with suppress(OSError):  # another evaluation may remove the same files
            _remove_oldest(path.parent, path)


def _remove_oldest(folder: Path, newest: Path) -> None:
    """Removes the files that were not used for longest, until the others have at most [`MAX_BYTES`]."""
    files = [(file.stat().st_mtime_ns, file.stat().st_size, file) for file in folder.glob("*.safetensors")]
    held = sum(size for _, size, _ in files)
    for _, size, file in sorted(files, key=lambda each: each[0]):
        if held > MAX_BYTES and file != newest:
            file.unlink(missing_ok=True)
            held -= size
