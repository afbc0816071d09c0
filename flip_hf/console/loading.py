"""Loading models, tokenizers and processors from folders and the Hub, with one-line errors.

A damaged folder makes Transformers, safetensors and tokenizers raise a dozen kinds of errors, some of a hundred lines,
and few of them name the file.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from flip_hf.console.endings import one_line
from flip_hf.console.files import read_text
from flip_hf.console.json_types import JsonObject

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ModelT = TypeVar("ModelT", bound="PreTrainedModel")
# For a model's configuration, and for any other JSON file beside it: the largest tokenizers have 35 MB.
MAX_CONFIG_BYTES = 2**20
MAX_JSON_BYTES = 256 * 2**20
# Loggers whose warnings (retries, tables of tensors) the one line of an error replaces.
_LOGGERS = ("huggingface_hub", "transformers")


class ModelUnreadable(ValueError, OSError):
    """A model, tokenizer or processor cannot be loaded; the message names it, the fault and the fix."""


@contextmanager
def loading(name: str | Path, what: str = "model") -> Iterator[None]:
    """Context in which Transformers loads something, that turns errors into one line.

    Args:
        name: folder or Hub id.
        what: "tokenizer", "image processor", or a phrase that begins with "model", for messages.

    Raises:
        ModelUnreadable: in place of any error raised inside.
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
    except Exception as error:  # tokenizers raises plain Exceptions, and damaged settings may fail anywhere
        raise ModelUnreadable(_explain(str(name), what, error)) from error
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _unreadable(name: str | Path, what: str, why: str) -> ModelUnreadable:
    return ModelUnreadable(one_line(f"The {what} {name} cannot be loaded: {why}"))


def _check_files(name: str | Path, what: str) -> None:
    """Checks a folder's files before anything reads them: a pipe would never end, a huge file would fill memory."""
    if os.path.isfile(name):
        raise _unreadable(name, what, "it is a file; name the folder that it is in.")
    if not os.path.isdir(name):
        return
    for path in sorted(Path(name).iterdir()):
        readable = path.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja", ".bin")
        if readable and not path.is_file() and not path.is_dir():
            raise _unreadable(name, what, f"{path.name} is not a regular file but a broken link, a pipe or a device.")
        limit = MAX_CONFIG_BYTES if path.name == "config.json" else MAX_JSON_BYTES
        if path.suffix == ".json" and path.is_file() and path.stat().st_size > limit:
            raise _unreadable(name, what, f"{path.name} is too large, more than {limit:,} bytes.")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and its causes."""
    seen: BaseException | None = error
    for _ in range(20):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _explain(name: str, what: str, error: Exception) -> str:
    """Builds the message: what is wrong with a folder, or why a Hub id is unavailable."""
    why = _fault_of_folder(Path(name), what) if os.path.isdir(name) else None
    if why is None and not os.path.isdir(name) and any(isinstance(each, OSError) for each in _chain(error)):
        why = _absence(name, error)
    if why is None:
        why = _fault(error)
    return str(_unreadable(name, what, why))


def _fault(error: Exception) -> str:
    """Describes the error by its own message."""
    if isinstance(error, SafetensorError):
        return f"its weights are damaged ({error}). Copy or download it again."
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return "its weights do not have the sizes of its config.json."
    if "trust_remote_code" in str(error):
        return "it contains custom code, which is not run."
    said = one_line(error)
    said = said if isinstance(error, (ValueError, OSError)) and said else f"{type(error).__name__}: {said}"
    return said if said.endswith((".", "?", "!")) else f"{said}."


def _fault_of_folder(folder: Path, what: str) -> str | None:
    """Describes the first damaged or missing file of a folder; None if all look intact."""
    is_model = what.startswith("model")
    for path in sorted(folder.glob("*.json")):
        try:
            fields = json.loads(read_text(path, "settings", MAX_JSON_BYTES))
        except (ValueError, OSError, RecursionError) as error:
            return f"{path.name} is damaged ({one_line(error)}). Copy or download it again."
        if not isinstance(fields, dict) and path.name == "config.json":
            return "its config.json is not a JSON object. Copy or download it again."
        if path.name == "config.json" and is_model:
            kind = fields.get("model_type")
            if kind is None:
                return "its config.json does not say which model it is (model_type)."
            if kind not in map(str, CONFIG_MAPPING):
                return f"its config.json describes a model of type {kind!r}, which is unknown."
    if is_model and not (folder / "config.json").is_file():
        return _fault_of_run(folder) or "it has no config.json, so it is not a model folder."
    return _fault_of_weights(folder) if is_model else None


def _fault_of_run(folder: Path) -> str | None:
    """Names the models in the folder of an unfinished run; None if it is not such a folder."""
    inside = [path.parent for path in sorted(folder.glob("checkpoint-*/config.json"))]
    if not inside:
        return None
    best = folder / "best"
    or_best = f" (or {best}, the best by its evaluations)" if (best / "config.json").is_file() else ""
    return (
        f"it is the folder of an unfinished run. Its newest model so far is {inside[-1]}{or_best}; to finish the "
        "run, resume it with --resume_from_checkpoint auto."
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
            "its weights are a pickle (.bin), which may run code and is not read. If you trust it, save it as "
            "safetensors with Transformers' `save_pretrained`."
        )
    return "it has no weights (model.safetensors)."


def _absence(name: str, error: Exception) -> str | None:
    """Describes why a name is neither a folder nor available from the Hub; None if that is not the fault."""
    if name.startswith((".", "/", "~")) or "\\" in name or not _is_hub_id(name):
        return "there is no such folder."
    fix = f"Download it once with `hf download {name}`, where there is a network, or name a local folder."
    for each in _chain(error):
        if isinstance(each, GatedRepoError):
            return (
                f"access is restricted: ask for it on https://huggingface.co/{name}, and log in with `hf auth login`."
            )
        if isinstance(each, (RepositoryNotFoundError, RevisionNotFoundError)):
            return "there is no such folder, and no such Hub repository, or you have no access: try `hf auth login`."
    if constants.HF_HUB_OFFLINE:
        return f"there is no such folder, nor a complete download, and HF_HUB_OFFLINE is set. {fix}"
    said = str(error)
    if re.search(r"connect|internet|timed? ?out|Name or service|resolve", said, re.IGNORECASE):
        return f"there is no such folder, nor a complete download, and the Hub cannot be reached. {fix}"
    return None


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def load_complete(model_class: type[ModelT], name: str | Path, **options: Any) -> ModelT:
    """Loads a model whose every tensor is in its files, from safetensors alone.

    Args:
        model_class: the model's class.
        name: folder or Hub id.
        options: for `from_pretrained`.

    Raises:
        ModelUnreadable: there is no such model, it is damaged, or tensors are missing or left over.
    """
    with loading(name):
        loaded: Any = model_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    model, report = loaded
    check_loaded(name, model, report)
    return model


def check_loaded(name: str | Path, model: "nn.Module", report: JsonObject) -> None:
    """Checks that every tensor of a model was in its files, and that its towers used all tensors for them.

    Args:
        name: folder or Hub id.
        model: the loaded model.
        report: from `from_pretrained(..., output_loading_info=True)`.

    Raises:
        ModelUnreadable: tensors are missing, and would be random, or are left over.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelUnreadable(
            f"{name} has no weights for {len(missing)} tensors of {type(model).__name__} ({missing[0]}, ...), so "
            "results would be random. Give a folder with both towers, or one of a complete vision tower."
        )
    parts = {part for part, _ in model.named_children()}
    left = [key for key in report["unexpected_keys"] if key.split(".")[0] in parts and "position_ids" not in key]
    if left:
        raise ModelUnreadable(
            f"{name} has {len(left)} tensors that do not fit its config.json ({sorted(left)[0]}, ...): the two are not "
            "from the same model."
        )
