import itertools
import json

import numpy as np
import pytest
import torch

from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.loader import TrainLoader, make_loader
from flip_hf.data.reading import Reader
from flip_hf.data.refusals import BadDataError
from flip_hf.data.sources import Source, open_source
from flip_hf.data.stream import TrainStream
from flip_hf.data.transforms import EvalTransform, TrainTransform
from tests.data.conftest import write_tar

KEYS = list(range(160))


def tokenize(captions: list[str]) -> dict[str, torch.Tensor]:
    """The sample's number, which its caption begins with."""
    return {"input_ids": torch.tensor([[int(caption[:5])] for caption in captions])}


def make_train_loader(folder, *, workers=0, process=Reader(0, 1), block=16, states=None, batch_size=8) -> TrainLoader:  # noqa: B008
    stream = TrainStream(
        [open_source(str(folder))],
        TrainTransform(32),
        tokenize,
        batch_size=batch_size,
        process=process,
        seed=5,
        shuffle_block=block,
    )
    return TrainLoader(stream, num_workers=workers, pin_memory=False, states=states)


def numbers(batches) -> list[int]:
    return [n for batch in batches for n in batch["input_ids"].flatten().tolist()]


def test_batches_are_uint8_images_with_tokens(tar_folder):
    batch = next(iter(make_train_loader(tar_folder)))
    assert batch["pixel_values"].shape == (8, 3, 32, 32) and batch["pixel_values"].dtype == torch.uint8
    assert batch.keys() == {"pixel_values", "input_ids"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_has_every_sample_once_over_workers_and_processes(tar_folder, workers, processes):
    seen = []
    for process in range(processes):
        loader = make_train_loader(tar_folder, workers=workers, process=Reader(process, processes), batch_size=1)
        readers = processes * max(1, workers)
        mine = [len(range(p, 5, readers)) * 32 for p in range(readers)]
        first = process * max(1, workers)
        # Workers take turns; the longer part goes on alone while the others start their next epoch.
        by_position = [
            (batch["input_ids"].item(), dict(loader.state_dict()["positions"][(loader._next - 1) % max(1, workers)]))
            for batch in itertools.islice(loader, 2 * max(mine) * max(1, workers))
        ]
        seen += [number for number, position in by_position if position["epoch"] == 0]
        assert len(mine) > first
    assert sorted(seen) == KEYS


def test_order_changes_by_epoch_and_repeats_by_seed(tar_folder):
    first, again = (numbers(itertools.islice(make_train_loader(tar_folder), 40)) for _ in range(2))
    assert first == again
    assert sorted(first[:160]) == sorted(first[160:]) == KEYS and first[:160] != first[160:]
    assert first[:16] != sorted(first[:16])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 7, 19, 20, 21, 33])
def test_a_resumed_stream_continues_exactly(tar_folder, workers, cut):
    """In the middle of a block, at the end of an epoch and in the next one; pixels and all."""
    whole = list(itertools.islice(make_train_loader(tar_folder, workers=workers), cut + 15))
    loader = make_train_loader(tar_folder, workers=workers)
    for _ in itertools.islice(loader, cut):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    rest = list(itertools.islice(make_train_loader(tar_folder, workers=workers, states=[state]), 15))
    assert numbers(rest) == numbers(whole[cut:])
    for resumed, straight in zip(rest, whole[cut:], strict=True):
        assert torch.equal(resumed["pixel_values"], straight["pixel_values"])


def test_other_numbers_of_workers_start_the_next_epoch_and_say_so(tar_folder, caplog):
    loader = make_train_loader(tar_folder, workers=0)
    for _ in itertools.islice(loader, 3):
        pass
    resumed = make_train_loader(tar_folder, workers=2, state=loader.state_dict())
    assert "reading starts with epoch 2" in caplog.text
    assert all(position["epoch"] == 1 for position in resumed.state_dict()["positions"])


def test_damaged_samples_are_skipped_counted_and_named(samples, tmp_path, caplog):
    bad = {3: (samples[3][1][:200], b"cut off"), 9: (b"no image", b"text"), 11: (samples[11][1], b"  ")}
    rows = [(key, *bad.get(i, (image, caption))) for i, (key, image, caption) in enumerate(samples[:40])]
    write_tar(tmp_path / "shard.tar", rows)
    loader = make_train_loader(tmp_path / "shard.tar", block=1, batch_size=37)
    batch = next(iter(loader))
    assert sorted(numbers([batch])) == [i for i in range(40) if i not in bad]
    assert batch["refused"] == {"damaged image": 1, "not an image": 1, "empty caption": 1}
    assert "sample 00009" in caplog.text


def test_nothing_but_garbage_is_an_error_and_not_an_endless_loop(tmp_path):
    write_tar(tmp_path / "shard.tar", [(f"{i:05d}", b"no image", b"text") for i in range(8)])
    with pytest.raises(ValueError, match="no usable sample.*'not an image': 8"):
        next(iter(make_train_loader(tmp_path / "shard.tar")))


def test_the_loader_leaves_the_masks_generator_alone(tar_folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(iter(make_train_loader(tar_folder, workers=1)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_reads_every_labelled_image_once(image_folder, processes):
    source = open_source(str(image_folder))
    classes = tuple(caption for caption in sorted(source.target(row) for row in source.dataset))
    labels = []
    for process in range(processes):
        stream = EvalStream(source, EvalTransform(32), classes, batch_size=7, process=Reader(process, processes))
        labels += [label for batch in make_loader(stream, num_workers=2) for label in batch["labels"].tolist()]
    assert sorted(labels) == KEYS


def test_unknown_labels_are_refused(image_folder):
    source: Source = open_source(str(image_folder))
    stream = EvalStream(source, EvalTransform(32), ("x",), batch_size=7, process=Reader(0, 1))
    (batch,) = make_loader(stream, num_workers=0)
    assert batch["refused"] == {"unknown label": 160} and len(batch["labels"]) == 0


def test_the_crop_is_within_its_bounds():
    from flip_hf.data.transforms import random_crop_box

    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(500):
        left, top, right, bottom = random_crop_box(200, 150, (0.5, 1.0), (3 / 4, 4 / 3), rng)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 150
        areas.append((right - left) * (bottom - top) / 30_000)
        ratios.append((right - left) / (bottom - top))
    assert 0.49 < min(areas) < 0.55 and max(areas) > 0.9
    assert 0.74 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.35
    assert random_crop_box(400, 20, (0.9, 1.0), (1.0, 1.0), rng) == (190, 0, 210, 20)  # nothing fits: the centre
