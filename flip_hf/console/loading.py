"""Models, tokenizers and processors from folders and the Hub: what is wrong with one is said in one line.

A damaged folder makes Transformers, safetensors and tokenizers raise errors of a dozen kinds, some of a hundred lines,
and few of them name the file.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from flip_hf.console.endings import one_line
from flip_hf.console.files import read_text

# Of a model's configuration, and of any other JSON file beside it: the largest tokenizers have 35 MB.
MAX_CONFIG_BYTES = 2**20
MAX_JSON_BYTES = 256 * 2**20
# Whose warnings an error's one line replaces: retries, tables of tensors.
_LOGGERS = ("huggingface_hub", "transformers")


class ModelUnreadable(ValueError, OSError):
    """A model, tokenizer or processor that cannot be loaded; the message names it, the fault and the mend."""


@contextmanager
def loading(name: str | Path, what: str = "model") -> Iterator[None]:
    """The time in which something is loaded by Transformers.

    Args:
        name: folder or Hub id.
        what: "tokenizer" or "image processor", or what begins with "model", for messages.

    Raises:
        ModelUnreadable: of whatever is raised within.
    """
    loggers = [logging.getLogger(each) for each in _LOGGERS]
    levels = [each.level for each in loggers]
    _check_files(name, what)
    try:
        for each in loggers:
            each.setLevel(max(logging.ERROR, each.level))
        yield
    except ModelUnreadable:
        raise
    except Exception as error:  # tokenizers raises no other, and damaged settings may fail anywhere
        raise ModelUnreadable(_explain(str(name), what, error)) from error
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _unreadable(name: str | Path, what: str, why: str) -> ModelUnreadable:
    return ModelUnreadable(one_line(f"The {what} {name} cannot be loaded: {why}"))


def _check_files(name: str | Path, what: str) -> None:
    """Looks at a folder's files before anything reads them: a pipe would never end, and a huge file fill the memory."""
    if os.path.isfile(name):
        raise _unreadable(name, what, "it is a file; name the folder that it is in.")
    if not os.path.isdir(name):
        return
    for path in sorted(Path(name).iterdir()):
        readable = path.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja", ".bin")
        if readable and not path.is_file() and not path.is_dir():
            raise _unreadable(name, what, f"{path.name} is no plain file; it is a broken link, a pipe or a device.")
        limit = MAX_CONFIG_BYTES if path.name == "config.json" else MAX_JSON_BYTES
        if path.suffix == ".json" and path.is_file() and path.stat().st_size > limit:
            raise _unreadable(name, what, f"{path.name} is too large, more than {limit:,} bytes.")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    seen: BaseException | None = error
    for _ in range(20):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _explain(name: str, what: str, error: Exception) -> str:
    """The message: what is wrong with a folder, or why a Hub id cannot be had."""
    why = _fault_of_folder(Path(name), what) if os.path.isdir(name) else None
    if why is None and not os.path.isdir(name) and any(isinstance(each, OSError) for each in _chain(error)):
        why = _absence(name, error)
    if why is None:
        why = _fault(error)
    return str(_unreadable(name, what, why))


def _fault(error: Exception) -> str:
    """What the error itself says."""
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({error}). Copy or download it again."
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return "its weights have other sizes than its config.json gives."
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is not run."
    said = one_line(error)
    said = said if isinstance(error, (ValueError, OSError)) and said else f"{type(error).__name__}: {said}"
    return said if said.endswith((".", "?", "!")) else f"{said}."


def _fault_of_folder(folder: Path, what: str) -> str | None:
    """The first damaged or missing file of a folder; None if all look whole."""
    is_model = what.startswith("model")
    for path in sorted(folder.glob("*.json")):
        try:
            fields = json.loads(read_text(path, "settings", MAX_JSON_BYTES))
        except (ValueError, OSError, RecursionError) as error:
            return f"{path.name} is damaged ({one_line(error)}). Copy or download it again."
        if not isinstance(fields, dict) and path.name == "config.json":
            return "its config.json holds no JSON object. Copy or download it again."
        if path.name == "config.json" and is_model:
            kind = fields.get("model_type")
            if kind is None:
                return "its config.json does not say which model it is (model_type)."
            if kind not in map(str, CONFIG_MAPPING):
                return f"its config.json is of a model of type {kind!r}, which is not known here."
    if is_model and not (folder / "config.json").is_file():
        return _fault_of_run(folder) or "it has no config.json, so that it is no model folder."
    return _fault_of_weights(folder) if is_model else None


def _fault_of_run(folder: Path) -> str | None:
    """The places of models in the folder of a run that has not ended; None if it is no such folder."""
    inside = [path.parent for path in sorted(folder.glob("checkpoint-*/config.json"))]
    if not inside:
        return None
    best = folder / "best"
    or_best = f" (or {best}, the best by its evaluations)" if (best / "config.json").is_file() else ""
    return (
        f"it is of a run that has not ended. Its newest model so far is {inside[-1]}{or_best}; to end the run, start "
        "it again with --resume_from_checkpoint auto."
    )


def _fault_of_weights(folder: Path) -> str | None:
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is damaged ({error}). Copy or download it again."
    if weights:
        return None
    if any(folder.glob("*.bin")):
        return (
            "its weights are a pickle (.bin), which may run code and is not read. Write them as safetensors, with "
            "`save_pretrained` of Transformers, where you trust them."
        )
    return "it has no weights (model.safetensors)."


def _absence(name: str, error: Exception) -> str | None:
    """Why what is named neither lies here nor comes from the Hub; None if that is not the fault."""
    if name.startswith((".", "/", "~")) or "\\" in name or not _is_hub_id(name):
        return "there is no such folder."
    mend = f"Download it once with `hf download {name}`, where there is a network, or name a local folder."
    for each in _chain(error):
        if isinstance(each, GatedRepoError):
            return (
                f"access is restricted: ask for it on https://huggingface.co/{name}, and log in with `hf auth login`."
            )
        if isinstance(each, (RepositoryNotFoundError, RevisionNotFoundError)):
            return "there is no such folder, and the Hub has none of this name, or not for you: `hf auth login`."
    if constants.HF_HUB_OFFLINE:
        return f"there is no such folder, nor a whole copy of the Hub's, which is not asked (HF_HUB_OFFLINE). {mend}"
    said = str(error)
    if re.search(r"connect|internet|timed? ?out|Name or service|resolve", said, re.IGNORECASE):
        return f"there is no such folder, nor a whole copy of the Hub's, and the Hub cannot be reached. {mend}"
    return None


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_loaded(name: str | Path, model: Any, report: dict[str, Any]) -> None:
    """Checks that every tensor of a model was in its files, and that its towers used all of theirs.

    Args:
        name: folder or Hub id.
        model: as it was loaded.
        report: of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        ModelUnreadable: tensors are missing, which would be random, or are left over.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelUnreadable(
            f"{name} holds no weights for {len(missing)} tensors of {type(model).__name__} ({missing[0]}, ...): what "
            "comes of it would be random. Give a folder with both towers, or one of a whole vision tower."
        )
    parts = {part for part, _ in model.named_children()}
    left = [key for key in report["unexpected_keys"] if key.split(".")[0] in parts and "position_ids" not in key]
    if left:
        raise ModelUnreadable(
            f"{name} holds {len(left)} tensors that its config.json has no place for ({sorted(left)[0]}, ...): the "
            "two are not of one model."
        )
