"""Reads T5X checkpoints without JAX: one msgpack file of structure, one zarr array per parameter, in a folder or a zip.

The files are not trusted. Nothing is unpickled or extracted, only files inside the checkpoint are opened, and no array
is allocated before its size is known to match the data on disk.
"""

import itertools
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from flip_hf.console.json_types import JsonObject
from flip_hf.conversion.errors import ConversionError, reason
from flip_hf.conversion.files import Files, open_files, parse_json
from flip_hf.conversion.structure import read_structure
from flip_hf.conversion.tables import check_names

DTYPES = {"<f4": torch.float32, "<f2": torch.float16, "bfloat16": torch.bfloat16}
MAX_STRUCTURE_BYTES = 1 << 30
# Without arrays inside, which do not compress, the structures of the released sizes have less than 1 MB.
ALWAYS_READ_STRUCTURE_BYTES = 16 * 2**20
MAX_ZARRAY_BYTES = 1 << 16
MAX_DIMENSIONS = 8
MAX_SIDE = 2**40
# Deflate expands one byte to at most 1,032. Trained weights compress by a tenth: a checkpoint that claims many times
# its stored size is made to fill the memory.
MAX_DEFLATE_RATIO = 1032
MAX_RATIO = 32
ALWAYS_READ_BYTES = 256 * 2**20
STRUCTURE = "checkpoint"


def _find_checkpoint(files: Files, path: Path) -> str:
    """Returns the prefix of the checkpoint's files: the folder with a file `checkpoint`, of the latest step."""
    found = [name for name in files.sizes if PurePosixPath(name).name == STRUCTURE]
    if not found:
        refused = [why for name, why in files.refused.items() if PurePosixPath(name).name == STRUCTURE]
        if refused:
            raise ConversionError(refused[0])
        raise ConversionError(
            f"There is no T5X checkpoint in {path}: it has no file `{STRUCTURE}` beside folders named target.*."
        )

    def step(name: str) -> tuple[int, str]:
        match = re.fullmatch(r"checkpoint_([0-9]{1,18})", PurePosixPath(name).parent.name)
        return int(match[1]) if match else -1, name

    return max(found, key=step).removesuffix(STRUCTURE)


# -- arrays -----------------------------------------------------------------------------------------------------------


class ZarrArray:
    """A zarr array of version 2: C order, gzip or no compression, all chunks present.

    Args:
        files: the files of the checkpoint.
        members: sizes in bytes of the files in its folder, by name.
        folder: the folder's name.

    Attributes:
        shape, chunks, dtype: as described in its `.zarray`.
        claimed: bytes of all chunks, inflated.

    Raises:
        ConversionError: it is of another kind, or its size does not match its files.
    """

    def __init__(self, files: Files, members: Mapping[str, int], folder: str):
        self.files = files
        self.folder = folder
        meta = self._metadata(members.get(".zarray", 0))
        self.shape = tuple(meta["shape"])
        self.chunks = tuple(meta["chunks"])
        self.dtype = DTYPES[meta["dtype"]]
        self.compressed = meta["compressor"] is not None
        self._check_size({name: size for name, size in members.items() if name != ".zarray"})

    def _metadata(self, size: int) -> JsonObject:
        name = f"{self.folder}/.zarray"
        if not 0 < size <= MAX_ZARRAY_BYTES:
            raise ConversionError(f"{name}, the description of an array, is missing, empty or too large.")
        meta = parse_json(self.files.read(name, MAX_ZARRAY_BYTES), name)
        try:
            shape = meta["shape"]
            chunks = meta["chunks"]
            compressor = meta["compressor"]
            known = (
                meta["zarr_format"] == 2
                and meta["dtype"] in DTYPES
                and meta["order"] == "C"
                and not meta.get("filters")
                and meta.get("dimension_separator", ".") == "."
                and (compressor is None or compressor["id"] in ("gzip", "zlib"))
                and len(shape) == len(chunks) <= MAX_DIMENSIONS
                and all(type(n) is int and 0 < n <= MAX_SIDE for n in (*shape, *chunks))
                and all(chunk <= side for side, chunk in zip(shape, chunks, strict=True))
            )
        except (ValueError, LookupError, TypeError) as error:
            raise ConversionError(f"{name} does not describe a zarr array: {reason(error)}.") from error
        if not known:
            raise ConversionError(f"{name} describes a kind of array that T5X does not write: {meta!r:.400}.")
        return meta

    def _check_size(self, chunk_sizes: Mapping[str, int]) -> None:
        """Refuses a claimed size that the files on disk cannot hold."""
        count = math.prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))
        if len(chunk_sizes) != count:
            raise ConversionError(f"{self.folder} should have {count:,} chunk files, but has {len(chunk_sizes):,}.")
        held = sum(chunk_sizes.values()) * (MAX_DEFLATE_RATIO if self.compressed else 1)
        self.claimed = count * math.prod(self.chunks) * self.dtype.itemsize
        if self.claimed > held:
            raise ConversionError(
                f"{self.folder} claims {self.claimed:,} bytes of values, but its files can hold at most {held:,}."
            )

    def _chunk(self, index: tuple[int, ...]) -> Tensor:
        name = f"{self.folder}/{'.'.join(map(str, index)) or '0'}"
        expected = math.prod(self.chunks) * self.dtype.itemsize
        if name not in self.files.sizes:
            raise ConversionError(f"The chunk {name} is missing.")
        # Incompressible data grow a little; a larger file is not the chunk.
        data = self.files.read(name, expected + (expected // 64 + 4096 if self.compressed else 0))
        if self.compressed:
            data = self._inflate(name, data, expected)
        if len(data) != expected:
            raise ConversionError(f"The chunk {name} holds {len(data):,} bytes, expected {expected:,}.")
        return torch.frombuffer(bytearray(data), dtype=self.dtype).reshape(self.chunks)

    @staticmethod
    def _inflate(name: str, data: bytes, expected: int) -> bytes:
        """Inflates a chunk to at most one byte more than expected."""
        inflating = zlib.decompressobj(32 + zlib.MAX_WBITS)  # 32: gzip or zlib by the header
        try:
            inflated = inflating.decompress(data, expected + 1)
        except zlib.error as error:
            raise ConversionError(f"The chunk {name} is damaged: {error}.") from error
        if len(inflated) == expected and (not inflating.eof or inflating.unused_data):
            raise ConversionError(f"The chunk {name} is damaged: it has no end, or something follows it.")
        return inflated

    def empty(self) -> Tensor:
        """Returns a tensor of the same shape and dtype without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """Reads the values."""
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
    """The parameters of a T5X checkpoint, by names such as `img_encoder/cls`; each is read on access.

    Optimizer states are never opened.

    Args:
        path: a checkpoint folder, or a folder or zip with one somewhere inside; the latest step if there are several.

    Raises:
        ConversionError: there is no checkpoint, it is damaged, or arrays are missing or left over.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = open_files(self.path)
        prefix = _find_checkpoint(files, self.path)
        name = prefix + STRUCTURE
        if files.sizes[name] > max(ALWAYS_READ_STRUCTURE_BYTES, MAX_RATIO * files.stored[name]):
            raise ConversionError(
                f"{name} inflates to {files.sizes[name]:,} bytes, more than any checkpoint's structure."
            )
        leaves = read_structure(files.read(name, MAX_STRUCTURE_BYTES), f"{self.path}: {name}")
        folders = self._folders(files, prefix)
        names = {f"target.{name.replace('/', '.')}": name for name, leaf in leaves.items() if leaf is None}
        check_names(names, folders, str(self.path))
        self._arrays: dict[str, Tensor | ZarrArray] = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        for folder, name in names.items():
            self._arrays[name] = ZarrArray(files, folders[folder], prefix + folder)
        self._check_ratio(files, prefix)

    @staticmethod
    def _folders(files: Files, prefix: str) -> dict[str, dict[str, int]]:
        """Returns the files of each parameter's folder, with their sizes in bytes."""
        arrays = f"{prefix}target."
        for name, why in files.refused.items():
            if name.startswith(arrays):
                raise ConversionError(why)
        folders: dict[str, dict[str, int]] = {}
        for name, size in files.sizes.items():
            if name.startswith(arrays):
                folder, _, member = name.removeprefix(prefix).rpartition("/")
                folders.setdefault(folder, {})[member] = size
        return folders

    def _check_ratio(self, files: Files, prefix: str) -> None:
        """Refuses a checkpoint whose arrays are many times as large as their stored data."""
        claimed = sum(array.claimed for array in self._arrays.values() if isinstance(array, ZarrArray))
        stored = sum(size for name, size in files.stored.items() if name.startswith(f"{prefix}target."))
        if claimed > max(ALWAYS_READ_BYTES, MAX_RATIO * stored):
            raise ConversionError(
                f"{self.path} claims {claimed:,} bytes of weights, but stores {stored:,}. Trained weights do not "
                "compress like that; nothing was read."
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter without reading it."""
        return tuple(self._arrays[name].shape)

    def empty(self, name: str) -> Tensor:
        """Returns a tensor like a parameter but without values, on the meta device; nothing is read."""
        array = self._arrays[name]
        return array.empty() if isinstance(array, ZarrArray) else torch.empty_like(array, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        array = self._arrays[name]
        return array.read() if isinstance(array, ZarrArray) else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)
