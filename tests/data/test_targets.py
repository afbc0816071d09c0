"""Labels and captions as data sets write them."""

import io

import numpy as np
import pytest

from flip_hf.data.decode import RefusedSample
from flip_hf.data.targets import ClassIndex, ClassVector, captions


def test_a_class_is_an_index_or_a_name():
    read = ClassIndex(("cat", "7", "crane", "crane"))
    assert [read(v) for v in (0, np.int64(3), b"2\n", "cat", b"cat", "0")] == [0, 3, 2, 0, 0, 0]
    assert read("7") == 1  # a name before a number
    for value in (4, -1, "dog", b"crane", "4", None, 1.5, b"\xff"):
        with pytest.raises(RefusedSample, match="unknown label"):
            read(value)


def test_several_classes_are_a_vector():
    read = ClassVector(3)
    assert read([1, 0, -1]).tolist() == [1, 0, -1]
    file = io.BytesIO()
    np.save(file, np.array([0, 1, 0]))
    assert read(file.getvalue()).tolist() == [0, 1, 0]
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    for value in ([1, 0], [0, 1, 2], b"no array", pickled.getvalue(), "cat", None):
        with pytest.raises(RefusedSample, match="unknown label"):
            read(value)


def test_all_captions_of_an_image_are_read():
    assert captions("a cat") == ["a cat"]
    assert captions(b"a cat\n a dog \n\n") == ["a cat", "a dog"]
    assert captions(["a cat", "  ", "a dog"]) == ["a cat", "a dog"]
    assert captions('["a cat", "a dog"]') == ["a cat", "a dog"]
    for value, reason in (
        (None, "missing"),
        (3, "missing"),
        ([1], "missing"),
        ("  ", "empty"),
        ([], "empty"),
        ("[x", "JSON"),
    ):
        with pytest.raises(RefusedSample, match=reason):
            captions(value)
