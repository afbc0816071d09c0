"""Large rows: a shuffled block is bounded in bytes, and resumed where it was."""

import itertools
import multiprocessing
import resource

import numpy as np
import pytest
import torch

from flip_hf.data import reading
from flip_hf.data.decode import RefusedSample
from flip_hf.data.positions import SourcePosition
from flip_hf.data.reading import Reader, row_bytes, take_rows
from flip_hf.data.refusals import Refusals
from flip_hf.data.samples import SourceReader
from flip_hf.data.sources import Source
from flip_hf.data.tar import TarShards
from tests.helpers.loading import make_train_loader, numbers, saved
from tests.helpers.pairs import write_tar

MIB = 2**20
SMALL = 6000  # bytes: a few of the samples


def test_bytes_are_counted_wherever_they_are():
    row = {"image": {"bytes": b"12345", "path": None}, "captions": ["ab", "c"], "n": 1.5, "bad": RefusedSample("x")}
    names = len("image" + "bytes" + "path" + "captions" + "n" + "bad")
    assert row_bytes(row) == names + 5 + 3 + 2 * reading._OTHER_BYTES


def test_rows_are_taken_up_to_a_number_or_to_their_bytes():
    rows = [{"": bytes(10)} for _ in range(9)]
    assert len(take_rows(iter(rows), 4, 1000)) == 4 and len(take_rows(iter(rows), 4, 20)) == 2
    assert len(take_rows(iter(rows), 4, 1)) == 1 and take_rows(iter([]), 4, 1) == []


def order(folder, count, states=None, **options) -> list[int]:
    return numbers(itertools.islice(make_train_loader(folder, states=states, batch_size=1, **options), count))


def test_a_block_below_the_bound_is_unchanged(tar_folder):
    assert order(tar_folder, 200, block_bytes=10**6) == order(tar_folder, 200, block_bytes=10**12)
    assert order(tar_folder, 200, block_bytes=SMALL) != order(tar_folder, 200, block_bytes=10**12)


@pytest.mark.parametrize("workers", [0, 1])
def test_blocks_that_bytes_end_are_resumed_anywhere(tar_folder, workers):
    whole = order(tar_folder, 200, block_bytes=SMALL)
    assert sorted(whole[:160]) == list(range(160))
    for used in range(1, 60, 3 if workers == 0 else 29):
        loader = make_train_loader(tar_folder, batch_size=1, block_bytes=SMALL, workers=workers)
        assert numbers(itertools.islice(loader, used)) == whole[:used]
        assert order(tar_folder, 40, saved([loader]), block_bytes=SMALL, workers=workers) == whole[used : used + 40]


@pytest.mark.parametrize("old", [True, False])
def test_a_block_that_was_begun_keeps_its_bound(tar_folder, old):
    """That of an older release was none; and a source more makes it smaller."""
    begun = 10**12 if old else SMALL
    loader = make_train_loader(tar_folder, batch_size=1, block=64, block_bytes=begun)
    seen = numbers(itertools.islice(loader, 3))
    states = saved([loader])
    if old:
        for position in states[0]["workers"][0]["sources"]:
            assert position[1].pop() == begun
    seen += order(tar_folder, 157, states, block=64, block_bytes=2 * SMALL)
    assert sorted(seen) == list(range(160))


def test_each_source_has_its_share(tar_folder, samples, tmp_path):
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "x.tar", samples[:8])
    loader = make_train_loader(tar_folder, tmp_path / "more", batch_size=1, block_bytes=SMALL)
    numbers(itertools.islice(loader, 20))
    assert {position[1][-1] for position in saved([loader])[0]["workers"][0]["sources"]} == {SMALL // 2}


def _peak(path, results):
    """In MiB, what a reader of the default shuffling takes that has used 90 of 100 samples of 4 MB."""
    transform = lambda image, rng, size: torch.zeros(3, size, size, dtype=torch.uint8)  # noqa: E731
    reader = SourceReader(
        Source(TarShards([path]), "jpg", "txt", path),
        transform,
        Reader(0, 1),
        SourcePosition([]),
        seed=0,
        shuffle_block=4096,
        refusals=Refusals(),
        block_bytes=40 * MIB,
    )
    reader.image_size = 8
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in itertools.islice(reader.samples(), 90):
        pass
    results.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


def test_a_block_of_photographs_does_not_fill_the_memory(tmp_path):
    image = np.random.default_rng(0).bytes(4 * MIB)
    write_tar(tmp_path / "photos.tar", [(f"{n:03d}", image, b"a red circle") for n in range(100)])
    results, answer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_peak, args=(str(tmp_path / "photos.tar"), answer))
    process.start()
    assert results.poll(60) and results.recv() < 100
    process.join()
