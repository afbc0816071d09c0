"""A folder that is complete and ready to upload, made from one that a run or a conversion left."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from flip_hf.conversion.clip import convert_to_clip
from flip_hf.hub.card import CARD, forget_text, write_card
from flip_hf.modeling import FlipForPreTraining, FlipModel, FlipProcessor
from flip_hf.redaction import redact

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
IMAGE_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# What makes the model. Anything else in the folder is not published: optimizer states, other people's scripts.
MODEL = (
    *("config.json", "model.safetensors.index.json", "*_flip.py", *IMAGE_PROCESSOR, *TOKENIZER),
    *("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json"),
)
# What tells how it came about.
LOGS = ("log.jsonl", "logs/**/events.out.tfevents.*", CARD, "LICENSE*")
RECORDS = (
    *("recipe.yaml", "results.json", "training_curves.png", "evaluation/**/*.json", "evaluation/**/*.md"),
    *("evaluation/**/*.png", *LOGS),
)
TEXT = {".json", ".jsonl", ".md", ".py", ".txt", ".yaml", ""}
OURS = "flip"


class FolderError(ValueError):
    """A folder cannot be published; the message says why, and what to do."""


def prepare(
    folder: str | Path,
    target: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    export_clip: bool = False,
    logs: str | Path | None = None,
    link: bool = False,
) -> Path:
    """Makes a folder that is complete and ready to upload: model, processor, code, card, recipe, curves, logs, results.

    Checkpoints and whatever else lies in the folder stay behind. Tokens, passwords and signed URLs are taken out of
    every text; any other file that has one is left out, with a warning.

    Args:
        folder: a saved model; what a run or a conversion left, or a checkpoint of a run.
        target: the folder to make; must be empty or not exist.
        repo_id: where it is going to be, `owner/name`; the card's examples name it.
        license: identifier of the weights' licence, for the card.
        export_clip: make a stock CLIPModel of it, which needs no code of ours.
        logs: where logs and a card are, if not in the folder: that of a run under way.
        link: link the weights instead of copying them, for a target that does not outlive the folder.

    Returns:
        The target.

    Raises:
        FolderError: the folder holds no complete model, CLIPModel has not its architecture, or a name does not fit.
    """
    folder, target = Path(folder), Path(target)
    if repo_id is not None and "/" not in repo_id:
        raise FolderError(
            f"{repo_id!r} names no owner, and the card could not say where the model is: OWNER/{repo_id}."
        )
    if target.exists() and any(target.iterdir()):
        raise FolderError(f"{target} is not empty. Choose another name or remove it.")
    _check(folder)
    target.mkdir(parents=True, exist_ok=True)
    try:
        _copy_model(folder, target, export_clip, link)
        for path, name in (*_found(Path(logs or folder), LOGS), *_found(folder, RECORDS)):
            _copy(path, target / name)
        if export_clip:
            forget_text(target)  # it is about the FlipModel
        write_card(target, repo_id=repo_id, license=license)
    except (ValueError, OSError) as error:
        raise FolderError(str(error)) from error
    return target


def _copy_model(folder: Path, target: Path, export_clip: bool, link: bool) -> None:
    """Weights, configuration, processor and code; made of the model where they are not all there."""
    if export_clip:
        return convert_to_clip(str(folder)).save(target)
    if _has_code(folder):
        for path, name in _found(folder, MODEL):
            _copy(path, target / name)
        for path, name in _found(folder, WEIGHTS):
            _place(path, target / name, link)
        return
    # A checkpoint, which holds no code.
    reconstructs = _read(folder / "config.json")["model_type"] == "flip_pretraining"
    (FlipForPreTraining if reconstructs else FlipModel).from_pretrained(folder).save_pretrained(target)
    with_text = any((folder / name).is_file() for name in TOKENIZER)
    (FlipProcessor if with_text else AutoImageProcessor).from_pretrained(folder).save_pretrained(target)


def _found(folder: Path, patterns: tuple[str, ...]) -> Iterator[tuple[Path, Path]]:
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                yield path, path.relative_to(folder)


def _copy(path: Path, target: Path) -> None:
    """Copies a small file without what looks like a token."""
    data = path.read_bytes()
    # Of other files than texts, every byte is looked at as a character.
    text = data.decode("utf-8" if path.suffix in TEXT else "latin-1", errors="surrogateescape")
    clean = redact(text)
    if clean != text and path.suffix not in TEXT:
        logger.warning("%s holds something like a token and is left out.", path)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(clean.encode("utf-8", errors="surrogateescape") if clean != text else data)


def _place(path: Path, target: Path, link: bool) -> None:
    if link:
        try:
            return target.symlink_to(path.resolve())
        except OSError:
            pass  # not every file system has links
    shutil.copyfile(path, target)


# ---------------------------------------------------------------------------------------------------------------------
# What a complete folder has
# ---------------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check(folder: Path) -> None:
    """Raises a FolderError if model, weights or processor are missing."""
    config = _read(folder / "config.json")
    if "model_type" not in config:
        raise FolderError(f"{folder} is no model folder: it has no config.json that names a model type.")
    index = _read(folder / "model.safetensors.index.json")
    weights = set(index.get("weight_map", {}).values()) or {"model.safetensors"}
    missing = sorted(name for name in weights if not (folder / name).is_file())
    if missing:
        raise FolderError(
            f"{folder} has no {', '.join(missing)}. Only safetensors are published, and the checkpoints of sharded "
            "runs have none: publish the folder that the run leaves at its end."
        )
    if "text_config" in config:
        for names, what in ((IMAGE_PROCESSOR, "image processor"), (TOKENIZER, "tokenizer")):
            if not any((folder / name).is_file() for name in names):
                raise FolderError(
                    f"{folder} has no {what}, and no pipeline could use it. Save the processor beside the model: "
                    f"`processor.save_pretrained({str(folder)!r})`."
                )


def _has_code(folder: Path) -> bool:
    """Whether the files are there that the model's classes are in; other models than ours need none."""
    config, processor = _read(folder / "config.json"), _read(folder / "processor_config.json")
    if not config["model_type"].startswith(OURS):
        return True
    auto_map = {**processor.get("auto_map", {}), **config.get("auto_map", {})}
    files = {f"{name.split('.')[0]}.py" for name in auto_map.values()}
    return any(name.startswith("AutoModel") for name in auto_map) and all((folder / name).is_file() for name in files)
