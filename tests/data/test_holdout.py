"""Held-out pairs are never trained on by any reader, and are found again whatever happens to the data around them."""

import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from flip_hf.data import pool
from flip_hf.data.decode import StoredFile
from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.holdout import image_key, is_held_out
from flip_hf.data.pool import collect, open_pool, read_facts, write_pool
from flip_hf.data.reading import Reader
from flip_hf.data.sources import open_source
from flip_hf.data.targets import Captions
from flip_hf.data.transforms import EvalTransform
from tests.helpers.loading import current_epochs, make_train_loader, samples_by_epoch
from tests.helpers.pairs import write_tar

SHARE = 0.2


def held_out_numbers(samples, share: float = SHARE) -> list[int]:
    return [number for number, (_, image, _) in enumerate(samples) if is_held_out(image, share)]


def held_out(folder, share: float = SHARE, **options):
    return replace(open_source(str(folder), **options), holdout=share)


def train_with(folder, processes: int, workers: int) -> tuple[list[int], list[dict]]:
    """All samples of the first epoch and a piece of the next, of all processes, and what was counted."""
    seen = []
    counts = []
    for process in range(processes):
        reader = Reader(process, processes)
        loader = make_train_loader(folder, workers=workers, process=reader, batch_size=1, holdout=SHARE)
        for _, number in samples_by_epoch(loader):
            seen.append(number)
            if min(current_epochs(loader)) > 0:
                break
        counts.append(loader.counts)
    return seen, counts


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (3, 1)])
def test_no_reader_trains_on_held_out_pairs(tar_folder, samples, processes, workers):
    out = held_out_numbers(samples)
    assert 16 < len(out) < 48  # a fifth of 160
    seen, counts = train_with(tar_folder, processes, workers)
    assert set(seen) == set(range(160)) - set(out)
    assert sum(count["held_out"][str(tar_folder)] for count in counts) >= len(out)
    assert not any(count["refused"] for count in counts)


def test_the_same_pictures_are_held_out_in_every_form_and_order(tar_folder, image_folder, samples, tmp_path):
    """Shards of other names, numbers and order; and a smaller share is a part of a larger one."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_tar(mixed / "z.tar", samples[::-2])
    write_tar(mixed / "a.tar", samples[-2::-2])
    found = {}
    for folder in (tar_folder, mixed):
        found[folder] = set(collect([held_out(folder)], 1000).images)
    assert found[tar_folder] == found[mixed] == {image_key(samples[n][1]) for n in held_out_numbers(samples)}
    assert set(held_out_numbers(samples, 0.1)) < set(held_out_numbers(samples, 0.2))
    # A folder of files, by their names: where it lies does not matter.
    moved = tmp_path / "elsewhere" / "images"
    shutil.copytree(image_folder, moved)
    assert collect([held_out(image_folder)], 1000).captions == collect([held_out(moved)], 1000).captions != {}
    assert image_key(StoredFile("/a/b/c.jpg")) == image_key(StoredFile("hf://x/b/c.jpg")) != image_key(b"")


def test_a_picture_with_several_captions_is_one_image_of_the_pool(samples, tmp_path):
    twice = [(f"{key}-{n}", image, f"{n} {key}".encode()) for key, image, _ in samples[:20] for n in range(2)]
    write_tar(tmp_path / "a.tar", [*twice, ("bad", b"no image", b""), ("none", samples[30][1], b" ")])
    found = collect([open_source(str(tmp_path / "a.tar"))], 15)
    assert len(found.images) == 15
    facts = write_pool(collect([open_source(str(tmp_path / "a.tar"))], 100), tmp_path / "pool", {"eval_pairs": 100})
    assert (facts.images, facts.captions) == (20, 40) and read_facts(tmp_path / "pool") == facts
    batches = EvalStream(
        open_pool(tmp_path / "pool", captions=True),
        EvalTransform(32),
        Captions(),
        batch_size=64,
        process=Reader(0, 1),
    )
    (batch,) = batches
    assert batch["targets"][3] == ["0 00003", "1 00003"] and batch["images"].shape == (20, 3, 32, 32)
    assert not batch["refused"]


def test_reads_for_the_pool_are_bounded(tar_folder, samples, monkeypatch):
    monkeypatch.setattr(pool, "MAX_ROWS", 40)
    assert collect([held_out(tar_folder)], 1000).rows == 40
    monkeypatch.setattr(pool, "MAX_ROWS", 1000)
    monkeypatch.setattr(pool, "MAX_READ_BYTES", 20 * len(samples[0][1]))
    assert 15 < collect([held_out(tar_folder)], 1000).rows < 30
    monkeypatch.setattr(pool, "MAX_READ_BYTES", 2**30)
    monkeypatch.setattr(pool, "MAX_POOL_BYTES", 5 * len(samples[0][1]))
    assert 3 < len(collect([held_out(tar_folder)], 1000).images) < 8
    # Two sources have their shares.
    monkeypatch.setattr(pool, "MAX_POOL_BYTES", 2**30)
    both = [open_source(str(tar_folder)), open_source(str(sorted(tar_folder.glob("*.tar"))[0]))]
    assert len(collect(both, 10).images) <= 10


def test_a_half_written_pool_is_none(tar_folder, tmp_path):
    write_pool(collect([open_source(str(tar_folder))], 4), tmp_path, {})
    assert pq.read_table(tmp_path / "pairs.parquet").num_rows == 4
    assert json.loads((tmp_path / "about.json").read_text())["images"] == 4
    (tmp_path / "about.json").write_text('{"wanted": {}, "ima')
    assert read_facts(tmp_path) is None
