"""Reads T5X checkpoints without JAX: one msgpack file of structure, one zarr array a parameter, in a folder or a zip.

The files are not trusted. Nothing is unpickled or extracted, only files inside the checkpoint are opened, and no array
is allocated before its size is known to fit what is on disk.
"""

import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from flip_hf.conversion.files import Files, open_files
from flip_hf.conversion.tables import ConversionError, check_names

DTYPES = {"<f4": torch.float32, "<f2": torch.float16, "<i4": torch.int32, "bfloat16": torch.bfloat16}
INLINE_DTYPES = {
    **{"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16},
    **{"int32": torch.int32, "uint32": torch.int32, "int64": torch.int64},
}
MAX_STRUCTURE_BYTES = 1 << 30
MAX_ZARRAY_BYTES = 1 << 16
MAX_DIMENSIONS = 8
# Deflate turns one byte into at most 1,032.
MAX_DEFLATE_RATIO = 1032
STRUCTURE = "checkpoint"
CHUNKED = "__msgpack_chunked_array__"


def _find_checkpoint(files: Files, path: Path) -> str:
    """The prefix of the checkpoint's files: the folder of the one named `checkpoint`, the latest step of several."""
    found = [name for name in files.sizes if PurePosixPath(name).name == STRUCTURE]
    if not found:
        raise ConversionError(
            f"There is no T5X checkpoint in {path}: no file named `{STRUCTURE}`, beside folders named target.*, in it."
        )

    def step(name: str) -> tuple[int, str]:
        match = re.fullmatch(r"checkpoint_(\d+)", PurePosixPath(name).parent.name)
        return int(match[1]) if match else -1, name

    return max(found, key=step).removesuffix(STRUCTURE)


# -- structure --------------------------------------------------------------------------------------------------------


def _array(shape: Any, dtype: str, data: bytes) -> Tensor:
    shape = tuple(int(n) for n in shape)
    if dtype not in INLINE_DTYPES or len(shape) > MAX_DIMENSIONS:
        raise ConversionError(f"The checkpoint has an array of dtype {dtype!r} and shape {shape} in it.")
    size = math.prod(shape) * INLINE_DTYPES[dtype].itemsize
    if size != len(data):
        raise ConversionError(f"An array of shape {shape} needs {size:,} bytes, the checkpoint has {len(data):,}.")
    if size == 0:
        return torch.empty(shape, dtype=INLINE_DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=INLINE_DTYPES[dtype]).reshape(shape)


def _read_structure(data: bytes, what: str) -> Mapping[str, Any]:
    """The tree of a T5X `checkpoint` file: dicts down to arrays, or to descriptions of zarr arrays."""
    try:
        import msgpack
    except ImportError as error:
        raise ImportError("Reading T5X checkpoints needs msgpack: pip install flip_hf[convert]") from error

    def extension(code: int, payload: bytes) -> Any:
        if code in (1, 3):  # flax's array and array scalar; both are (shape, dtype, bytes)
            shape, dtype, values = msgpack.unpackb(payload)
            return _array(shape, dtype, values)
        return msgpack.ExtType(code, payload)

    try:
        tree = msgpack.unpackb(data, ext_hook=extension, strict_map_key=False)
        target = tree["optimizer"]["target"]
        if not isinstance(target, dict):
            raise TypeError(f"its target is {target!r:.80}")
        return target
    except ConversionError:
        raise
    except Exception as error:  # msgpack raises many kinds, for any of which the file is not one
        raise ConversionError(f"{what} is not the structure of a T5X checkpoint: {error!r}.") from error


def _join_chunks(leaf: Mapping[str, Any]) -> Tensor:
    """An array above flax's limit for one piece: flat chunks under "0", "1", ..."""
    shape = [int(leaf["shape"][str(i)]) for i in range(len(leaf["shape"]))]
    return torch.cat([leaf["chunks"][str(i)].flatten() for i in range(len(leaf["chunks"]))]).reshape(shape)


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor | None]]:
    """Names of the tree's arrays, joined by "/"; None where the values lie in a zarr array."""
    for key, value in tree.items():
        name = (*path, str(key))
        if isinstance(value, Tensor):
            yield "/".join(name), value
        elif isinstance(value, dict) and CHUNKED in value:
            yield "/".join(name), _join_chunks(value)
        elif isinstance(value, dict) and "driver" in value:
            yield "/".join(name), None
        elif isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            raise ConversionError(f"{'/'.join(name)} is neither an array nor a description of one: {value!r:.80}.")


# -- arrays -----------------------------------------------------------------------------------------------------------


class ZarrArray:
    """A zarr array of version 2: C order, gzip or no compression, all chunks present.

    Args:
        files: where it lies.
        members: sizes in bytes of the files in its folder, by their names there.
        folder: the folder's name.

    Raises:
        ConversionError: it is of another kind, or its size does not fit its files.
    """

    def __init__(self, files: Files, members: Mapping[str, int], folder: str):
        self.files, self.folder = files, folder
        meta = self._metadata(members.get(".zarray", 0))
        self.shape, self.chunks = tuple(meta["shape"]), tuple(meta["chunks"])
        self.dtype, self.compressed = DTYPES[meta["dtype"]], meta["compressor"] is not None
        self._check_size({name: size for name, size in members.items() if name != ".zarray"})

    def _metadata(self, size: int) -> dict[str, Any]:
        name = f"{self.folder}/.zarray"
        if not 0 < size <= MAX_ZARRAY_BYTES:
            raise ConversionError(f"{name}, the description of an array, is missing, empty or too large.")
        try:
            meta = json.loads(self.files.read(name))
            shape, chunks, compressor = meta["shape"], meta["chunks"], meta["compressor"]
            known = (
                meta["zarr_format"] == 2
                and meta["dtype"] in DTYPES
                and meta["order"] == "C"
                and not meta.get("filters")
                and meta.get("dimension_separator", ".") == "."
                and (compressor is None or compressor["id"] in ("gzip", "zlib"))
                and len(shape) == len(chunks) <= MAX_DIMENSIONS
                and all(isinstance(n, int) and n > 0 for n in (*shape, *chunks))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{name} does not describe a zarr array: {error!r}.") from error
        if not known:
            raise ConversionError(f"{name} describes an array of a kind that T5X does not write: {meta}.")
        return meta

    def _check_size(self, chunk_sizes: Mapping[str, int]) -> None:
        """Refuses a claimed size that the files on disk cannot hold."""
        count = math.prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))
        if len(chunk_sizes) != count:
            raise ConversionError(f"{self.folder} should have {count:,} chunk files, it has {len(chunk_sizes):,}.")
        held = sum(chunk_sizes.values()) * (MAX_DEFLATE_RATIO if self.compressed else 1)
        claimed = max(math.prod(self.shape), count * math.prod(self.chunks)) * self.dtype.itemsize
        if claimed > held:
            raise ConversionError(
                f"{self.folder} claims {claimed:,} bytes of values, its files can hold at most {held:,}."
            )

    def _chunk(self, index: tuple[int, ...]) -> Tensor:
        name = f"{self.folder}/{'.'.join(map(str, index)) or '0'}"
        expected = math.prod(self.chunks) * self.dtype.itemsize
        if name not in self.files.sizes:
            raise ConversionError(f"The chunk {name} is missing.")
        data = self.files.read(name)
        if self.compressed:
            try:
                # 32: gzip or zlib by the header; never more than what belongs here.
                data = zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(data, expected + 1)
            except zlib.error as error:
                raise ConversionError(f"The chunk {name} is damaged: {error}.") from error
        if len(data) != expected:
            raise ConversionError(f"The chunk {name} holds {len(data):,} bytes, expected {expected:,}.")
        return torch.frombuffer(bytearray(data), dtype=self.dtype).reshape(self.chunks)

    def read(self) -> Tensor:
        """The values."""
        if self.chunks == self.shape:
            return self._chunk((0,) * len(self.shape))
        values = torch.empty(self.shape, dtype=self.dtype)
        counts = [range(-(-n // c)) for n, c in zip(self.shape, self.chunks, strict=True)]
        for index in itertools.product(*counts):
            window = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, self.chunks, strict=True))
            part = values[window]
            part.copy_(self._chunk(index)[tuple(slice(0, n) for n in part.shape)])
        return values


class T5XCheckpoint(Mapping[str, Tensor]):
    """The parameters of a T5X checkpoint, by names such as `img_encoder/cls`; each is read when it is asked for.

    Optimizer states are never opened.

    Args:
        path: a checkpoint folder, a folder or a zip with one somewhere inside; the latest step of several.

    Raises:
        ConversionError: there is none, it is damaged, or arrays are missing or left over.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = open_files(self.path)
        prefix = _find_checkpoint(files, self.path)
        if files.sizes[prefix + STRUCTURE] > MAX_STRUCTURE_BYTES:
            raise ConversionError(f"{prefix + STRUCTURE} is too large for the structure of a checkpoint.")
        tree = _read_structure(files.read(prefix + STRUCTURE), f"{self.path}: {prefix + STRUCTURE}")
        leaves = dict(_leaves(tree))
        folders: dict[str, dict[str, int]] = {}
        for name, size in files.sizes.items():
            folder, _, member = name.removeprefix(prefix).rpartition("/")
            if name.startswith(f"{prefix}target."):
                folders.setdefault(folder, {})[member] = size
        names = {f"target.{name.replace('/', '.')}": name for name, leaf in leaves.items() if leaf is None}
        check_names(names, folders, str(self.path))
        self._arrays: dict[str, Tensor | ZarrArray] = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        for folder, name in names.items():
            self._arrays[name] = ZarrArray(files, folders[folder], prefix + folder)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, without reading it."""
        return tuple(self._arrays[name].shape)

    def __getitem__(self, name: str) -> Tensor:
        array = self._arrays[name]
        return array.read() if isinstance(array, ZarrArray) else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
