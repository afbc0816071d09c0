"""Captions made of labels, and captions drawn from several columns by weight."""

import csv
import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from flip_hf.data.captions import LabelCaptions, Prompts, prompts_of
from flip_hf.data.columns import read_weights
from flip_hf.data.decode import choose_caption
from flip_hf.data.loader import TrainLoader
from flip_hf.data.positions import SourcePosition
from flip_hf.data.reading import Reader
from flip_hf.data.refusals import Refusals, RefusedSample
from flip_hf.data.samples import SourceReader
from flip_hf.data.sources import Source, open_source
from flip_hf.data.stream import PatchPlan, TrainStream, View
from flip_hf.data.transforms import TrainTransform
from flip_hf.training.arguments import DataArguments
from flip_hf.training.evaluation_data import open_evaluation_data, templates
from flip_hf.training.inputs import open_training_data
from tests.helpers.loading import ALONE, saved

NAMES = ["hot_dog", "cat", "acoustic  guitar"]
SPOKEN = ["hot dog", "cat", "acoustic guitar"]
TEMPLATES = ("a photo of a {}.", "{}")
CLASSES = tuple((name,) for name in NAMES)
FEATURES = Features({"image": Image(), "label": ClassLabel(names=NAMES)})


def label_of(number: int) -> int:
    return number % len(NAMES)


@pytest.fixture
def pictures(samples) -> list[bytes]:
    return [image for _, image, _ in samples[:12]]


@pytest.fixture
def parquet(pictures, tmp_path):
    """Twelve pictures with a label type, which the file's metadata describe."""
    rows = {"image": [{"bytes": each, "path": None} for each in pictures], "label": [label_of(i) for i in range(12)]}
    Dataset.from_dict(rows, features=FEATURES).to_parquet(str(tmp_path / "labelled.parquet"))
    return tmp_path / "labelled.parquet"


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def labelled_forms(pictures: list[bytes], folder) -> list[tuple]:
    """The same labelled pictures in every form: (data, column, whether the data name their classes)."""
    rows = {"image": [{"bytes": each, "path": None} for each in pictures], "label": [label_of(i) for i in range(12)]}
    typed = Dataset.from_dict(rows, features=FEATURES)
    typed.save_to_disk(str(folder / "saved"))
    typed.to_parquet(str(folder / "typed.parquet"))
    plain = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict(rows, features=plain).to_parquet(str(folder / "numbers.parquet"))
    with tarfile.open(folder / "cls.tar", "w") as with_cls, tarfile.open(folder / "json.tar", "w") as with_json:
        for number, picture in enumerate(pictures):
            for archive in (with_cls, with_json):
                add(archive, f"{number:03d}.jpg", picture)
            add(with_cls, f"{number:03d}.cls", f"{label_of(number)}\n".encode())
            add(with_json, f"{number:03d}.json", json.dumps({"info": {"class": label_of(number)}}).encode())
    (folder / "list").mkdir()
    with (folder / "list" / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filepath", "number", "name"])
        for number, picture in enumerate(pictures):
            (folder / "list" / f"{number}.jpg").write_bytes(picture)
            table.writerow([f"{number}.jpg", label_of(number), NAMES[label_of(number)]])
    for number, picture in enumerate(pictures):
        place = folder / "folders" / NAMES[label_of(number)]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(picture)
    return [
        (folder / "saved", "label", True),
        (folder / "typed.parquet", "label", True),
        (folder / "folders", "label", True),
        (folder / "numbers.parquet", "label", False),
        (folder / "cls.tar", "cls", False),
        (folder / "json.tar", "json.info.class", False),
        (folder / "list" / "rows.csv", "number", False),
        (folder / "list" / "rows.csv", "name", False),
    ]


def drawn(source: Source, seed: int = 0) -> Counter[str]:
    rng = np.random.default_rng(seed)
    return Counter(source.caption(row, rng) for row in source.rows())


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_of_every_form_become_captions(pictures, tmp_path):
    for data, column, are_named in labelled_forms(pictures, tmp_path):
        prompts = Prompts(("the {}!",), None if are_named else CLASSES, chosen=True)
        source = open_source(str(data), target_column=column, prompts=prompts)
        assert source.captions_from_labels, data
        assert drawn(source) == {f"the {name}!": 4 for name in SPOKEN}, data


def test_names_given_replace_those_of_the_data_and_synonyms_are_drawn_too(parquet):
    classes = (("hot_dog", "frankfurter"), ("kitten", "cat"), ("guitar",))
    source = open_source(str(parquet), target_column="label", prompts=Prompts(("{}",), classes))
    counts = sum((drawn(source, seed) for seed in range(100)), Counter())
    assert counts["guitar"] == 400 and counts["kitten"] + counts["cat"] == 400
    for name in ("hot dog", "frankfurter", "kitten", "cat"):
        assert abs(counts[name] - 200) < 4 * 10, counts  # four deviations of a fair coin, thrown 400 times


def test_templates_are_drawn_evenly_and_anew_in_every_epoch(parquet):
    prompts = Prompts(("a {}", "the {}", "one {}"))
    source = open_source(str(parquet), target_column="label", prompts=prompts)
    reader = SourceReader(
        source,
        lambda image, rng, size: image,  # pyright: ignore[reportArgumentType]
        ALONE,
        SourcePosition([]),
        seed=3,
        shuffle_block=4,
        refusals=Refusals(),
    )
    reader.image_size = 8
    captions = [sample.caption for sample in itertools.islice(reader.samples(), 12 * 50)]
    counts = Counter(caption.split()[0] for caption in captions)
    deviation = np.sqrt(600 * 1 / 3 * 2 / 3)
    assert all(abs(counts[word] - 200) < 4 * deviation for word in ("a", "the", "one")), counts
    epochs = {tuple(sorted(captions[start : start + 12])) for start in range(0, 600, 12)}
    assert len(epochs) > 40


def make_loader(source: Source, workers: int, states=None) -> TrainLoader:
    def tokenize(captions, *_of_view):
        return {"letters": torch.tensor([list(caption.ljust(32).encode()) for caption in captions])}

    plan = PatchPlan(TrainTransform(), lambda images, ids_keep: images, lambda samples: View(16))
    stream = TrainStream([source], plan, tokenize, batch_size=4, process=ALONE, seed=5, shuffle_block=4)
    return TrainLoader(stream, num_workers=workers, pin_memory=False, states=states)


def texts_of(batches: Iterable[dict]) -> list[list[str]]:
    return [[bytes(letters).decode().rstrip() for letters in batch["letters"].tolist()] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_of_labels_are_the_same_again_and_after_resuming(parquet, workers):
    source = open_source(str(parquet), target_column="label", prompts=Prompts(("a {}", "the {}", "one {}", "{}")))
    straight = texts_of(itertools.islice(make_loader(source, workers), 9))
    assert straight == texts_of(itertools.islice(make_loader(source, workers), 9))
    first = make_loader(source, workers)
    begun = texts_of(itertools.islice(first, 4))
    assert begun + texts_of(itertools.islice(make_loader(source, workers, saved([first])), 5)) == straight


def test_labels_without_a_class_name_are_refused_by_reason():
    labels = LabelCaptions([("cat",), ("_",), ("dog",)], ("a {}",))
    rng = np.random.default_rng(0)
    reasons = {
        "label without a class name": (3, -2, 1, "bird", 0.5, [0], "7"),
        "no label (-1)": (-1, "-1", b"-1"),
        "missing label": (None, "", b" \n"),
    }
    for reason, values in reasons.items():
        for value in values:
            with pytest.raises(RefusedSample) as caught:
                labels(value, rng)
            assert caught.value.reason == reason, value
    assert [labels(value, rng) for value in (2, "2", b"dog\n", 2.0)] == ["a dog"] * 4


def test_refused_labels_are_counted_and_the_rest_is_used(pictures, tmp_path):
    numbers = [0, -1, 7, 1, None, 2, -1, 0, 1, 2, 0, 1]
    features = Features({"image": Image(), "label": Value("int64")})
    rows = {"image": [{"bytes": each, "path": None} for each in pictures], "label": numbers}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data.parquet"))
    source = open_source(str(tmp_path / "data.parquet"), target_column="label", prompts=Prompts(TEMPLATES, CLASSES))
    loader = make_loader(source, 0)
    for _ in itertools.islice(loader, 2):
        pass
    assert loader.counts["refused"] == {
        source.name: {"no label (-1)": 2, "label without a class name": 1, "missing label": 1}
    }


def test_a_vocabulary_is_learned_from_all_prompts_and_names_alike():
    columns = open_columns([("cat", "kitty"), ("dog",)], ("a {}", "the {}", "{}!", "one {}"))
    texts = list(itertools.islice(prompts_of(columns), 24))
    words = Counter(word.strip("!") for text in texts for word in text.split())
    assert words == {"cat": 8, "kitty": 8, "dog": 8, "a": 6, "the": 6, "one": 6}


def open_columns(classes, templates):
    from flip_hf.data.captions import CaptionColumn

    return (CaptionColumn("label", 1.0, LabelCaptions(classes, templates)),)


# -- what a column holds -----------------------------------------------------------------------------------------------


def test_a_column_of_neither_text_nor_labels_is_refused_with_those_that_could_be_meant(pictures, tmp_path):
    features = Features(
        {
            **{"image": Image(), "label": ClassLabel(names=NAMES), "number": Value("int32"), "alt": Value("string")},
            **{"thumb": Image(), "tags": [Value("int64")], "texts": [Value("string")], "box": {"x": Value("float32")}},
        }
    )
    picture = {"bytes": pictures[0], "path": None}
    row = {"image": picture, "label": 0, "number": 3, "alt": "x", "thumb": picture, "tags": [1], "texts": ["y"]}
    Dataset.from_list([{**row, "box": {"x": 0.5}}], features=features).save_to_disk(str(tmp_path / "saved"))
    Dataset.from_list([{**row, "box": {"x": 0.5}}], features=features).to_parquet(str(tmp_path / "one.parquet"))
    prompts = Prompts(TEMPLATES)
    could_be = "Columns of text: alt, texts; of labels: label. Name one with --caption_column"
    cases = {"number": "numbers", "thumb": "values of type Image", "tags": "lists without texts", "box": "fields"}
    for data, (column, what) in itertools.product(("saved", "one.parquet"), cases.items()):
        with pytest.raises(ValueError, match=f"column '{column}' .* holds .*{what}.*neither text.*{could_be}"):
            open_source(str(tmp_path / data), target_column=column, prompts=prompts)
    with pytest.raises(ValueError, match="'box.x' .* holds numbers: .* give --class_names FILE"):
        open_source(str(tmp_path / "one.parquet"), target_column="box.x", prompts=prompts)
    for column in ("alt", "texts"):
        assert open_source(str(tmp_path / "one.parquet"), target_column=column, prompts=prompts).captions == ()


def test_numbers_in_json_need_class_names(pictures, tmp_path):
    labelled_forms(pictures, tmp_path)
    with pytest.raises(
        ValueError, match="'json.info.class' .* numbers.*--class_names FILE.*other columns are: jpg, json"
    ):
        open_source(str(tmp_path / "json.tar"), target_column="json.info.class", prompts=Prompts(TEMPLATES))


def test_the_message_about_a_missing_caption_column_says_that_labels_do(parquet):
    with pytest.raises(
        ValueError, match="no caption column.*To make captions of the labels, give --caption_column label"
    ):
        open_source(str(parquet), prompts=Prompts(TEMPLATES))


def test_class_names_that_do_not_fit_are_refused_before_training(pictures, parquet, tmp_path):
    def opened(data, column, names):
        classes = tuple((name,) for name in names)
        return open_source(str(data), target_column=column, prompts=Prompts(TEMPLATES, classes, chosen=True))

    with pytest.raises(ValueError, match="--class_names has 2 names, but .* has 3 classes in 'label'"):
        opened(parquet, "label", NAMES[:2])
    with pytest.raises(ValueError, match="calls class 0 'hot_dog', and the class names given call it 'cat'"):
        opened(parquet, "label", ["cat", "hot_dog", "x"])
    labelled_forms(pictures, tmp_path)
    with pytest.raises(ValueError, match="'1' could be the name of class 0 or the index of another. Write the labels"):
        opened(tmp_path / "cls.tar", "cls", ["1", "0", "2"])


# -- options -----------------------------------------------------------------------------------------------------------


def test_templates_come_from_sets_files_and_the_command_line(tmp_path):
    (tmp_path / "mine.txt").write_text("# mine\na {}\n\nthe {}\n")
    data = DataArguments(train_data=["x"], caption_templates=["clip_1", str(tmp_path / "mine.txt"), "one {}"])
    assert data.read_prompts("caption_templates") == ("a photo of a {}.", "a {}", "the {}", "one {}")
    assert templates(data) == ["a photo of a {}.", "a {}", "the {}", "one {}"]
    assert templates(DataArguments(train_data=["x"], templates=["clip_7"], caption_templates=["a {}"]))[0][:4] == "itap"
    assert DataArguments(train_data=["x"]).read_prompts("caption_templates") == ("a photo of a {}.",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("clip_70", "--caption_templates: .*'clip_70' has no {}.*Sets of templates are clip_1, clip_7, clip_80"),
        ("a photo", "'a photo' has no {} for the label"),
        ("{} and {}", "has {} 2 times"),
        ("none.txt", "There is no file none.txt with prompt templates"),
        ("bad.txt", "'without' has no {} for the label"),
        ("empty.txt", "empty.txt has no templates"),
    ],
)
def test_bad_templates_are_refused_with_the_options(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_text("a {}\nwithout\n")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=message):
        DataArguments(train_data=["x"], caption_templates=[given])


def test_options_about_labels_are_refused_where_there_are_none(parquet, image_folder, tmp_path):
    texts = {"train_data": [str(image_folder)], "caption_column": ["caption"]}
    labels = {"train_data": [str(parquet)], "caption_column": ["label"]}
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    names = str(tmp_path / "names.txt")
    cases = [
        ({**texts, "caption_templates": ["clip_7"]}, "makes captions of labels, and 'caption' of .* holds captions"),
        ({**texts, "class_names": names, "eval_data": "x", "eval_caption_column": "text"}, "hold any"),
        ({**labels, "holdout": 0.1}, "Evaluate on labelled pictures: --eval_data"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            open_training_data(DataArguments(**options))
    (source,) = open_training_data(DataArguments(**labels, class_names=names, caption_templates=["clip_80"]))
    assert source.captions_from_labels and len(source.captions[0].labels.templates) == 80
    (source,) = open_training_data(DataArguments(**texts, class_names=names))  # they are for --eval_data
    assert source.captions == () and not source.captions_from_labels


def test_evaluation_takes_the_column_that_training_took(pictures, tmp_path):
    features = Features({"image": Image(), "caption": Value("string"), "fine": ClassLabel(names=NAMES)})
    picture = {"bytes": pictures[0], "path": None}
    row = {"image": picture, "caption": "x", "fine": 1}
    Dataset.from_list([row], features=features).to_parquet(str(tmp_path / "test.parquet"))
    data = DataArguments(train_data=["x"], eval_data=str(tmp_path / "test.parquet"))
    assert open_evaluation_data(data).pairs is not None
    evaluation = open_evaluation_data(data, likely="fine")
    assert evaluation.pairs is None and evaluation.class_names == tuple(NAMES)
    (tmp_path / "names.txt").write_text("sausage; frankfurter\ncat\nguitar\n")
    data = DataArguments(**{**vars(data), "class_names": str(tmp_path / "names.txt"), "caption_column": ["fine"]})
    assert open_evaluation_data(data, likely="fine").class_names == ("sausage", "cat", "guitar")


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(pictures, tmp_path):
    """Twelve pictures with three captions: a text, a list, and a label."""
    features = Features(
        {
            **{"image": Image(), "caption": Value("string"), "alt": [Value("string")], "dc:title": Value("string")},
            "label": ClassLabel(names=NAMES),
        }
    )
    rows = [
        {
            **{"image": {"bytes": each, "path": None}, "caption": "c" if i else "", "dc:title": "t"},
            **{"alt": ["a1", "a2"] if i != 1 else [], "label": 0},
        }
        for i, each in enumerate(pictures)
    ]
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "several.parquet"))
    return str(tmp_path / "several.parquet")


def test_columns_are_drawn_by_weight_and_an_empty_one_falls_to_the_others(several):
    source = open_source(several, target_column="caption:3 alt:1", prompts=Prompts(TEMPLATES))
    assert [(column.name, column.weight) for column in source.captions] == [("caption", 3), ("alt", 1)]
    assert not source.captions_from_labels
    rows = list(source.rows())
    rng = np.random.default_rng(0)
    without_caption, without_alt, whole = (Counter(source.caption(row, rng) for _ in range(800)) for row in rows[:3])
    assert set(without_caption) == {"a1", "a2"} and set(without_alt) == {"c"}
    assert abs(whole["c"] - 600) < 4 * np.sqrt(800 * 3 / 4 * 1 / 4), whole
    assert abs(without_caption["a1"] - 400) < 4 * np.sqrt(200), without_caption
    assert source.texts(rows[2]) == ["c", "a1", "a2"]


def test_a_row_without_any_caption_is_refused_with_the_reason_of_the_first_one_drawn(several):
    source = open_source(several, target_column="caption:1e9 alt:1", prompts=Prompts(TEMPLATES))
    with pytest.raises(RefusedSample, match="empty caption"):
        source.caption({"caption": " ", "alt": []}, np.random.default_rng(0))
    with pytest.raises(RefusedSample, match="empty caption"):
        source.texts({"caption": " ", "alt": []})


def test_labels_may_be_among_the_columns(several):
    source = open_source(several, target_column="caption:1 label:1", prompts=Prompts(("a {}",)))
    row = list(source.rows())[2]
    rng = np.random.default_rng(0)
    counts = Counter(source.caption(row, rng) for _ in range(400))
    assert set(counts) == {"c", "a hot dog"} and abs(counts["c"] - 200) < 40 and not source.captions_from_labels


def test_weights_reach_into_json_and_keep_alternatives(pictures, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.jpg", pictures[0])
        add(archive, "0.json", json.dumps({"caption": "j", "alt": "x"}).encode())
        add(archive, "0.txt", b"t")
    source = open_source(
        str(tmp_path / "a.tar"), target_column="json.missing;txt:1 json.caption:2", prompts=Prompts(TEMPLATES)
    )
    (row,) = source.rows()
    rng = np.random.default_rng(0)
    counts = Counter(source.caption(row, rng) for _ in range(600))
    assert set(counts) == {"j", "t"} and abs(counts["j"] - 400) < 4 * np.sqrt(600 * 2 / 9)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("caption:x alt:1", "The weight 'x' in 'caption:x alt:1' is not a positive number.*'caption:3 alt_text:1'"),
        *((f"caption:{weight} alt:1", "is not a positive number") for weight in ("0", "-1", "nan", "inf", "")),
        ("caption:2 alt", "The column 'alt' in .* has no weight"),
        ("caption:2 caption:1", "'caption' is given twice"),
        ("caption:2 other:1", "no caption column 'other'. Its columns are: alt, caption"),
        ("caption:2 image:1", "'image' .* holds values of type Image"),
    ],
)
def test_bad_weights_are_refused(several, columns, message):
    with pytest.raises(ValueError, match=message):
        open_source(several, target_column=columns, prompts=Prompts(TEMPLATES))


def test_a_column_with_a_colon_in_its_name_is_a_column(several):
    source = open_source(several, target_column="dc:title", prompts=Prompts(TEMPLATES))
    assert source.captions == () and drawn(source) == {"t": 12}
    source = open_source(several, target_column="dc:title:2 caption:1", prompts=Prompts(TEMPLATES))
    assert [column.name for column in source.captions] == ["dc:title", "caption"]
    assert read_weights("a;b:2") == (("a;b", 2.0),)


def test_one_column_of_texts_draws_as_it_did(several):
    """The generator is left as `choose_caption` leaves it, so that crops are those of earlier versions too."""
    for column in ("caption", "alt", "caption;alt"):
        source = open_source(several, target_column=column, prompts=Prompts(TEMPLATES))
        assert source.captions == ()
        for row in list(source.rows())[2:]:
            ours = np.random.default_rng(7)
            theirs = np.random.default_rng(7)
            assert source.caption(row, ours) == choose_caption(source.target(row), theirs)
            assert ours.bit_generator.state == theirs.bit_generator.state


def test_every_reader_sees_each_sample_once_whatever_is_drawn(several):
    source = open_source(several, target_column="caption:3 alt:1", prompts=Prompts(TEMPLATES))
    counts = [0, 0]
    for index in range(2):
        reader = SourceReader(
            source,
            lambda image, rng, size: image,  # pyright: ignore[reportArgumentType]
            Reader(index, 2),
            SourcePosition([]),
            seed=0,
            shuffle_block=4,
            refusals=Refusals(),
        )
        reader.image_size = 8
        for _ in reader.samples():
            if reader.position.next_epoch > 1:
                break
            counts[index] += 1
    assert sum(counts) == 12
