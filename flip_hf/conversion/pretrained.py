"""Reads untrusted folders of Transformers' models: only their configuration and safetensors.

Transformers' own loading follows a folder's files to other places: an adapter to its base model, an index to any path,
a configuration to code, quantized weights and kernels. Here the files are checked and read first, and Transformers gets
the tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flip_hf.conversion.errors import ConversionError, reason
from flip_hf.conversion.files import read_json, regular_file
from flip_hf.conversion.sizes import ConfigT, make_config
from flip_hf.conversion.tables import ModelT, check_dtypes, check_finite, check_names, shapes_of

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONVERTER = "SFconvertbot"
CONVERSION = "Adding `safetensors` variant of this model"
# Numbers of a model for which memory is allocated even if they are not in a file.
MUCH = 2**27
MODEL_FILES = (CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors")


def local_folder(source: str, patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """Returns the folder of a source: for a Hub id, the snapshot in the cache with the wanted files.

    Args:
        source: folder or Hub id.
        patterns: patterns of the files to fetch.

    Raises:
        ConversionError: the source is neither.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ConversionError(f"{source!r} cannot be opened: {reason(error)}.") from error
    if exists:
        raise ConversionError(f"{source} is a file, not a model's folder or Hub id.")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=list(patterns)))
        if WEIGHTS in patterns and not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
            revision = _safetensors_revision(source)
            if revision is not None:
                folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
        return folder
    except Exception as error:  # no such repository, no network, no valid id: many types, one answer
        raise ConversionError(
            f"{source} is neither a folder nor a Hub repository that can be fetched: {reason(error)}."
        ) from error


def _safetensors_revision(repo: str) -> str | None:
    """Returns the revision with safetensors of a repository that has only older weights: the Hub bot's pull request.

    `from_pretrained(use_safetensors=True)` uses it, too.
    """
    from huggingface_hub import get_repo_discussions

    try:
        for pull in get_repo_discussions(repo, author=CONVERTER, discussion_type="pull_request"):
            if pull.author == CONVERTER and pull.status == "open" and pull.title == CONVERSION:
                return pull.git_reference
    except Exception:  # no network, or discussions are disabled: there is no such revision
        return None
    return None


def read_config(folder: Path, config_class: type[ConfigT], *, model: str) -> ConfigT:
    """Reads the configuration in a folder's `config.json`.

    Args:
        folder: the model's folder.
        config_class: configuration class of the only accepted type.
        model: this type's name for messages.

    Raises:
        ConversionError: there is no readable configuration, it has another type, or its numbers are out of range.
    """
    if not (folder / CONFIG).exists() and not (folder / CONFIG).is_symlink():
        raise ConversionError(f"{folder} has no {CONFIG}: it is not the folder of a Transformers model.")
    fields = read_json(folder / CONFIG, root=folder)
    if fields.get("model_type") != config_class.model_type:
        raise ConversionError(
            f"{folder} is a checkpoint of type {fields.get('model_type')!r:.80}, not a {model}, whose {CONFIG} says "
            f'"model_type": "{config_class.model_type}".'
        )
    return make_config(config_class, fields, str(folder / CONFIG))


def read_safetensors(path: Path, *, root: Path | None = None) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file.

    Raises:
        ConversionError: it is damaged, or not a regular file inside `root`.
    """
    real = regular_file(path, root=root)
    try:
        return load_file(real)
    except Exception as error:  # SafetensorError, and torch's errors for unusual dtypes
        raise ConversionError(
            f"{path} cannot be read as weights in safetensors: {reason(error)}. Fetch it again."
        ) from error


def _shards(folder: Path) -> list[str]:
    """Returns the files of a folder's weights."""
    if (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
        return [WEIGHTS]
    if not (folder / INDEX).exists():
        raise ConversionError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}. Other weights files, such as pytorch_model.bin, are not read "
            "here; load the model in a program that you trust and save it as safetensors."
        )
    files = read_json(folder / INDEX, root=folder).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ConversionError(f"{folder / INDEX} has no weight_map with the file of each tensor.")
    names = sorted(set(files.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ConversionError(f"{folder / INDEX} names a file other than the folder's weights: {name!r:.200}.")
    return names


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads the weights of a folder: one safetensors file, or several with an index.

    Raises:
        ConversionError: a file is missing or damaged, leads out of the folder, or does not match the index; a tensor
            does not hold floating-point numbers, or is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for name in _shards(folder):
        part = read_safetensors(folder / name, root=folder)
        twice = tensors.keys() & part.keys()
        if twice:
            raise ConversionError(f"{folder / name} has tensors of another file, too: {', '.join(twice):.200}.")
        tensors |= part
    if not (folder / WEIGHTS).exists():
        check_names(read_json(folder / INDEX, root=folder)["weight_map"], tensors, f"{folder} (against its index)")
    # Old checkpoints also store the row numbers 0, 1, 2 ...
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    check_dtypes({name: tensor.dtype for name, tensor in weights.items()}, str(folder))
    check_finite(weights.items(), str(folder))
    return tensors


def _check_amount(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, Tensor], what: str
) -> None:
    """Refuses a configuration whose model is much larger than its weights, before memory is allocated for it."""
    # Smaller amounts of missing weights are reported after loading.
    needed = sum(shape.numel() for shape in shapes_of(model_class, config).values())
    there = sum(tensor.numel() for tensor in tensors.values())
    if needed > 2 * there + MUCH:
        raise ConversionError(
            f"{what}: {CONFIG} describes a {model_class.__name__} of {needed:,} numbers, but the weights hold "
            f"{there:,}. They belong to different models."
        )


def load_pretrained(
    model_class: type[ModelT], source: Path, config: PreTrainedConfig, *, may_stay: tuple[str, ...] = ()
) -> ModelT:
    """Loads a complete model from a folder, in evaluation mode.

    Args:
        model_class: a model class of Transformers.
        source: the model's folder.
        config: the model's configuration.
        may_stay: prefixes of the names of tensors that may be left over.

    Raises:
        ConversionError: see [`read_weights`]; or tensors are missing, left over, or have other shapes.
    """
    tensors = read_weights(source)
    _check_amount(model_class, config, tensors, str(source))
    try:
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # tensors and configuration are untrusted; the model's code raises many types
        raise ConversionError(f"{source} cannot be loaded as a {model_class.__name__}: {reason(error)}.") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    unexpected = (name for name in report["unexpected_keys"] if not name.endswith("position_ids"))
    surplus = sorted(name for name in unexpected if not name.startswith(may_stay))
    if missing or surplus:
        name = model_class.__name__
        raise ConversionError(f"{source} is not a complete {name}: missing {missing}, left over {surplus}.")
    for name, found, expected in report["mismatched_keys"]:
        raise ConversionError(
            f"{source}: {name} has the shape {tuple(found)}, expected {tuple(expected)} by {CONFIG}. The two belong to "
            "different models."
        )
    return model.eval()
