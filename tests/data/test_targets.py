"""Labels and captions as data sets write them."""

import io
import json

import numpy as np
import pytest

from flip_hf.data.decode import RefusedSample
from flip_hf.data.targets import CAPTION_FORMS, Captions, ClassIndex, ClassVector


def test_a_class_is_an_index_or_a_name():
    read = ClassIndex(("cat", "7", "crane", "crane"))
    assert [read(v) for v in (0, np.int64(3), b"2\n", "cat", b"cat", "0")] == [0, 3, 2, 0, 0, 0]
    assert read("7") == 1  # a name before a number
    digits = "9" * 6000  # `int` refuses them with a ValueError
    others = ("\u0662", "\uff12", "\u00b2")  # 2 in Arabic, of full width, and as a power
    numbers = (10**30, float("nan"), float("inf"), [1], {"label": 1})
    for value in (4, -1, "dog", b"crane", "4", None, 1.5, b"\xff", digits, digits.encode(), *others, *numbers):
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


def npy(header: str, data: bytes = bytes(24)) -> bytes:
    """A `.npy` file with a header of one's own."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def test_a_class_vector_cannot_ask_for_memory_or_be_read_as_something_else():
    read = ClassVector(3)
    assert read(npy("{'descr': '>f8', 'fortran_order': False, 'shape': (3,)}")).tolist() == [0, 0, 0]
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(3))
    for value in (
        npy(f"{{'descr': '|i1', 'fortran_order': False, 'shape': ({2**50},)}}"),
        npy("{'descr': '|V2000000000', 'fortran_order': False, 'shape': (3,)}"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (3,)}", bytes(8)),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (3,)}" + " " * 60_000),
        archive.getvalue(),
        [0, 1, 2**70],
        [0, 1, -(10**6000)],
        [0.5, 0, 1],
        [float("nan"), 0, 1],
        [[0], 1, 0],
        [{}, 1, 0],
        ["0", "1", "0"],
        [0] * 10**6,
    ):
        with pytest.raises(RefusedSample, match="unknown label"):
            read(value)


@pytest.mark.parametrize(
    "text",
    [
        "a cat",
        "[OC] my cat",
        '["a", "b"]',
        "a cat\nthat sleeps",
        *(f"a cat{mark}asleep" for mark in "\u2028\u2029\x85\x0c\x0b\x1c"),
    ],
)
def test_a_text_is_one_caption(text):
    assert Captions()(text) == Captions()(text.encode()) == [text]
    assert Captions("lines")(text.replace("\n", " ")) == [text.replace("\n", " ")]
    assert Captions("json")(json.dumps([text, "a dog"])) == [text, "a dog"]


def test_of_a_list_the_usable_captions_are_read():
    for form in CAPTION_FORMS:
        assert Captions(form)(["a cat", "  ", None, 3.0, "a\ndog ", b"\xff", b"a bird"]) == [
            "a cat",
            "a\ndog",
            "a bird",
        ]


def test_several_captions_in_a_text_are_read_where_that_is_said():
    assert Captions("lines")(b"a cat\r\n a dog \n\n") == ["a cat", "a dog"]
    assert Captions("lines")("[OC] a cat\na\u2028dog") == ["[OC] a cat", "a\u2028dog"]
    assert Captions("json")('["a cat", "a dog", null]') == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("form", "value", "reason"),
    [
        ("text", None, "missing caption"),
        ("text", 3, "caption is not text"),
        ("text", [1], "caption is not text"),
        ("text", [None, ""], "missing caption"),
        ("text", "  ", "empty caption"),
        ("text", [], "empty caption"),
        ("text", b"\xff", "caption is not UTF-8"),
        ("lines", "\n \n", "empty caption"),
        ("lines", "x\n" * 2000, "too many captions"),
        ("json", "[x", "damaged JSON"),
        ("json", '"a cat"', "captions are not a JSON list"),
        ("json", "[]", "empty caption"),
    ],
)
def test_captions_that_cannot_be_read_are_refused(form, value, reason):
    with pytest.raises(RefusedSample) as caught:
        Captions(form)(value)
    assert caught.value.reason == reason
