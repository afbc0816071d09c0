import itertools

import numpy as np
import pytest
import torch

from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.loader import make_loader
from flip_hf.data.reading import Reader
from flip_hf.data.sources import Source, open_source
from flip_hf.data.targets import ClassIndex
from flip_hf.data.transforms import EvalTransform
from tests.helpers.loading import (
    by_edges,
    current_epochs,
    half_masked,
    make_train_loader,
    numbers,
    samples_by_epoch,
    saved,
)

KEYS = list(range(160))


def test_batches_are_uint8_patches_with_tokens(tar_folder):
    batch = next(iter(make_train_loader(tar_folder)))
    assert batch["patches"].shape == (8, 8, 3 * 8 * 8) and batch["patches"].dtype == torch.uint8
    assert batch["ids_keep"].shape == (8, 8) and batch.keys() == {"patches", "ids_keep", "input_ids"}


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (3, 2)])
def test_an_epoch_has_every_sample_once_over_workers_and_processes(tar_folder, processes, workers):
    """Five shards: more than the readers, not divisible by them, and fewer."""
    seen = []
    for process in range(processes):
        loader = make_train_loader(tar_folder, workers=workers, process=Reader(process, processes), batch_size=1)
        for epoch, number in samples_by_epoch(loader):
            seen += [number] if epoch == 0 else []
            if min(current_epochs(loader)) > 0:  # workers take turns; some are in their next epoch before others
                break
    assert sorted(seen) == KEYS


def test_order_changes_by_epoch_and_repeats_by_seed(tar_folder):
    first, again = (numbers(itertools.islice(make_train_loader(tar_folder), 40)) for _ in range(2))
    assert first == again
    assert sorted(first[:160]) == sorted(first[160:]) == KEYS and first[:160] != first[160:]
    assert first[:16] != sorted(first[:16])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("view_at", "cut"), [*((half_masked, cut) for cut in (1, 7, 19, 20, 21, 33)), (by_edges, 7), (by_edges, 21)]
)
def test_a_resumed_stream_continues_exactly(tar_folder, workers, view_at, cut):
    """In the middle of a block, at the end of an epoch and in the next one; pixels and all."""
    options = {"workers": workers, "view_at": view_at}
    whole = list(itertools.islice(make_train_loader(tar_folder, **options), cut + 15))
    loader = make_train_loader(tar_folder, **options)
    for _ in itertools.islice(loader, cut):
        pass
    resumed = make_train_loader(tar_folder, states=saved([loader]), **options)
    resumed.begin_at(8 * cut)
    rest = list(itertools.islice(resumed, 15))
    assert numbers(rest) == numbers(whole[cut:])
    for resumed, straight in zip(rest, whole[cut:], strict=True):
        assert all(torch.equal(resumed[name], straight[name]) for name in ("patches", "ids_keep"))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_leaves_torchs_generator_alone(tar_folder, workers):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(iter(make_train_loader(tar_folder, workers=workers)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_reads_every_labelled_image_once(image_folder, processes):
    source = open_source(str(image_folder))
    classes = tuple(caption for caption in sorted(source.target(row) for row in source.rows()))
    labels = []
    for process in range(processes):
        reader = Reader(process, processes)
        stream = EvalStream(source, EvalTransform(32), ClassIndex(classes), batch_size=7, process=reader)
        for batch in make_loader(stream, num_workers=2):
            assert batch["images"].shape == (len(batch["targets"]), 3, 32, 32)
            labels += zip(batch["places"], batch["targets"], strict=True)
    assert [label for _, label in sorted(labels)] == KEYS  # places give back the data set's own order


def test_unknown_labels_are_refused(image_folder):
    source: Source = open_source(str(image_folder))
    stream = EvalStream(source, EvalTransform(32), ClassIndex(("x",)), batch_size=7, process=Reader(0, 1))
    (batch,) = make_loader(stream, num_workers=0)
    assert batch["refused"] == {"unknown label": 160} and batch["targets"] == [] and len(batch["images"]) == 0


def test_the_crop_is_within_its_bounds():
    from flip_hf.data.transforms import random_crop_box

    rng = np.random.default_rng(0)
    areas = []
    ratios = []
    for _ in range(500):
        left, top, right, bottom = random_crop_box(200, 150, (0.5, 1.0), (3 / 4, 4 / 3), rng)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 150
        areas.append((right - left) * (bottom - top) / 30_000)
        ratios.append((right - left) / (bottom - top))
    assert 0.49 < min(areas) < 0.55 and max(areas) > 0.9
    assert 0.74 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.35
    assert random_crop_box(400, 20, (0.9, 1.0), (1.0, 1.0), rng) == (190, 0, 210, 20)  # nothing fits: the centre
