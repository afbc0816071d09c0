"""Reads the msgpack file of a T5X checkpoint: a tree of arrays, or of descriptions of arrays that lie elsewhere.

Only the parameters are built, value by value and up to a limit: msgpack's own `unpackb` allocates as many values as a
list claims to have, and takes hundreds of bytes for each empty one. Optimizer states are skipped.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flip_hf.conversion.errors import ConversionError, reason

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_DIMENSIONS = 8
# The 909 parameters of ViT-H/14 are described by some 36,000 values. Each takes at most a few hundred bytes.
MAX_VALUES = 300_000
MAX_DEPTH = 32
MAX_TEXT_BYTES = 4096
# Extension codes of flax's array and array scalar.
_ARRAYS = (1, 3)
_CHUNKED = "__msgpack_chunked_array__"


def _array(shape: Any, dtype: Any, data: bytes) -> Tensor:
    """Makes a tensor of an array inside the structure."""
    known = isinstance(dtype, str) and dtype in DTYPES and isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not known or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ConversionError(
            f"The checkpoint has an array of dtype {dtype!r:.40} and shape {shape!r:.80} in it; weights must be "
            f"{', '.join(DTYPES)}."
        )
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if size != len(data):
        raise ConversionError(
            f"An array of shape {tuple(shape)} needs {size:,} bytes, but the checkpoint has {len(data):,}."
        )
    if size == 0:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(shape)


class _Walk:
    """A walk through msgpack data that builds requested values and skips the rest.

    Args:
        data: the complete msgpack data.
    """

    def __init__(self, data: bytes):
        import msgpack

        size = max(len(data), 1)
        self.data = data
        self.left = MAX_VALUES
        self.unpacker: Any = msgpack.Unpacker(
            max_buffer_size=size,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=size,
            max_ext_len=size,
            max_array_len=0,
            max_map_len=0,
        )
        self.unpacker.feed(data)

    def _spend(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise ConversionError(f"it has more than {MAX_VALUES:,} values")
        return count

    def _kind(self) -> str:
        """Returns the kind of the next value, from its first byte."""
        at = self.unpacker.tell()
        first = self.data[at] if at < len(self.data) else 0xC1
        if first & 0xF0 == 0x80 or first in (0xDE, 0xDF):
            return "map"
        if first & 0xF0 == 0x90 or first in (0xDC, 0xDD):
            return "list"
        if first & 0xE0 == 0xA0 or first in (0xD9, 0xDA, 0xDB):
            return "text"
        return "end" if first == 0xC1 else "other"  # msgpack never writes 0xC1

    def keys(self) -> Iterator[str]:
        """Yields the keys of the next map; the caller takes or skips the value of each before the next key."""
        if self._kind() != "map":
            raise ConversionError("it has something else in place of a map of names")
        seen = set()
        for _ in range(self._spend(self.unpacker.read_map_header())):
            if self._kind() != "text":
                raise ConversionError("it has a key that is not text")
            key = self.unpacker.unpack()
            if key in seen:
                raise ConversionError(f"it has the key {key!r:.80} twice")
            seen.add(key)
            yield key

    def skip(self) -> None:
        """Skips a value."""
        self.unpacker.skip()

    def value(self, depth: int = 0) -> Any:
        """Returns the next value: a dict, a list, a tensor, or a plain value of msgpack."""
        if depth > MAX_DEPTH:
            raise ConversionError(f"it has more than {MAX_DEPTH} levels")
        kind = self._kind()
        if kind == "map":
            return {key: self.value(depth + 1) for key in self.keys()}
        if kind == "list":
            return [self.value(depth + 1) for _ in range(self._spend(self.unpacker.read_array_header()))]
        if kind == "end":
            raise ConversionError("it is truncated")
        value = self.unpacker.unpack()
        if hasattr(value, "code"):  # msgpack.ExtType
            return self._extension(value.code, value.data)
        return value

    @staticmethod
    def _extension(code: int, payload: bytes) -> Tensor:
        """Makes a tensor of an array or array scalar of flax: (shape, dtype, bytes)."""
        if code not in _ARRAYS:
            raise ConversionError(f"it has a value of the unknown kind {code}")
        parts = _Walk(payload).value(MAX_DEPTH - 2)
        if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[2], bytes):
            raise ConversionError("it has an array that is not a shape, a dtype and bytes")
        return _array(*parts)

    def end(self) -> None:
        """Checks that the data end here."""
        if self.unpacker.tell() != len(self.data):
            raise ConversionError("something follows its end")


def _join_chunks(leaf: Mapping[str, Any], name: str) -> Tensor:
    """Joins an array above flax's limit for one piece: flat chunks under "0", "1", ..."""
    try:
        shape = [leaf["shape"][str(i)] for i in range(len(leaf["shape"]))]
        pieces = [leaf["chunks"][str(i)].flatten() for i in range(len(leaf["chunks"]))]
        joined = torch.cat(pieces)
        if {piece.dtype for piece in pieces} != {joined.dtype} or math.prod(shape) != joined.numel():
            raise ValueError(f"shape {shape}, {joined.numel():,} values")
        return joined.reshape(shape)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConversionError(f"the pieces of {name} do not form one array ({reason(error)})") from error


def _leaves(tree: Mapping[str, object], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor | None]]:
    """Yields the tree's arrays by their names joined by "/", with None for values in a zarr array."""
    for key, value in tree.items():
        name = "/".join((*path, key))
        if "/" in key or "." in key:  # they join names in the structure and of folders
            raise ConversionError(f"it has the name {name!r:.200}, with a separator in one part")
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict) and _CHUNKED in value:
            yield name, _join_chunks(value, name)
        elif isinstance(value, dict) and "driver" in value:
            yield name, None
        elif isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            raise ConversionError(f"{name} is neither an array nor a description of one: {value!r:.80}")


def _target(walk: _Walk) -> object:
    """Returns the value at `optimizer`, `target`, or None if there is none."""
    target = None
    for key in walk.keys():
        if key != "optimizer":
            walk.skip()
            continue
        for inner in walk.keys():
            if inner == "target":
                target = walk.value()
            else:
                walk.skip()
    walk.end()
    return target


def read_structure(data: bytes, what: str) -> dict[str, Tensor | None]:
    """Reads the parameters in a T5X `checkpoint` file.

    Args:
        data: the content of the file.
        what: the file's name for messages.

    Returns:
        Arrays by names such as `img_encoder/cls`, with None for values in a zarr array beside the file.

    Raises:
        ConversionError: it is not such a file, or is larger or nested more deeply than a checkpoint's.
        ImportError: msgpack is not installed.
    """
    try:
        import msgpack  # noqa: F401
    except ImportError as error:
        raise ImportError("Reading T5X checkpoints needs msgpack: pip install flip_hf[convert]") from error
    try:
        target = _target(_Walk(data))
        if not isinstance(target, dict):
            raise ConversionError(f"its optimizer/target is {target!r:.80}")
        return dict(_leaves(target))
    except Exception as error:  # msgpack raises many types, all of which mean that it is not such a file
        raise ConversionError(f"{what} is not the structure of a T5X checkpoint: {reason(error)}.") from error
