"""Unusable data of any kind are skipped and reported once; training continues with the rest."""

import itertools

import pytest
from datasets import Dataset

from flip_hf.data import reading, refusals
from flip_hf.data.reading import Reader, read_rows
from flip_hf.data.refusals import BadDataError
from flip_hf.data.sources import open_source
from flip_hf.data.stream import View
from tests.helpers import damaged
from tests.helpers.damaged import BAD_PER_SHARD, PER_SHARD, SHARDS
from tests.helpers.loading import make_train_loader, numbers, refused, saved
from tests.helpers.pairs import write_tar


def small(samples: int) -> View:
    return View(16)


@pytest.fixture(scope="module")
def damaged_shards(tmp_path_factory):
    """(folder, numbers of the good samples, reasons)"""
    folder = tmp_path_factory.mktemp("damaged")
    return folder, *damaged.write_damaged_shards(folder, SHARDS, PER_SHARD, BAD_PER_SHARD)


def test_damaged_samples_are_skipped_counted_and_named(samples, tmp_path, caplog):
    bad = {3: (samples[3][1][:200], b"cut off"), 9: (b"no image", b"text"), 11: (samples[11][1], b"  ")}
    rows = [(key, *bad.get(i, (image, caption))) for i, (key, image, caption) in enumerate(samples[:40])]
    write_tar(tmp_path / "shard.tar", rows)
    loader = make_train_loader(tmp_path / "shard.tar", block=1, batch_size=37)
    assert sorted(numbers([next(iter(loader))])) == [i for i in range(40) if i not in bad]
    assert refused(loader) == {"damaged image": 1, "not an image": 1, "empty caption": 1}
    assert f"sample 00009 of {tmp_path / 'shard.tar'}" in caplog.text


def test_the_log_does_not_drown_in_refusals(tmp_path, caplog):
    rows = [(f"{n:05d}", damaged.good(n) if n % 3 == 0 else [("txt", b"t")]) for n in range(90)]
    (tmp_path / "x.tar").write_bytes(damaged.shard(rows))
    loader = make_train_loader(tmp_path / "x.tar", batch_size=30, block=1)
    next(iter(loader))
    assert refused(loader)["missing image"] >= 58
    assert caplog.text.count("Skipped in") == refusals.MAX_LOGGED and "one a minute" in caplog.text


def test_rows_of_a_table_are_checked_too(samples, tmp_path):
    image = {"bytes": samples[0][1], "path": None}
    images = [image, None, {"bytes": b"", "path": None}, {"bytes": None, "path": "/nowhere.jpg"}, image, image, image]
    captions = [["00000 x"], ["00001 x"], ["00002 x"], ["00003 x"], None, [], [None]]
    Dataset.from_dict({"image": images, "caption": captions}).to_parquet(str(tmp_path / "x.parquet"))
    loader = make_train_loader(tmp_path / "x.parquet", batch_size=1, block=1)
    assert numbers(itertools.islice(loader, 2)) == [0, 0]
    reasons = {"missing image": 2, "missing caption": 2, "caption is not text": 1}
    reasons["image is a path, not bytes"] = 1
    assert refused(loader) == reasons
    Dataset.from_dict({"image": [image], "caption": [3.5]}).to_parquet(str(tmp_path / "y.parquet"))
    with pytest.raises(BadDataError, match="3 x caption is not text"):
        next(iter(make_train_loader(tmp_path / "y.parquet")))


@pytest.mark.parametrize("damage", [0, 2])
def test_a_damaged_parquet_file_costs_itself_wherever_it_is(parquet_folder, damage):
    file = parquet_folder / f"part-{damage}.parquet"
    file.write_bytes(file.read_bytes()[:3000])
    source = open_source(str(parquet_folder), image_column="picture", target_column="words")
    problems = []
    rows = read_rows(
        source.shards, Reader(0, 1), epoch=0, seed=None, report=lambda *reasons: problems.append(reasons[0])
    )
    numbers = sorted(int(source.target(row)[:5]) for _, row in rows)
    assert numbers == [number for number in range(160) if number // 40 != damage]
    assert problems == ["unreadable shard"]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_good_sample_is_used_once_and_every_bad_one_reported(damaged_shards, workers):
    """A whole epoch: shards are of one size, so that both workers end it together."""
    folder, good, reasons = damaged_shards
    loader = make_train_loader(folder, workers=workers, block=128, batch_size=10, view_at=small)
    assert sorted(numbers(itertools.islice(loader, len(good) // 10))) == good
    assert refused(loader) == reasons
    assert loader.counts["drawn"] == {str(folder): len(good)}


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_survive_a_resume_and_count_once(damaged_shards, workers):
    """Interrupted after every 37 batches, in the middle of blocks and at cut shards."""
    folder, good, _ = damaged_shards
    options = {"workers": workers, "block": 64, "batch_size": 5, "view_at": small}
    straight = make_train_loader(folder, **options)
    states = None
    steps = 4 * 37
    expected = numbers(itertools.islice(straight, steps))
    seen = []
    for _ in range(4):
        loader = make_train_loader(folder, **options, states=states)
        seen += numbers(itertools.islice(loader, 37))
        states = saved([loader])
    assert seen == expected and loader.counts == straight.counts and refused(loader)["truncated shard"] >= 3


def test_the_counts_of_all_processes_resume_on_another_number_of_them(damaged_shards):
    folder, good, reasons = damaged_shards
    # With this seed the last row of the epoch is a good one: bad ones are reported with the next batch.
    options = {"block": 64, "batch_size": 1, "view_at": small, "seed": 6}
    old = [make_train_loader(folder, process=Reader(rank, 2), **options) for rank in range(2)]
    for loader, count in zip(old, (300, 111), strict=True):
        for _ in itertools.islice(loader, count):
            pass
    new = make_train_loader(folder, states=saved(old), **options)
    for _ in itertools.islice(new, len(good) - 411):
        pass
    assert refused(new) == reasons and new.counts["drawn"] == {str(folder): len(good)}


# -- too much of it ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mostly_garbage(tmp_path):
    """Two of three samples have no image."""
    for part in range(2):
        rows = [(f"{n:05d}", damaged.good(n) if n % 3 == 0 else [("txt", b"t")]) for n in range(900)]
        (tmp_path / f"{part}.tar").write_bytes(damaged.shard(rows))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_mostly_garbage_ends_the_run_in_words(mostly_garbage, workers):
    loader = make_train_loader(mostly_garbage, workers=workers, max_bad_fraction=0.5, view_at=small)
    with pytest.raises(BadDataError, match=r"2,048 samples.*--max_bad_fraction 0.5: 1,3\d\d x missing image") as caught:
        for _ in loader:
            pass
    assert "Traceback" not in str(caught.value) and "worker process" not in str(caught.value)


def test_a_run_resumes_under_a_higher_limit(mostly_garbage):
    loader = make_train_loader(mostly_garbage, max_bad_fraction=0.7, view_at=small, batch_size=30)
    assert len(numbers(itertools.islice(loader, 60))) == 1800


def test_the_window_survives_a_resume(mostly_garbage):
    """Interrupted before each look, the run would never end."""
    states = None
    options = {"max_bad_fraction": 0.5, "view_at": small, "batch_size": 30}
    with pytest.raises(BadDataError):
        for _ in range(100):
            loader = make_train_loader(mostly_garbage, states=states, **options)
            for _ in itertools.islice(loader, 10):
                pass
            states = saved([loader])


def test_nothing_but_garbage_is_an_error_and_not_an_endless_loop(tmp_path):
    write_tar(tmp_path / "shard.tar", [(f"{i:05d}", b"no image", b"text") for i in range(8)])
    with pytest.raises(BadDataError, match="no usable sample in 3 whole epochs: 24 x not an image"):
        next(iter(make_train_loader(tmp_path / "shard.tar")))


def test_a_long_row_of_unreadable_shards_ends_the_run(tar_folder, samples):
    loader = make_train_loader(tar_folder / "shard-{0000..0099}.tar", block=1, batch_size=1)
    with pytest.raises(BadDataError, match=f"{reading.MAX_BROKEN_SHARDS} shards in a row.*FileNotFoundError"):
        for _ in itertools.islice(loader, 1000):
            pass


def test_one_unreadable_shard_of_a_reader_does_not_end_the_run(tar_folder):
    """Five readers of five shards: one has nothing for an epoch, and another shard in the next."""
    (tar_folder / "shard-0001.tar").write_bytes(b"")
    for rank in range(5):
        loader = make_train_loader(tar_folder, process=Reader(rank, 5))
        assert len(numbers(itertools.islice(loader, 8))) == 64
