"""Prepares a complete folder that is ready to upload from the folder of a run or a conversion."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.models.auto.image_processing_auto import AutoImageProcessor

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.clip import convert_to_clip
from flip_hf.hub.card import forget_text, write_card
from flip_hf.hub.code import is_ours, named_classes, write_code
from flip_hf.hub.records import clean_text, copy_records
from flip_hf.hub.regular import NotRegularError, RegularFiles
from flip_hf.hub.weights import INDEX, check_weights, weight_files
from flip_hf.modeling import FlipForPreTraining, FlipModel, FlipProcessor
from flip_hf.redaction import found_tokens, redact

# Published files are listed by name and maximum size, here and in records.py. Nothing else in the folder is published,
# such as optimizer states, other people's scripts, or keys.
MIB = 2**20
IMAGE_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# JSON files that define the model.
CONFIGURATION = {
    **{"config.json": MIB, INDEX: 64 * MIB, "tokenizer_config.json": 16 * MIB, "special_tokens_map.json": MIB},
    **dict.fromkeys(IMAGE_PROCESSOR, MIB),
}
# Files in which no word may change.
VOCABULARY = dict.fromkeys(("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"), 256 * MIB)
OURS = "flip"


class FolderError(ValueError):
    """A folder cannot be published; the message says why and what to do."""


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

    Checkpoints and all other files in the folder are skipped, and no link is followed. Tokens, passwords and signed
    URLs are removed from every text; any other file that contains one is skipped. Warnings report both.

    Args:
        folder: a saved model: the folder of a run or a conversion, or a checkpoint of a run.
        target: the folder to make; must be empty or not exist.
        repo_id: the repository to publish to, `owner/name`; the card's examples name it.
        license: identifier of the weights' licence, for the card.
        export_clip: publish a stock CLIPModel, which needs none of our code.
        logs: folder of logs and card, if not `folder`: that of a run in progress.
        link: make hard links to the weights instead of copies, for a target that does not outlive the folder.

    Returns:
        The target.

    Raises:
        FolderError: the folder has no complete and finite model, or has foreign code, CLIPModel does not support its
            architecture, or a name is invalid. The target is then empty.
    """
    folder = Path(folder)
    target = Path(target)
    if repo_id is not None and "/" not in repo_id:
        raise FolderError(f"{repo_id!r} names no owner, so the card could not name the model. Give OWNER/{repo_id}.")
    if target.exists() and any(target.iterdir()):
        raise FolderError(f"{target} is not empty. Choose another name or remove it.")
    files = RegularFiles(folder)
    _check(files)
    target.mkdir(parents=True, exist_ok=True)
    try:
        _copy_model(files, target, export_clip, link)
        copy_records(files, RegularFiles(Path(logs or folder)), target)
        if export_clip:
            forget_text(target)  # it describes the FlipModel
        write_card(target, repo_id=repo_id, license=license)
    except Exception as error:
        _empty(target)  # half a folder could be taken for a complete one
        if isinstance(error, FolderError) or not isinstance(error, (ValueError, OSError)):
            raise
        raise FolderError(redact(str(error))) from error
    return target


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, on the file system of another folder if possible, so that hard links work."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".push-", dir=folder.absolute().parent)
    except OSError:
        scratch = tempfile.TemporaryDirectory()
    with scratch as path:
        yield Path(path)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def _copy_model(files: RegularFiles, target: Path, export_clip: bool, link: bool) -> None:
    """Copies weights, configuration, processor and code, or makes them from the model if some are missing."""
    if not export_clip and _is_whole(files):
        return _copy_files(files, target, link)
    # Loading a model follows links, so it is given checked copies.
    with scratch_beside(target) as scratch:
        _copy_files(files, scratch, link=True)
        try:
            if export_clip:
                return convert_to_clip(str(scratch)).save(target)
            # A checkpoint, which holds no code.
            reconstructs = _json(files, "config.json")["model_type"] == "flip_pretraining"
            (FlipForPreTraining if reconstructs else FlipModel).from_pretrained(scratch).save_pretrained(target)
            with_text = any(files.has(name) for name in TOKENIZER)
            processor_class = FlipProcessor if with_text else AutoImageProcessor
            processor_class.from_pretrained(scratch, trust_remote_code=False).save_pretrained(target)
        except (ValueError, OSError) as error:
            raise FolderError(str(error).replace(str(scratch), str(files.root))) from error


def _copy_files(files: RegularFiles, target: Path, link: bool) -> None:
    """Copies the files of a model unchanged, and searches them for secrets."""
    classes: set[str] = set()
    for name, limit in CONFIGURATION.items():
        data = _model_file(files, name, limit)
        if data is not None:
            clean = clean_text(data, files.root / name)
            classes.update(named_classes(_parsed(clean, files.root / name)))
            (target / name).write_bytes(clean)
    _check_classes(classes, files.root)
    write_code(classes, files, target)
    for name, limit in VOCABULARY.items():
        data = _model_file(files, name, limit)
        if data is not None:
            found = found_tokens(data.decode("utf-8", errors="replace"))
            if found:
                raise FolderError(
                    f"{files.root / name} contains something like a {found[0]}, and a vocabulary must not change. "
                    "Learn the tokenizer from texts without it."
                )
            (target / name).write_bytes(data)
    index = target / INDEX
    for name, tensors in weight_files(index.read_bytes() if index.is_file() else None).items():
        files.place(name, target / name, link=link)
        check_weights(target / name, tensors)


def _model_file(files: RegularFiles, name: str, limit: int) -> bytes | None:
    """Reads a file of the model, or returns None if there is none. A link is an error, not a missing file."""
    try:
        return files.read(name, limit)
    except FileNotFoundError:
        return None
    except NotRegularError as error:
        raise FolderError(f"{error} Only plain files are published: put a copy in its place.") from error


def _check_classes(classes: set[str], folder: Path) -> None:
    foreign = sorted(named for named in classes if not is_ours(named))
    if foreign:
        raise FolderError(
            f"The configuration in {folder} names code that this package does not have: {', '.join(foreign[:3])}. It "
            "would run wherever the model is loaded and is not published: remove it from auto_map or custom_pipelines."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Completeness
# ---------------------------------------------------------------------------------------------------------------------


def _json(files: RegularFiles, name: str) -> JsonObject:
    """Reads a JSON object of the model; empty if there is no such file."""
    data = _model_file(files, name, CONFIGURATION[name])
    return {} if data is None else _parsed(data, files.root / name)


def _parsed(data: bytes, path: Path) -> JsonObject:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise FolderError(f"{path} is damaged: it is not a JSON object.")
    return value


def _check(files: RegularFiles) -> None:
    """Checks that model, weights and processor are there.

    Raises:
        FolderError: one is missing.
    """
    folder = files.root
    config = _json(files, "config.json") if folder.is_dir() else {}
    if not isinstance(config.get("model_type"), str):
        raise FolderError(f"{folder} is not a model folder: it has no config.json that names a model type.")
    try:
        weights = weight_files(_model_file(files, INDEX, CONFIGURATION[INDEX]))
    except ValueError as error:
        raise FolderError(f"{folder}: {error}") from error
    missing = sorted(name for name in weights if not (folder / name).exists())
    if missing:
        raise FolderError(
            f"{folder} has no {', '.join(missing)}. Only safetensors are published, and the checkpoints of sharded "
            "runs have none: publish the folder that the run writes at its end."
        )
    for name in weights:
        _check_regular(files, name)
    if "text_config" in config:
        for names, what in ((IMAGE_PROCESSOR, "image processor"), (TOKENIZER, "tokenizer")):
            if not any((folder / name).is_file() for name in names):
                raise FolderError(
                    f"{folder} has no {what}, so no pipeline could use it. Save the processor beside the model: "
                    f"`processor.save_pretrained({str(folder)!r})`."
                )


def _check_regular(files: RegularFiles, name: str) -> None:
    try:
        with files.open(name):
            return
    except NotRegularError as error:
        raise FolderError(f"{error} Only plain files are published: put a copy in its place.") from error


def _is_whole(files: RegularFiles) -> bool:
    """Returns whether the configuration names the model's class, unlike a checkpoint's; only ours need to."""
    config = _json(files, "config.json")
    if not config["model_type"].startswith(OURS):
        return True
    auto_map = config.get("auto_map")
    return isinstance(auto_map, dict) and any(name.startswith("AutoModel") for name in auto_map)
