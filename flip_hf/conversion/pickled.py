"""Reads files of `torch.save` that hold tensors and plain values, without running code and within bounds.

`weights_only=True` runs no code, but it inflates records of the archive, makes byte arrays of any length, and returns
tensors of many numbers that share the memory of one. So the archive and its pickle are inspected first.
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flip_hf.conversion.errors import ConversionError, reason
from flip_hf.conversion.files import regular_file

# That of ViT-H/14 with its optimizer state has about 0.5 MB.
MAX_PICKLE_BYTES = 8 * 2**20
# The types in a state dict and an optimizer state.
_ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|"
    r"torch (\w+Storage|Size|device|(float|double|half|bfloat|int|uint|long|short|bool|complex)\d*)|"
    r"torch\.storage (Untyped|Typed)Storage|torch\.nn\.parameter Parameter|_codecs encode|(__builtin__|builtins) set"
)


def _check_archive(path: Path) -> None:
    """Inspects an archive of `torch.save` before torch reads it.

    Raises:
        ConversionError: it is compressed, which torch never does, or its pickle has more than tensors and plain values.
        zipfile.BadZipFile: it is not such an archive; `zipfile` and `pickletools` may raise other errors, too.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in members):
            raise ConversionError("its archive is compressed, unlike those of torch.save")
        pickles = [info for info in members if info.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ConversionError(f"it does not have one data.pkl of at most {MAX_PICKLE_BYTES:,} bytes")
        data = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST") and not _ALLOWED.fullmatch(str(argument)):
            raise ConversionError(f"it needs {argument!r:.100}, which is neither a tensor nor a plain value")
        if opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ_EX"):
            raise ConversionError("it makes objects by names that torch.save does not write")


def read_pickled(path: Path) -> Any:
    """Reads the content of a file of `torch.save`; tensors stay in the file until they are used.

    Raises:
        ConversionError: it is not a regular file, is damaged, or has more than tensors and plain values in it.
    """
    real = regular_file(path)
    try:
        _check_archive(real)
        return torch.load(real, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zipfile, pickletools and torch raise many types, all for a bad file
        raise ConversionError(
            f"{path} cannot be read as weights. It is damaged, or it holds objects other than tensors (a TorchScript "
            "archive, or pickled code, which is never run); load it with a tool you trust and save its state_dict as "
            f"safetensors. The reason: {reason(error)}."
        ) from error


def check_plain(name: str, value: Any, path: Path) -> Tensor:
    """Checks and returns a dense tensor whose numbers are all stored.

    Raises:
        ConversionError: it is not a tensor, or is sparse, quantized, or larger than its storage.
    """
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise ConversionError(f"{path}: {name} is a {type(value).__name__}, not a tensor.")
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ConversionError(
            f"{path}: {name} is not a plain tensor: it is sparse or quantized, or not all of its numbers are stored. "
            "Save the state_dict with .contiguous() tensors."
        )
    return value.detach()
