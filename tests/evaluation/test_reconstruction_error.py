"""The errors of a decoder and of its baselines: against plain loops, and whatever the batches."""

import io
import itertools
import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image

from flip_hf import FlipForPreTraining, FlipPreTrainingConfig
from flip_hf.data.eval_stream import EvalStream
from flip_hf.data.reading import Reader
from flip_hf.data.sources import open_source
from flip_hf.data.targets import nothing
from flip_hf.data.transforms import EvalTransform
from flip_hf.evaluation.reconstruction_error import (
    draw_masks,
    measure_reconstruction,
    nearest_visible,
    reconstruction_errors,
)
from flip_hf.modeling.masking_flip import MASK_STRATEGIES, cut_patches, draw_mask
from tests.helpers.models import DECODER, IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE, randomize, tiny_config

SIDE = IMAGE_SIZE // PATCH_SIZE


@pytest.fixture
def pretraining() -> FlipForPreTraining:
    config = FlipPreTrainingConfig(
        flip_config=tiny_config(vision={"attention_dropout": 0.5}),  # which a measurement must not have
        decoder_config=DECODER,
    )
    return randomize(FlipForPreTraining(config))


def slow_nearest(visible: list[int], patch: int, side: int) -> int:
    best = -1
    best_distance = float("inf")
    for candidate in sorted(visible):
        distance = np.hypot(candidate // side - patch // side, candidate % side - patch % side)
        if distance < best_distance:  # not of an equal one: the first in raster order
            best = candidate
            best_distance = distance
    return best


def on_own_scale(patch: np.ndarray, norm_pixel_target: bool) -> np.ndarray:
    return (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6) if norm_pixel_target else patch


@pytest.mark.parametrize("side", [4, 7])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.93])
def test_the_nearest_patch_is_a_loops(side, ratio):
    ids_keep = draw_mask("random", 20, (side, side), ratio, "cpu")
    shuffled = ids_keep[:, torch.randperm(ids_keep.shape[1])]  # the order of a mask means nothing
    expected = [[slow_nearest(row, patch, side) for patch in range(side**2)] for row in ids_keep.tolist()]
    assert nearest_visible(shuffled, side).tolist() == expected


@pytest.mark.parametrize("norm_pixel_target", [True, False])
def test_errors_are_those_of_loops_and_of_the_loss(pretraining, images, norm_pixel_target):
    pretraining.config.norm_pixel_target = norm_pixel_target
    pretraining.eval()
    images = images * torch.rand(3, 3, 1, 1) + torch.randn(3, 3, 1, 1)  # channels of different mean
    ids_keep = draw_mask("random", 3, (SIDE, SIDE), 0.75, "cpu")
    patches = cut_patches(images, PATCH_SIZE)
    errors = reconstruction_errors(pretraining, patches, ids_keep)
    found = pretraining(pixel_values=images, ids_keep=ids_keep, objective="reconstruction")
    loss = pretraining.reconstruction_loss(found.reconstruction, patches, ids_keep, per_image=True)
    assert torch.allclose(errors["model"], loss, rtol=1e-5) and loss.requires_grad
    assert errors["model"].mean().item() == pytest.approx(found.loss.item(), rel=1e-5)
    assert all(e.shape == (3,) and e.dtype == torch.float32 and not e.requires_grad for e in errors.values())
    for image in range(3):
        visible = ids_keep[image].tolist()
        sums = {"patch_mean": 0.0, "nearest_patch": 0.0}
        dropped = 0
        for patch in set(range(NUM_PATCHES)) - set(visible):
            own = on_own_scale(patches[image, patch].double().numpy(), norm_pixel_target)
            nearest = patches[image, slow_nearest(visible, patch, SIDE)].double().numpy()
            channels = own.reshape(3, -1)
            sums["patch_mean"] += ((channels - channels.mean(axis=1, keepdims=True)) ** 2).mean()
            sums["nearest_patch"] += ((own - on_own_scale(nearest, norm_pixel_target)) ** 2).mean()
            dropped += 1
        for name, total in sums.items():
            assert errors[name][image].item() == pytest.approx(total / dropped, rel=1e-4), name


def test_patches_that_are_not_all_are_refused(pretraining, images):
    patches = cut_patches(images, PATCH_SIZE)
    everything = torch.arange(NUM_PATCHES).expand(3, -1)
    with pytest.raises(ValueError, match="all 16 patches are visible"):
        reconstruction_errors(pretraining, patches, everything)
    with pytest.raises(ValueError, match="Expected all 16 patches of each image, got 4"):
        reconstruction_errors(pretraining, patches[:, :4], everything[:, :2])


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_a_mask_follows_from_its_place_and_the_seed(pretraining, strategy):
    pretraining.flip.vision_model.config.mask_strategy = strategy
    places = [(shard, row) for shard in range(3) for row in range(20)]
    torch.manual_seed(5)
    masks = draw_masks(pretraining, places, 0.75, seed=1)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))  # nothing was taken from the training's own generator
    assert masks.shape == (60, NUM_PATCHES // 4)
    assert torch.equal(draw_masks(pretraining, places[::-1], 0.75, seed=1).flip(0), masks)
    assert not torch.equal(draw_masks(pretraining, places, 0.75, seed=2), masks)
    different = len({tuple(mask) for mask in masks.tolist()})
    assert 3 < different <= {"grid": 4, "block": 9}.get(strategy, 60)  # one of each 2 x 2; a block of 2 x 2


# -- over a data set ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> str:
    """Three parquet files of 9 images each, one of which is none; nothing is said about the images."""
    rng = np.random.default_rng(0)
    for shard in range(3):
        images = []
        for _ in range(9):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        images[4] = {"bytes": b"no image", "path": None} if shard == 1 else images[4]
        Dataset.from_dict({"image": images}).to_parquet(str(tmp_path / f"{shard}.parquet"))
    return str(tmp_path)


def pixel_patches(images: torch.Tensor) -> torch.Tensor:
    return cut_patches(images.float() / 128 - 1, PATCH_SIZE)


def test_batches_and_processes_do_not_matter(pretraining, data, caplog):
    def measure(batch_size: int, *processes: Reader, **options) -> dict[str, float]:
        source = open_source(data, kind="image")
        streams = [
            EvalStream(source, EvalTransform(IMAGE_SIZE), nothing, batch_size=batch_size, process=process)
            for process in processes
        ]
        batches = itertools.chain(*streams)
        return measure_reconstruction(
            pretraining, batches, Accelerator(cpu=True), 0.75, to_patches=pixel_patches, **options
        )

    pretraining.train()
    with caplog.at_level(logging.WARNING):
        found = measure(26, Reader(0, 1))
    assert pretraining.training and found["images"] == 26
    assert "skipped images: {'not an image': 1}" in caplog.text
    assert found["patch_mean_error"] == pytest.approx(1, abs=0.1)  # noise
    assert found["nearest_patch_error"] == pytest.approx(2, abs=0.1)
    assert measure(4, Reader(0, 1)) == pytest.approx(found, rel=1e-5)
    assert measure(3, Reader(1, 2), Reader(0, 2)) == pytest.approx(found, rel=1e-5)  # what two processes read
    assert measure(26, Reader(0, 1), seed=1)["reconstruction_error"] != pytest.approx(
        found["reconstruction_error"], rel=1e-4
    )


def test_without_an_image_there_is_no_error(pretraining):
    found = measure_reconstruction(pretraining, [], Accelerator(cpu=True), 0.75)
    assert found.pop("images") == 0 and all(np.isnan(value) for value in found.values())
