"""The msgpack file of a T5X checkpoint, as nobody should have written it."""

import msgpack
import numpy as np
import pytest
import torch

from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.structure import read_structure
from tests.helpers.bounded import outcome

START = b"\x81\xa9optimizer\x81\xa6target"
CLAIM = b"\xdd\x00\x0c\x35\x00"  # a list of 800,000 values, in five bytes


def packed(target) -> bytes:
    return msgpack.packb({"version": 3, "optimizer": {"state": {"step": 1}, "target": target}})


def inline(values: np.ndarray, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((values.shape, values.dtype.name, values.tobytes())))


@pytest.mark.parametrize(
    "data",
    [
        CLAIM * 200_000,
        START + CLAIM * 200_000,
        START + b"\x81\xa1a\xc9\x00\x0f\x42\x3b\x01" + CLAIM * 199_999,
        START + b"\xdf\x00\x0f\xff\xff" + b"".join(b"\xa5%05x\x80" % i for i in range(150_000)),
        START + b"\x81\xa1a" + b"\xdc\xff\xff" + b"\x90" * 1_000_000,
    ],
    ids=["lists", "in the target", "in an array", "empty maps", "empty lists"],
)
def test_a_megabyte_stays_small(data):
    """msgpack makes room for as many values as a list claims: hundreds of such lists may be within each other."""
    assert "is not the structure of a T5X checkpoint" in outcome(lambda: read_structure(data, "file"), megabytes=160)


def test_states_of_any_content_are_skipped():
    state = [[[b"\x80"] * 10, msgpack.ExtType(99, b"x")], {1: 2}]
    data = msgpack.packb({"optimizer": {"state": state, "target": {"a": {"b": inline(np.ones(2, np.float32))}}}})
    assert torch.equal(read_structure(data, "file")["a/b"], torch.ones(2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (packed({"a/b": {"driver": "zarr"}}), "separator"),
        (packed({"a.b": {"driver": "zarr"}}), "separator"),
        (packed({1: {"driver": "zarr"}}), "key that is not text"),
        (START + b"\x82\xa1a\x80\xa1a\x80", "the key 'a' twice"),
        (packed({"a": 3}), "a is neither an array nor a description"),
        (packed({"a": msgpack.ExtType(7, b"")}), "unknown kind 7"),
        (packed({"a": msgpack.ExtType(1, msgpack.packb([[2], "float32"]))}), "not a shape, a dtype and bytes"),
        (packed({"a": msgpack.ExtType(1, msgpack.packb([[-1, -1], "float32", b"1234"]))}), "shape"),
        (packed({"a": inline(np.ones(2, np.int64))}), "dtype 'int64'"),
        (packed({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {}}}), "do not form one array"),
        (packed({"a": {"__msgpack_chunked_array__": True, "shape": 3, "chunks": 4}}), "do not form one array"),
        (packed({"a": {}})[:-1], "is truncated|No more data"),
        (packed({}) + b"\x00", "something follows its end"),
        (msgpack.packb({"optimizer": {}}), "target is None"),
        (b"", "in place of a map"),
    ],
)
def test_invalid_structures_are_refused(data, message):
    with pytest.raises(ConversionError, match=message):
        read_structure(data, "file")
