"""`flip-hf data check` finds what is planted in a data set, and nothing else, with any number of processes.

`FLIP_HF_LONG_TESTS=1` is the promised size: 20,000 samples.
"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flip_hf.commands import main
from flip_hf.data.decode import decode_image
from flip_hf.data.tokenization import train_wordpiece
from tests.helpers.loading import make_train_loader, refused
from tests.helpers.pairs import write_tar
from tests.helpers.planted import Planted, write_planted

LONG = bool(os.environ.get("FLIP_HF_LONG_TESTS"))
# Shards, and in each: samples, damaged ones, exact duplicates, near ones.
SIZE = (10, 2000, 60, 20, 20) if LONG else (6, 60, 4, 3, 3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Planted]:
    folder = tmp_path_factory.mktemp("planted")
    return folder, write_planted(folder, *SIZE)


def check(data: object, folder: Path, *more: object) -> dict:
    main.main(["data", "check", *map(str, (data, folder, "--seconds", "0", "--workers", "0", *more))])
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def checked(planted, tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("checks") / "check"
    return check(planted[0], folder, "--workers", "2"), folder


def surplus(folder: Path, kind: str) -> set[tuple[int, int]]:
    rows = pq.read_table(folder / "duplicates.parquet").to_pylist()
    return {(row["shard"], row["row"]) for row in rows if row["surplus"] == kind}


def test_everything_planted_is_found_and_nothing_else(planted, checked):
    wanted = planted[1]
    report, folder = checked
    assert (report["samples"], report["usable"]) == (wanted.samples, wanted.usable)
    assert {reason: found["count"] for reason, found in report["unusable"].items()} == wanted.refused
    assert {reason: found["count"] for reason, found in report["damage"].items()} == +wanted.damage
    assert len(wanted.refused) >= 9 and wanted.damage["truncated shard"] == SIZE[0]
    assert surplus(folder, "pair") == wanted.pairs
    assert surplus(folder, "image") == wanted.images
    assert surplus(folder, "near") == wanted.near


def test_the_reasons_are_those_of_training(planted, checked):
    # One more than there are, so that the end of the last shard is seen, and the sound beginning of the next epoch.
    loader = make_train_loader(planted[0], batch_size=planted[1].usable + 1, block=1)
    next(iter(loader))
    report = checked[0]
    reasons = {reason: found["count"] for reason, found in {**report["unusable"], **report["damage"]}.items()}
    assert refused(loader) == reasons


def test_of_two_reasons_it_is_that_of_training(samples, tmp_path):
    write_tar(tmp_path / "a.tar", [*samples[:9], ("00009", b"none", b" ")])
    loader = make_train_loader(tmp_path / "a.tar", batch_size=10, block=1)
    next(iter(loader))
    report = check(tmp_path / "a.tar", tmp_path / "out")
    assert set(report["unusable"]) == set(refused(loader)) == {"empty caption"}


def test_the_report_is_the_same_for_any_number_of_processes(planted, checked, tmp_path):
    others = [
        check(planted[0], tmp_path / str(workers), "--workers", workers) for workers in ((0,) if LONG else (0, 7))
    ]
    for report in (checked[0], *others):
        report = {name: value for name, value in report.items() if name not in ("speed", "command")}
        assert report == {name: checked[0][name] for name in report}


def test_tables_name_every_sample(planted, checked):
    report, folder = checked
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    assert len({(row["shard"], row["row"]) for row in samples}) == len(samples) == report["samples"]
    keys = {(row["shard"], row["row"]): row["key"] for row in samples}
    duplicates = pq.read_table(folder / "duplicates.parquet").to_pylist()
    assert all(row["key"] == keys[row["shard"], row["row"]] for row in duplicates)
    assert re.fullmatch(r"\d{5} of .*/\d{4}\.tar", duplicates[0]["key"])
    first = [row for row in duplicates if row["surplus"] is None]
    assert len(first) == report["duplicates"]["groups"] == len({row["group"] for row in duplicates})


def test_examples_are_the_first_of_their_reason(checked):
    report, folder = checked
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    bad = sorted((row["shard"], row["row"]) for row in samples if row["refused"] == "damaged image")
    named = [(each["shard"], each["row"]) for each in report["unusable"]["damaged image"]["examples"]]
    assert named == bad[:5]


def test_the_picture_can_be_opened(checked):
    with Image.open(checked[1] / "report.png") as picture:
        picture.load()
        assert picture.width > 1000 and picture.height > 1000


def test_sizes_captions_and_tokens_are_measured(samples, tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [(key, image, b"two words") for key, image, _ in samples[:9]] + samples[9:10])
    tokenizer = train_wordpiece(["two words"] * 9, vocab_size=60, context_length=16)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    report = check(tmp_path / "a.tar", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer")
    assert report["captions"]["characters"]["median"] == 9 and report["captions"]["words"]["median"] == 2
    assert report["captions"]["samples_with_captions_of_others"] == 8
    lengths = report["captions"]["tokens"]
    assert lengths["median"] == len(tokenizer("two words")["input_ids"]) < lengths["max"]
    with Image.open(tmp_path / "out" / "report.png"):
        assert "| tokens of a caption |" in capsys.readouterr().out


def test_the_speed_of_the_loader_and_the_workers_that_a_gpu_needs(samples, tmp_path, capsys):
    write_tar(tmp_path / "a.tar", samples[:40])
    more = ("--seconds", "0.2", "--image_size", "32", "--samples_per_second", "1000000000")
    speed = check(tmp_path / "a.tar", tmp_path / "out", *more)["speed"]
    assert speed["loaded_per_second_and_worker"] > 1 and speed["wanted_per_second"] == 1e9
    workers = -(-1e9 // speed["loaded_per_second_and_worker"])
    assert f"needs {workers:,.0f} workers" in capsys.readouterr().out


def test_labels_and_images_alone_are_checked_too(tmp_path):
    report = check("shapes", tmp_path / "labels", "--caption_column", "label", "--split", "test")
    assert report["caption_column"] == "label" and report["usable"] == report["samples"]
    report = check("shapes", tmp_path / "alone", "--images_alone", "--split", "test")
    assert report["captions"] == {"count": 0, "samples_with_captions_of_others": report["usable"] - 1}


def test_data_without_any_usable_sample_are_reported(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [(f"{number:03d}", b"none", b"text") for number in range(5)])
    report = check(tmp_path / "a.tar", tmp_path / "out", "--seconds", "0.1", "--image_size", "32")
    assert report["usable"] == 0 and report["unusable"]["not an image"]["count"] == 5
    assert report["speed"]["loaded_per_second_and_worker"] is None
    assert "0 can be used, 5 cannot" in capsys.readouterr().out


@pytest.fixture
def with_overlap(samples, tmp_path) -> Path:
    """Twelve samples, and evaluation data that hold the first as it is, the second encoded again, and six others."""
    buffer = io.BytesIO()
    decode_image(samples[1][1]).resize((40, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=60)
    others = [("x", b"none", b"text"), ("same", samples[0][1], b"text"), ("again", buffer.getvalue(), b"text")]
    write_tar(tmp_path / "train.tar", samples[:12])
    write_tar(tmp_path / "eval.tar", [*others, *samples[20:26]])
    return tmp_path


def test_images_of_evaluation_data_are_found_listed_and_drawn(with_overlap, tmp_path, capsys):
    data = ("--eval_data", with_overlap / "eval.tar", "shapes")
    report = check(with_overlap / "train.tar", tmp_path / "out", *data)
    found, other = report["eval_overlap"]
    counts = ("samples", "usable", "same_image", "near", "eval_same_image", "eval_near")
    assert [found[name] for name in counts] == [9, 8, 1, 1, 1, 1]
    assert (other["same_image"], other["near"]) == (0, 0)
    rows = pq.read_table(tmp_path / "out" / "overlap.parquet").to_pylist()
    matched = [(row["overlap"], row["row"], row["key"][:5], row["eval_row"], row["eval_key"][:4]) for row in rows]
    assert matched == [("image", 0, "00000", 1, "same"), ("near", 1, "00001", 2, "agai")]
    assert rows[0]["eval_data"] == found["data"] == str(with_overlap / "eval.tar")
    assert "(8 samples, 1 cannot be used): 1 sample has an image of it, 1 looks like one." in capsys.readouterr().out


def test_evaluation_data_that_were_not_all_read_are_named(with_overlap, tmp_path, capsys):
    """Otherwise samples that are in the lost part would be taken for none of the evaluation data's."""
    whole = (with_overlap / "eval.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    report = check(with_overlap / "train.tar", tmp_path / "out", "--eval_data", tmp_path / "cut.tar")
    (found,) = report["eval_overlap"]
    assert {reason: each["count"] for reason, each in found["damage"].items()} == {"truncated shard": 1}
    lost = f"Not all of {tmp_path / 'cut.tar'} was compared: 1 x truncated shard, such as {tmp_path / 'cut.tar'}."
    assert lost in capsys.readouterr().out


def test_evaluation_data_that_cannot_be_read_leave_no_report_of_an_earlier_check(samples, tmp_path, capsys):
    """The table of samples is the new data's by then."""
    write_tar(tmp_path / "a.tar", samples[:4])
    (tmp_path / "eval").mkdir()
    pq.write_table(pa.table({"image": [samples[0][1]]}), tmp_path / "eval" / "00.parquet")
    for number in range(1, 17):
        (tmp_path / "eval" / f"{number:02d}.parquet").write_bytes(b"none")
    check(tmp_path / "a.tar", tmp_path / "out")
    with pytest.raises(SystemExit):
        check(tmp_path / "a.tar", tmp_path / "out", "--eval_data", tmp_path / "eval" / "*.parquet")
    assert "16 shards in a row could not be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_check_without_evaluation_data_leaves_no_overlap_of_an_earlier_one(with_overlap, tmp_path):
    check(with_overlap / "train.tar", tmp_path / "out", "--eval_data", with_overlap / "eval.tar")
    with Image.open(tmp_path / "out" / "report.png") as picture:
        height = picture.height
    report = check(with_overlap / "train.tar", tmp_path / "out")
    assert report["eval_overlap"] == [] and not (tmp_path / "out" / "overlap.parquet").exists()
    with Image.open(tmp_path / "out" / "report.png") as picture:
        assert picture.height < height


def test_the_loader_is_not_measured_for_hours_where_next_to_nothing_is_usable(samples, tmp_path):
    rare = [("0", *samples[0][1:]), *((f"{number:05d}", b"none", b"text") for number in range(1, 2500))]
    write_tar(tmp_path / "a.tar", rare)
    report = check(tmp_path / "a.tar", tmp_path / "out", "--seconds", "0.1", "--image_size", "32")
    assert report["usable"] == 1 and report["speed"]["loaded_per_second_and_worker"] is None


def test_names_in_the_data_do_not_drive_a_terminal(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("\x1b]0;mine\x07|\n0", b"none", b"text")])
    check(tmp_path / "a.tar", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "| not an image | 1 | \\x1b]0;mine\\x07\\| 0 of " in printed


def test_two_checks_do_not_write_into_one_folder(samples, tmp_path, capsys):
    write_tar(tmp_path / "a.tar", samples[:4])
    (tmp_path / "out").mkdir()
    holds = "import sys; from pathlib import Path; from flip_hf.console.lock import lock_folder\n"
    holds += "lock_folder(Path(sys.argv[1])); print(flush=True); input()"
    words = [sys.executable, "-c", holds, str(tmp_path / "out")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(SystemExit):
            check(tmp_path / "a.tar", tmp_path / "out")
        other.communicate(b"\n")
    assert f"is in use by another run (process {other.pid}" in capsys.readouterr().err
    check(tmp_path / "a.tar", tmp_path / "out")
    assert not (tmp_path / "out" / "run.lock").exists()


def test_a_report_is_not_written_among_the_data(samples, tmp_path, capsys):
    write_tar(tmp_path / "a.tar", samples[:4])
    with pytest.raises(SystemExit):
        check(tmp_path, tmp_path / "out")
    assert "lies in the folder of the data" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image_size", "100"], "--image_size must be a multiple of 16, got 100."),
        (["--distance", "9"], "--distance must be between 0 and 8, got 9."),
        (["--caption_column", "text"], "has no caption column 'text'"),
        (["--tokenizer", "no/such"], "no/such"),
        (["--eval_data", "no/such.tar"], "no/such.tar"),
        (["--eval_data", "shapes", "--eval_image_column", "photo"], "Name the right one with --eval_image_column."),
        (["--eval_image_column", "photo"], "--eval_image_column is about --eval_data: give that, too."),
        (["--eval_split", "train"], "--eval_split is about --eval_data: give that, too."),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(words, said, samples, tmp_path, capsys):
    write_tar(tmp_path / "a.tar", samples[:4])
    with pytest.raises(SystemExit) as end:
        main.main(["data", "check", str(tmp_path / "a.tar"), str(tmp_path / "out"), *words])
    printed = capsys.readouterr().err
    assert end.value.code in (1, 2) and printed.count("\n") == 1 and said in printed
    assert not (tmp_path / "out").exists()


def test_a_column_of_pictures_is_not_taken_for_captions(samples, tmp_path, capsys):
    write_tar(tmp_path / "a.tar", samples[:4])
    with pytest.raises(SystemExit):
        check(tmp_path / "a.tar", tmp_path / "out", "--caption_column", "jpg")
    assert "The column 'jpg' of" in (said := capsys.readouterr().err) and "holds bytes that are not UTF-8 text" in said
    assert not (tmp_path / "out").exists()
