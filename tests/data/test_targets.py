"""Labels and captions as data sets write them."""

import io
import json
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from flip_hf.data.class_names import check_class_names
from flip_hf.data.decode import RefusedSample
from flip_hf.data.sources import Source, open_source
from flip_hf.data.targets import CAPTION_FORMS, Captions, ClassIndex, ClassVector
from tests.helpers.pairs import shapes_rows


def test_a_class_is_an_index_or_a_name():
    read = ClassIndex(("cat", "7", "crane", "crane"))
    assert [read(v) for v in (0, np.int64(3), b"2\n", "cat", b"cat", "0")] == [0, 3, 2, 0, 0, 0]
    assert read("7") == 1  # a name before a number
    digits = "9" * 6000  # `int` refuses them with a ValueError
    others = ("\u0662", "\uff12", "\u00b2")  # 2 in Arabic, of full width, and as a power
    numbers = (10**30, float("nan"), float("inf"), [1], {"label": 1}, np.float32(2.5))
    assert [read(v) for v in (3.0, np.float64(0), " cat ", b" 2 ")] == [3, 0, 0, 2]
    for value in (-1, "-1", b"-1", -1.0):
        with pytest.raises(RefusedSample, match="no label"):
            read(value)
    for value in (4, -2, "dog", b"crane", "4", None, 1.5, b"\xff", digits, digits.encode(), *others, *numbers):
        with pytest.raises(RefusedSample, match="unknown label"):
            read(value)


def test_a_text_that_may_be_an_index_or_a_name_is_refused_until_specified():
    """Of names "1" to "5" for the classes 0 to 4; read as names first, texts "0" to "4" became 0, 0, 1, 2, 3."""
    names = ("1", "2", "3", "4", "5")
    for text in (b"0", "1", "4", "5"):
        with pytest.raises(RefusedSample, match="label is an index or a name"):
            ClassIndex(names)(text)
    assert [ClassIndex(names, "index")(text) for text in (b"0", "1", "4")] == [0, 1, 4]
    assert [ClassIndex(names, "name")(text) for text in (b"1", "5")] == [0, 4]
    for texts, value in (("index", "5"), ("name", b"0"), ("name", "six"), ("index", "cat")):
        with pytest.raises(RefusedSample, match="unknown label"):
            ClassIndex(names, texts)(value)
    assert [ClassIndex(names, texts)(4) for texts in (None, "index", "name")] == [4] * 3  # a number is an index
    digits = tuple(map(str, range(10)))
    assert [ClassIndex(digits)(value) for value in ("7", b"7", 7)] == [7] * 3  # both readings are one


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        (("cat", "dog", "cow"), ("dog", "cat", "cow"), "calls class 0 'cat', and the class names given call it 'dog'"),
        (("cat", "dog", "cow", "hen"), ("a cat", "cow", "dog", "hen"), "calls class 1 'dog'"),
        (("cat", "dog"), ("cat", "dog"), None),
        (("n01", "n02"), ("cat", "dog"), None),
        (("crane bird", "crane"), ("crane", "crane (machine)"), None),  # the data's names, made clearer
    ],
)
def test_class_names_in_another_order_than_the_data_s_are_refused(own, given, message):
    source = labelled_source(own, texts=False)
    if message is None:
        check_class_names(source, given, None, "")
        return
    with pytest.raises(ValueError, match=message):
        check_class_names(source, given, None, "")


def test_text_labels_and_numbers_for_names_are_met_before_work_starts():
    names = ("1", "2", "3")
    check_class_names(labelled_source(None, texts=False), names, None, "")
    check_class_names(labelled_source(None, texts=True), names, "index", "")
    check_class_names(labelled_source(None, texts=True), ("0", "1", "7"), None, "")
    with pytest.raises(ValueError, match="'1' could be the name of class 0 or the index of another. Say which."):
        check_class_names(labelled_source(None, texts=True), names, None, "Say which.")


def labelled_source(own: tuple[str, ...] | None, texts: bool) -> Source:
    features = Features({"image": Image(), "label": ClassLabel(names=list(own)) if own else Value("string")})
    rows = {"image": [shapes_rows(1)[0]["image"]] * 2, "label": [0, 1] if own else ["0", "1"]}
    if own is None and not texts:
        features["label"] = Value("int64")
        rows["label"] = [0, 1]
    with TemporaryDirectory() as folder:
        Dataset.from_dict(rows, features=features).to_parquet(f"{folder}/test.parquet")
        source = open_source(folder, split="test", kind="label")
    assert source.has_text_targets is texts and source.class_names == own
    return source


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


def test_several_captions_in_a_text_are_read_if_configured():
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
