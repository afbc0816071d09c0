"""Masks and sizes of images come with the batches, and follow the samples that a run has seen."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from flip_hf.data import stream
from flip_hf.data.reading import Reader
from flip_hf.data.stream import View
from flip_hf.modeling.masking_flip import cut_patches, draw_mask
from flip_hf.training.edges import draw_gumbel, edge_scores, keep_edges
from tests.helpers.loading import PATCH_SIZE, by_edges, half_masked, make_train_loader, numbers, saved

BATCH = 4


def whole(samples: int) -> View:
    return View(32)


def by_samples(samples: int) -> View:
    """The image's side says which step the batch was made for: 8 pixels more for every 16 samples."""
    return View(PATCH_SIZE * (1 + samples // 16))


def sides(batches) -> list[int]:
    return [int(batch["patches"].shape[1] ** 0.5) - 1 for batch in batches]


@pytest.mark.parametrize("view_at", [half_masked, by_edges])
def test_patches_are_those_of_the_whole_image(tar_folder, view_at):
    """With the mask and without it the same crops, and in every batch the patches that ids_keep names."""
    pairs = zip(
        make_train_loader(tar_folder, view_at=view_at), make_train_loader(tar_folder, view_at=whole), strict=False
    )
    for masked, everything in itertools.islice(pairs, 25):
        assert everything["patches"].shape == (8, 16, 192) and "ids_keep" not in everything
        rows = torch.arange(8)[:, None]
        assert torch.equal(masked["patches"], everything["patches"][rows, masked["ids_keep"]])


@pytest.mark.parametrize("view_at", [half_masked, by_edges, whole])
@pytest.mark.parametrize("size", [1, 8000, 2**20], ids=["one by one", "in threes", "at once"])
def test_patches_do_not_depend_on_how_many_images_are_cut_at_once(tar_folder, monkeypatch, view_at, size):
    batches = list(itertools.islice(make_train_loader(tar_folder, view_at=view_at), 5))
    monkeypatch.setattr(stream, "_CUT_BYTES", size)
    cuts = []

    def counted(images, **options):
        cuts.append(len(images))
        return cut_patches(images, patch_size=PATCH_SIZE, **options)

    loader = make_train_loader(tar_folder, view_at=view_at)
    loader._stream.plan = replace(loader._stream.plan, cut=counted)
    for batch, again in zip(batches, loader, strict=False):
        assert torch.equal(batch["patches"], again["patches"])
        assert ("ids_keep" in again) == (view_at is not whole)
    assert cuts[:8] == {1: [1] * 8, 8000: [3, 3, 2] * 2 + [3, 3], 2**20: [8] * 8}[size][: len(cuts)]


def test_patches_are_in_the_models_order(tar_folder):
    images = []

    def noise(value, rng, image_size):
        images.append(torch.from_numpy(rng.integers(0, 256, (3, 32, 32), np.uint8)))
        return images[-1]

    loader = make_train_loader(tar_folder)
    loader._stream.plan = replace(loader._stream.plan, transform=noise)
    batch = next(iter(loader))
    assert torch.equal(batch["patches"], cut_patches(torch.stack(images), PATCH_SIZE, batch["ids_keep"]))


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("processes", "num_micro"), [(1, 1), (1, 3), (2, 2)])
def test_a_batch_is_masked_as_of_its_own_step(tar_folder, workers, processes, num_micro):
    """Whatever was read ahead, and from a checkpoint on whose next batch is another worker's."""
    options = {"workers": workers, "num_micro": num_micro, "batch_size": BATCH, "view_at": by_samples}
    loader = make_train_loader(tar_folder, process=Reader(processes - 1, processes), **options)
    step = BATCH * num_micro * processes
    expected = [n // num_micro * step // 16 for n in range(7 * num_micro)]
    assert sides(itertools.islice(loader, 4 * num_micro)) == expected[: 4 * num_micro]
    loaders = [make_train_loader(tar_folder, process=Reader(p, processes), **options) for p in range(processes)]
    for other in loaders:
        list(itertools.islice(other, 4 * num_micro))
    states = saved(loaders)
    resumed = make_train_loader(tar_folder, process=Reader(processes - 1, processes), states=states, **options)
    resumed.begin_at(4 * step)
    assert sides(itertools.islice(resumed, 3 * num_micro)) == expected[4 * num_micro :]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_returns_to_a_checkpoint_masks_the_data_that_follow(tar_folder, workers):
    """The data resume from their position, and each sample comes once; the masks are those of the earlier step."""
    options = {"workers": workers, "batch_size": BATCH, "view_at": by_samples}
    loader = make_train_loader(tar_folder, **options)
    batches = iter(loader)
    before = list(itertools.islice(batches, 13))
    batches.close()
    loader.begin_at(32)
    after = list(itertools.islice(loader, 9))
    assert sides(before) == [n // 4 for n in range(13)] and sides(after) == [2 + n // 4 for n in range(9)]
    straight = make_train_loader(tar_folder, **options)
    assert numbers(before + after) == numbers(itertools.islice(straight, 22))


@pytest.mark.parametrize("view_at", [half_masked, by_edges])
def test_masks_follow_from_seed_reader_and_draws(tar_folder, view_at):
    def masks(**options):
        loader = make_train_loader(tar_folder, view_at=view_at, **options)
        return [batch["ids_keep"] for batch in itertools.islice(loader, 4)]

    first = masks()
    again = masks()
    other_seed = masks(seed=6)
    others = masks(process=Reader(1, 2))
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(first, masks(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    every = [tuple(row) for drawn in (first, other_seed, others) for batch in drawn for row in batch.tolist()]
    assert len(set(every)) > 90  # of 96; C(16, 8) = 12,870


def test_the_mask_is_drawn_by_the_views_strategy(tar_folder):
    def blocks(samples: int) -> View:
        return View(32, lambda size: draw_mask("block", size, (4, 4), 0.75, "cpu"))

    batch = next(iter(make_train_loader(tar_folder, view_at=blocks)))
    assert ((batch["ids_keep"] - batch["ids_keep"][:, :1]) == torch.tensor([0, 1, 4, 5])).all()
    assert half_masked(0).draw is not None


def scores_of(patches: torch.Tensor) -> torch.Tensor:
    """The scores (B, L) of images (B, L, 3 * P * P) of 32 pixels, put together again."""
    grid = patches.view(-1, 4, 4, 3, PATCH_SIZE, PATCH_SIZE)
    return edge_scores(grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 32, 32), PATCH_SIZE)


def test_masks_by_edges_look_at_the_picture_that_the_model_sees(tar_folder):
    loader = make_train_loader(tar_folder, view_at=by_edges)
    loader._stream.plan = replace(loader._stream.plan, whole=True)
    for batch in itertools.islice(loader, 4):
        scores = scores_of(batch["patches"])
        kept = scores.gather(1, batch["ids_keep"])
        assert batch["ids_keep"].shape == (8, 8) and kept.sum() > 1.5 * (scores.sum() - kept.sum())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_grey_and_transparent_pictures_are_masked_by_edges(mode, tmp_path):
    """A square in the middle, which every crop shows: at full strength its patches are kept."""
    picture = Image.new("L", (64, 64), 200)
    picture.paste(0, (24, 24, 40, 40))
    picture = picture.convert(mode)
    if "A" in mode:
        picture.putalpha(Image.new("L", (64, 64), 128))
    for number in range(8):
        picture.save(tmp_path / f"{number}.png")
    choose = partial(keep_edges, patch_size=PATCH_SIZE, kept=8, strength=4.0)
    view = View(32, partial(draw_gumbel, num_patches=16), choose)
    loader = make_train_loader(tmp_path, kind="image", view_at=lambda samples: view)
    loader._stream.plan = replace(loader._stream.plan, whole=True)
    batch = next(iter(loader))
    strongest = scores_of(batch["patches"]).argmax(1)
    assert batch["ids_keep"].shape == (8, 8) and (batch["ids_keep"] == strongest[:, None]).any(1).all()
