"""The registry's files against what is known of the data sets from elsewhere."""

import importlib
import io
import re
import sys
import tarfile
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from PIL import Image

from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.reading import Reader
from flip_hf.data.sources import open_source
from flip_hf.data.targets import ClassIndex
from flip_hf.evaluation.registry import all_data_sets, data_set, data_set_names, read_data_set
from flip_hf.evaluation.templates import prompt_set

ROOT = Path(__file__).parents[2]

# Numbers of classes: CLIP paper, Table 9; the robustness sets' papers. None: the data set says them itself.
CLASSES = {
    "imagenet": 1000,
    "food101": 101,
    "cifar10": 10,
    "cifar100": 100,
    "birdsnap": None,
    "sun397": 397,
    "stanford_cars": 196,
    "fgvc_aircraft": 100,
    "voc2007": 20,
    "dtd": 47,
    "oxford_pets": 37,
    "caltech101": 102,
    "flowers102": 102,
    "mnist": 10,
    "fer2013": 7,
    "stl10": 10,
    "eurosat": 10,
    "resisc45": 45,
    "gtsrb": 43,
    "kitti_distance": 4,
    "country211": 211,
    "patch_camelyon": 2,
    "ucf101": 101,
    "kinetics700": 700,
    "clevr_counts": 8,
    "hateful_memes": 2,
    "rendered_sst2": 2,
    "imagenet_v2": 1000,
    "imagenet_sketch": 1000,
    "imagenet_a": 200,
    "imagenet_r": 200,
    "objectnet": None,
    "flickr30k": None,
    "mscoco": None,
}
# Bytes of `classnames.txt` on the Hub, as its file listings show them.
CLASSNAMES_BYTES = {
    "caltech101": "971",
    "clevr_counts": "41",
    "country211": "2.10k",
    "eurosat": "204",
    "fgvc_aircraft": "846",
    "food101": "1.18k",
    "imagenet_a": "2.09k",
    "imagenet_r": "2.03k",
    "imagenet_v2": "11.8k",
    "kitti_distance": "155",
    "voc2007": "135",
}


def names(name):
    return data_set(name).class_names


# -- all files --------------------------------------------------------------------------------------------------------


def test_the_registry_has_these_data_sets():
    assert all_data_sets() == tuple(sorted(CLASSES))


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_is_whole(name):
    found = data_set(name)
    assert found.name == name and found is data_set(name)
    assert CLASSES[name] == (None if found.class_names is None else len(found.class_names))
    assert all(text == text.strip() for text in (found.title, found.licence, *found.templates))
    assert all(source.startswith("https://") for source in found.sources)
    assert found.path is None or f"https://huggingface.co/datasets/{found.path}" in found.sources
    if found.task == "classification" and found.class_names is None:
        assert "names" in found.note
    with pytest.raises(FrozenInstanceError):
        found.path = "elsewhere"


@pytest.mark.parametrize("name", CLASSNAMES_BYTES)
def test_names_are_as_long_as_on_the_hub(name):
    size = sum(len(n.encode()) + 1 for n in names(name))
    shown = CLASSNAMES_BYTES[name]
    if not shown.endswith("k"):
        assert size == int(shown)
    else:
        digits = len(shown.split(".")[1]) - 1
        assert f"{size / 1000:.{digits}f}k" == shown


def test_metrics_are_those_of_the_clip_paper():
    other = {name: data_set(name).metric for name in data_set_names(["clip27"]) if data_set(name).metric != "accuracy"}
    per_class = ("caltech101", "fgvc_aircraft", "flowers102", "oxford_pets")
    assert other == {name: "mean_per_class" for name in per_class} | {
        "kinetics700": "mean_top1_top5",
        "voc2007": "map_11_points",
        "hateful_memes": "roc_auc",
    }
    assert all(data_set(name).metric == "recall" for name in data_set_names(["retrieval"]))


def test_templates_are_as_many_as_clips():
    many = {"cifar10": 18, "cifar100": 18, "caltech101": 34, "ucf101": 48, "kinetics700": 28, "resisc45": 18}
    assert {name: len(data_set(name).templates) for name in many} == many
    assert all(len(set(data_set(name).templates)) == count for name, count in many.items())
    assert data_set("imagenet").templates == prompt_set("clip_80")
    assert data_set("food101").templates == ("a photo of {}, a type of food.",)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_data_files_are_packaged():
    tomllib = importlib.import_module("tomllib")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    room = ROOT / "flip_hf" / "evaluation"
    packaged = {path for pattern in patterns["flip_hf.evaluation"] for path in room.glob(pattern)}
    assert packaged == {path for path in room.rglob("*") if path.suffix in (".yaml", ".txt")}


# -- the order of labels ----------------------------------------------------------------------------------------------


# Label indices from the data sets' own documentation.
SPOTS = [
    ("food101", slice(16, 18), ("cheese plate", "cheesecake")),  # sorted by folder names, `_` before letters
    ("cifar10", slice(0, None, 9), ("airplane", "truck")),
    ("cifar100", 99, "worm"),
    ("gtsrb", 14, "stop"),
    ("eurosat", slice(8, None), ("river", "lake or sea")),
    ("eurosat", 0, "annual crop land"),
    ("mnist", slice(None), tuple("0123456789")),
    ("country211", slice(0, 211, 210), ("Andorra", "Zimbabwe")),  # AD, ZW
    ("fer2013", slice(None), ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")),
    ("rendered_sst2", slice(None), ("negative", "positive")),
    ("fgvc_aircraft", slice(0, 100, 99), ("707-320", "Yak-42")),
    ("caltech101", 4, "background"),  # TFDS: background_google among the others
    ("oxford_pets", slice(1, 6, 4), ("American Bulldog", "Bengal")),  # cats among dogs
    ("clevr_counts", 0, "three"),
]
# By patterns, since the whole labels are long.
LONG_SPOTS = [
    ("gtsrb", 17, "no entry"),
    ("patch_camelyon", 1, "tumor tissue$"),
    ("kitti_distance", 0, "left or right"),
    ("kitti_distance", 3, "no car"),
    ("stanford_cars", 0, "^AM General"),
    ("stanford_cars", 195, "^smart"),
]


@pytest.mark.parametrize(("name", "index", "expected"), SPOTS)
def test_labels_have_their_documented_places(name, index, expected):
    assert names(name)[index] == expected


@pytest.mark.parametrize(("name", "index", "pattern"), LONG_SPOTS)
def test_long_labels_have_their_documented_places(name, index, pattern):
    assert re.search(pattern, names(name)[index])


@pytest.mark.parametrize("name", ["dtd", "resisc45", "cifar100", "stl10", "sun397", "fgvc_aircraft", "kinetics700"])
def test_labels_in_the_order_of_sorted_folders(name):
    assert names(name) == tuple(sorted(names(name)))


def test_order_against_torchvision():
    datasets = pytest.importorskip("torchvision.datasets")
    meta = importlib.import_module("torchvision.models._meta")
    assert list(names("voc2007")) == meta._VOC_CATEGORIES[1:]
    flowers = zip(names("flowers102"), datasets.Flowers102.classes, strict=True)
    assert {ours: theirs for ours, theirs in flowers if ours != theirs} == {
        "globe flower": "globe-flower",
        "pink and yellow dahlia": "pink-yellow dahlia?",
        "air plant": "ball moss",
    }
    assert [int(digit.split()[0]) for digit in datasets.MNIST.classes] == [int(digit) for digit in names("mnist")]
    same = [a.lower() == b.lower() for a, b in zip(names("imagenet"), meta._IMAGENET_CATEGORIES, strict=True)]
    assert sum(same) > 650  # CLIP renamed the others
    kinetics = [names("kinetics700").index(n) for n in meta._KINETICS400_CATEGORIES if n in names("kinetics700")]
    assert len(kinetics) > 370 and kinetics == sorted(kinetics)


def test_imagenet_and_its_subsets_against_open_clip_and_timm():
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    for name in ("imagenet", "imagenet_v2", "imagenet_sketch"):
        assert list(names(name)) == list(metadata.IMAGENET_CLASSNAMES)
    info = Path(pytest.importorskip("timm").__file__).parent / "data" / "_info"
    for name in ("imagenet_a", "imagenet_r"):
        indices = [int(index) for index in (info / f"{name}_indices.txt").read_text().split()]
        assert list(names(name)) == [metadata.IMAGENET_CLASSNAMES[index] for index in indices]


def test_folders_of_ones_own_are_read_in_the_order_of_the_names(tmp_path):
    # UCF101's folder names; capitals sort before small letters.
    folders = {"ApplyEyeMakeup": 0, "HammerThrow": 34, "Hammering": 35, "JumpRope": 46, "JumpingJack": 47, "YoYo": 100}
    for folder in folders:
        path = tmp_path / "test" / folder
        path.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path / "frame.png")
    found = data_set("ucf101")
    source = open_source(
        str(tmp_path),
        split=found.splits["test"],
        image_column=found.image_column,
        target_column=found.target_column,
        kind="label",
    )
    assert source.class_names == tuple(folders)
    assert [found.class_names[i].replace(" ", "") for i in folders.values()] == list(folders)


@pytest.mark.parametrize("name", ["clevr_counts", "mnist"])
def test_a_shard_of_the_hubs_form_gives_label_indices(name, tmp_path):
    found = data_set(name)
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "webp")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for label in range(len(found.class_names)):
            for extension, content in (("webp", image.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"s{label:07}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    source = open_source(
        str(tmp_path / "0.tar"), image_column=found.image_column, target_column=found.target_column, kind="label"
    )
    read_target = ClassIndex(found.class_names)
    process = Reader(0, 1)
    stream = EvalStream(source, lambda picture: torch.zeros(3, 8, 8), read_target, batch_size=16, process=process)
    (batch,) = stream
    assert batch["targets"] == list(range(len(found.class_names))) and not batch["refused"]


# -- names and groups -------------------------------------------------------------------------------------------------


def test_groups_have_the_papers_data_sets():
    clip27 = data_set_names(["clip27"])
    flip25 = data_set_names(["flip25"])
    assert len(clip27) == 27 and set(clip27) - set(flip25) == {"imagenet", "fer2013"} and len(flip25) == 25
    assert data_set_names(["robustness"]) == ["imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_v2", "objectnet"]
    assert data_set_names(["retrieval"]) == ["flickr30k", "mscoco"]


def test_names_and_groups_keep_their_order_and_come_once():
    assert data_set_names(["mnist", "retrieval", "flickr30k", "dtd", "mnist"]) == [
        "mnist",
        "flickr30k",
        "mscoco",
        "dtd",
    ]
    assert data_set_names([]) == []


def test_unknown_names_are_refused_with_those_alike():
    with pytest.raises(ValueError, match=r"no data set 'food_101'\. Did you mean food101"):
        data_set("food_101")
    with pytest.raises(ValueError, match=r"There are: birdsnap, .*, voc2007"):
        data_set("???")
    with pytest.raises(ValueError, match="no data set"):
        data_set("../datasets/imagenet")
    with pytest.raises(ValueError, match=r"'clip_27'\. Did you mean clip27.*The groups are: clip27, flip25"):
        data_set_names(["mnist", "clip_27"])


# -- files that are wrong ---------------------------------------------------------------------------------------------

GOOD = """\
title: Two
task: classification
groups: [some]
path: someone/two
config: null
splits: {train: train, test: test}
image_column: image
target_column: label
metric: roc_auc
templates: clip_7
licence: MIT
sources: ["https://example.org"]
class_names: [cat, dog]
"""


def test_a_good_file_is_read():
    found = read_data_set("two", GOOD)
    assert found.class_names == ("cat", "dog") and found.templates == prompt_set("clip_7") and found.config is None


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("title: Two", "titel: Two", r"no field 'titel'\. Did you mean title"),
        ("licence: MIT\n", "", "'licence' is missing"),
        ("title: Two", "title: 2", "'title' must not be 2"),
        ("path: someone/two", "path: null", "--data_dir"),
        ("groups: [some]", "groups: some", "'groups' must not be 'some'"),
        ("splits: {train: train, test: test}", "splits: {train: train, val: val}", "test is required"),
        ("splits: {train: train, test: test}", "splits: {test: 1}", "'splits' must not be"),
        ("metric: roc_auc", "metric: recall", "'recall' does not fit the task 'classification'"),
        ("task: classification", "task: detection", "does not fit the task 'detection'"),
        ("templates: clip_7", "templates: clip_8", "no {} for the label"),
        ("templates: clip_7", "templates: [a photo]", "no {} for the label"),
        ("[cat, dog]", "[yes, no]", "need quotes"),
        ("[cat, dog]", "[cat, cat]", "are repeated"),
        ("[cat, dog]", "[cat, dog]\nduplicates: [cat]", "are repeated"),
        ("[cat, dog]", "[cat, dog, bird]", "roc_auc is for two classes"),
        ("[cat, dog]", "['1', '0']", "the index of another"),
        ("[cat, dog]", "[cat, dog]\nclass_names_file: classnames.txt", "exclude each other"),
        ("metric: roc_auc", "metric: [", "while parsing"),
    ],
)
def test_a_wrong_file_is_refused(old, new, message):
    assert old in GOOD
    with pytest.raises(ValueError, match=f"(?s)The file of the data set 'two' is wrong: .*{message}"):
        read_data_set("two", GOOD.replace(old, new))


def test_retrieval_has_no_classes():
    text = GOOD.replace("task: classification", "task: retrieval").replace("metric: roc_auc", "metric: recall")
    with pytest.raises(ValueError, match="no classes in retrieval"):
        read_data_set("two", text)
