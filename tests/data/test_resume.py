"""Going on with another number of processes or workers: every epoch has every sample, and none twice."""

import itertools
import logging
from collections import Counter

import pytest

from flip_hf.data.positions import Piece, SourcePosition, deal_again, split_piece
from flip_hf.data.reading import Reader
from tests.helpers.loading import current_epochs, make_train_loader, numbers, samples_by_epoch, saved
from tests.helpers.pairs import write_tar

KEYS = list(range(160))


@pytest.fixture
def small_shards(samples, tmp_path):
    """20 shards of 8 samples: blocks of 16 reach over them."""
    for shard in range(20):
        write_tar(tmp_path / f"{shard:02d}.tar", samples[8 * shard : 8 * (shard + 1)])
    return tmp_path


def loaders_of(folder, geometry, states=None, **options):
    """One loader for each process of (processes, workers)."""
    processes, workers = geometry
    return [
        make_train_loader(
            folder, workers=workers, process=Reader(rank, processes), states=states, batch_size=1, **options
        )
        for rank in range(processes)
    ]


def run(folder, steps, **options):
    """Reads in one geometry after the other; returns epoch -> samples, and the furthest epoch that all have passed.

    Args:
        steps: (geometry, samples to read in each process) in turn; in the last, all epochs begun are read to their end.
    """
    seen: dict[int, Counter] = {}
    states = None
    furthest = 0
    for geometry, counts in steps:
        loaders = loaders_of(folder, geometry, states, **options)
        for loader, count in zip(loaders, counts, strict=True):
            for epoch, number in itertools.islice(samples_by_epoch(loader), count):
                seen.setdefault(epoch, Counter())[number] += 1
                furthest = max(furthest, epoch)
        states = saved(loaders)
    for loader in loaders_of(folder, steps[-1][0], states, **options):
        for epoch, number in samples_by_epoch(loader):
            seen.setdefault(epoch, Counter())[number] += 1
            if min(current_epochs(loader)) > furthest:
                break
    return seen, furthest


def assert_exact(seen, furthest):
    for epoch in range(furthest + 1):
        assert seen[epoch] == Counter(KEYS), epoch
    assert max(max(counts.values()) for counts in seen.values()) == 1


CHANGES = {
    "1x0 to 2x2": [((1, 0), [70]), ((2, 2), [20, 31])],
    "2x2 to 3x1": [((2, 2), [25, 25]), ((3, 1), [9, 4, 11])],
    "4 to 1": [((4, 0), [13, 13, 13, 13]), ((1, 0), [40])],
    "1 to 4, before the first sample": [((1, 0), [0]), ((4, 0), [3, 0, 0, 0])],
    "at an epoch's end": [((2, 0), [80, 80]), ((3, 0), [5, 5, 5])],
    "in the second epoch": [((1, 0), [230]), ((3, 0), [0, 10, 20])],
    "in different epochs": [((2, 0), [30, 250]), ((3, 0), [10, 10, 10])],
    "twice in a row": [((2, 0), [30, 41]), ((3, 0), [7, 0, 22]), ((2, 2), [15, 3])],
    "three times, nothing read in one": [((1, 0), [33]), ((4, 0), [0, 0, 0, 0]), ((3, 0), [1, 60, 0]), ((1, 2), [9])],
    "more readers than shards": [((2, 0), [50, 8]), ((23, 0), [1] * 23), ((3, 0), [2, 2, 2])],
}


@pytest.mark.parametrize("steps", CHANGES.values(), ids=CHANGES.keys())
def test_every_epoch_is_complete_for_any_reader(small_shards, steps):
    assert_exact(*run(small_shards, steps))


@pytest.mark.parametrize("steps", [CHANGES["2x2 to 3x1"], CHANGES["twice in a row"]])
def test_every_epoch_is_complete_where_readers_share_shards(tar_folder, steps):
    """Five shards: four readers take one or two, six take turns row by row."""
    assert_exact(*run(tar_folder, [*steps, ((3, 2), [4, 9, 1])]))


@pytest.mark.parametrize("steps", [CHANGES["1x0 to 2x2"], CHANGES["in different epochs"]])
def test_every_epoch_is_complete_where_blocks_are_bounded_in_bytes(small_shards, steps):
    assert_exact(*run(small_shards, steps, block_bytes=6000))


def test_the_rest_of_the_epoch_comes_before_the_next_one(small_shards):
    """One reader's rest is shared by all new ones: none runs ahead by a whole epoch."""
    (old,) = loaders_of(small_shards, (1, 0))
    for _ in itertools.islice(old, 40):
        pass
    for loader in loaders_of(small_shards, (4, 0), saved([old])):
        rest = [epoch for epoch, _ in itertools.islice(samples_by_epoch(loader), 24)]
        assert set(rest[:24]) == {0}  # 120 are left, in shards of 8: 24 or more for each of four


def test_the_change_is_reported_once_and_counts_are_kept(small_shards, caplog):
    old = loaders_of(small_shards, (2, 0))
    for loader in old:
        for _ in itertools.islice(loader, 9):
            pass
    with caplog.at_level(logging.WARNING):
        new = loaders_of(small_shards, (1, 2), saved(old))
    assert caplog.text.count("written by 2 readers in 2 process(es), this run has 2 in 1") == 1
    assert "No sample is lost or repeated" in caplog.text
    assert new[0].counts["drawn"] == {str(small_shards): 18}


def test_mixed_sources_change_hands_too(samples, tmp_path):
    """Each source has its own epochs; the smaller one is further."""
    for name, first, last in (("a", 0, 96), ("b", 96, 160)):
        (tmp_path / name).mkdir()
        for shard in range(first, last, 8):
            write_tar(tmp_path / name / f"{shard:03d}.tar", samples[shard : shard + 8])
    folders = [tmp_path / "a", tmp_path / "b"]
    seen: dict[tuple, Counter] = {}
    states = None
    for processes, count in ((2, 60), (3, 25), (1, 400)):
        loaders = [
            make_train_loader(*folders, process=Reader(rank, processes), states=states, batch_size=1, weights=[1, 2])
            for rank in range(processes)
        ]
        for loader in loaders:
            for batch in itertools.islice(loader, count):
                number = batch["input_ids"].item()
                source = int(number >= 96)
                seen.setdefault((source, current_epochs(loader, source)[0]), Counter())[number] += 1
        states = saved(loaders)
    for source, keys in ((0, range(96)), (1, range(96, 160))):
        complete = [epoch for s, epoch in seen if s == source][:-1]
        last = max(epoch for s, epoch in seen if s == source)
        assert last >= 1 and len(complete) == last
        for epoch in range(last):
            assert seen[source, epoch] == Counter(keys), (source, epoch)
        assert max(seen[source, last].values()) == 1


def test_a_source_more_or_less_leaves_the_others_where_they_were(small_shards, samples, tmp_path, caplog):
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "x.tar", [(f"{n:05d}", image, f"{n:05d} x".encode()) for n, (_, image, _) in
                                            enumerate(samples[:8], start=200)])  # fmt: skip
    old = make_train_loader(small_shards)
    before = numbers(itertools.islice(old, 5))
    new = make_train_loader(small_shards, tmp_path / "more", states=saved([old]), batch_size=1, weights=[3, 1])
    assert "more' was not among the checkpoint's sources" in caplog.text
    after = [n for n in numbers(itertools.islice(new, 100)) if n < 200]
    assert not set(before) & set(after) and len(after) == len(set(after)) > 50


def test_data_that_grew_begin_anew_with_a_warning(small_shards, samples, caplog):
    old = make_train_loader(small_shards)
    next(iter(old))
    write_tar(small_shards / "99.tar", samples[:1])
    new = make_train_loader(small_shards, states=saved([old]))
    assert "had 20 shards when the checkpoint was written and now has 21" in caplog.text
    next(iter(new))
    assert current_epochs(new) == [1]


@pytest.mark.parametrize(("option", "name"), [({"seed": 6}, "seed"), ({"block": 8}, "shuffle_block")])
def test_positions_of_another_order_are_refused(small_shards, option, name):
    with pytest.raises(ValueError, match=f"--{name}.*resume with that"):
        make_train_loader(small_shards, states=saved([make_train_loader(small_shards)]), **option)


def test_a_piece_is_dealt_by_shards_and_its_block_stays_whole():
    piece = Piece(index=1, count=2, epoch=3, shard=4, row=2, used=7, last=5, step=1, stop=12)
    begun, *rest = split_piece(piece, 3)
    assert (begun.shard, begun.row, begun.used, begun.stop) == (4, 2, 7, 6)
    assert sorted(n for part in rest for n in range(part.shard, part.stop, part.step)) == [*range(6, 12)]
    assert not any(part.used or part.row for part in rest) and len(rest) == 3


def test_a_large_run_keeps_its_state_small():
    """4096 readers become 4000: each piece is split a little, not 125 times."""
    old = [SourcePosition([Piece(i, 4096, 0, 3, 5, 9, 3, 1, 10)], 1) for i in range(4096)]
    new = deal_again(old, 4000, 40_960)
    assert sum(len(position.pieces) for position in new) < 8 * 4096
    loads = [sum(piece.num_shards for piece in position.pieces) for position in new]
    assert sum(loads) == 7 * 4096 and max(loads) - min(loads) <= 1
    assert all(position.next_epoch == 1 for position in new)
