"""Patches that were cut out before in place of images: the same bits, and errors that say what does not fit."""

import pytest
import torch

from flip_hf import FlipForImageClassification, FlipModel, FlipVisionModelWithProjection
from flip_hf.modeling.masking_flip import cut_patches
from tests.helpers.conformance import ARCHITECTURES, IMAGE_MODELS, assert_same, build, make_inputs, training_loss
from tests.helpers.models import NUM_PATCHES, PATCH_SIZE

IDS_KEEP = torch.tensor([[1, 5, 6], [0, 2, 15], [7, 8, 9]])


def as_patches(inputs: dict, ids_keep: torch.Tensor | None) -> dict:
    """The same inputs, their visible patches cut out."""
    patches = cut_patches(inputs["pixel_values"], PATCH_SIZE, ids_keep)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return {**rest, "patches": patches} | ({"ids_keep": ids_keep} if ids_keep is not None else {})


@pytest.mark.parametrize("ids_keep", [IDS_KEEP, None], ids=["masked", "whole"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model_class", [FlipModel, *IMAGE_MODELS])
def test_patches_give_the_bits_of_their_images(model_class, architecture, ids_keep):
    model = build(model_class, architecture).train()
    inputs = make_inputs(model_class)
    mask = {"ids_keep": ids_keep} if ids_keep is not None else {"mask_ratio": 0}
    gradients = []
    for given in ({**inputs, **mask}, as_patches(inputs, ids_keep)):
        model.zero_grad()
        training_loss(model, given).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(model(**inputs, **mask), model(**as_patches(inputs, ids_keep)))
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_all_patches_of_a_smaller_square_image_take_interpolated_positions(model, images):
    small = torch.nn.functional.interpolate(images, (24, 24))
    expected = model.get_image_features(small, interpolate_pos_encoding=True)
    outputs = model.get_image_features(patches=cut_patches(small, PATCH_SIZE), interpolate_pos_encoding=True)
    assert torch.equal(outputs.pooler_output, expected.pooler_output) and outputs.ids_keep is None
    whole = model.get_image_features(patches=cut_patches(images, PATCH_SIZE), interpolate_pos_encoding=True)
    assert torch.equal(whole.pooler_output, model.get_image_features(images).pooler_output)


@pytest.mark.parametrize("size", [(24, 24), (24, 40)])
def test_some_patches_of_another_size_take_the_positions_of_its_grid(size, model, images):
    other = torch.nn.functional.interpolate(images, size)
    grid = (size[0] // PATCH_SIZE, size[1] // PATCH_SIZE)
    for mask in ({"ids_keep": IDS_KEEP % 9}, {}):
        expected = model.get_image_features(other, interpolate_pos_encoding=True, **mask)
        outputs = model.get_image_features(
            patches=cut_patches(other, PATCH_SIZE, mask.get("ids_keep")), grid=grid, **mask
        )
        assert torch.equal(outputs.pooler_output, expected.pooler_output)
    elsewhere = model.get_image_features(
        patches=cut_patches(other, PATCH_SIZE, IDS_KEEP % 9),
        ids_keep=IDS_KEEP % 9,
        grid=grid[::-1] if size[1] > 24 else (4, 4),
    )
    masked = model.get_image_features(other, interpolate_pos_encoding=True, ids_keep=IDS_KEEP % 9)
    assert not torch.allclose(elsewhere.pooler_output, masked.pooler_output, atol=1e-4)


def test_learned_positions_of_a_grid_are_those_of_the_resized_model(images):
    model = build(FlipModel, "clip").eval()
    small = cut_patches(torch.nn.functional.interpolate(images, (24, 24)), PATCH_SIZE, IDS_KEEP % 9)
    ours = model.get_image_features(patches=small, ids_keep=IDS_KEEP % 9, grid=(3, 3)).pooler_output
    model.resize_position_embeddings(1 + 9)
    assert torch.equal(ours, model.get_image_features(patches=small, ids_keep=IDS_KEEP % 9).pooler_output)


PATCHES = torch.zeros(3, 3, 3 * PATCH_SIZE**2)
BAD = {
    "neither": ({}, "You have to specify pixel_values or patches"),
    "both": ({"patches": PATCHES, "pixel_values": torch.zeros(3, 3, 32, 32)}, "pixel_values or patches, not both"),
    "a ratio": ({"patches": PATCHES, "ids_keep": IDS_KEEP, "mask_ratio": 0.5}, "patches or mask_ratio, not both"),
    "of another length": ({"patches": PATCHES[..., 1:], "ids_keep": IDS_KEEP}, r"\(batch, K, 192\).*got \(3, 3, 191\)"),
    "not named": ({"patches": PATCHES}, "Got 3 of an image's 16 patches: pass ids_keep"),
    "named too few": ({"patches": PATCHES, "ids_keep": IDS_KEEP[:, :2]}, r"each of the 3 patches.*\(3, 2\)"),
    "of fewer images": ({"patches": PATCHES, "ids_keep": IDS_KEEP[:2]}, r"integer tensor of shape \(3, K\)"),
    "no square": ({"patches": PATCHES, "interpolate_pos_encoding": True}, "3 patches do not form a square"),
    "of another size": (
        {"patches": PATCHES, "ids_keep": IDS_KEEP, "interpolate_pos_encoding": True},
        "own size.*interpolate_pos_encoding=True",
    ),
    "too few for the grid": ({"patches": PATCHES, "grid": (2, 2)}, "Got 3 of an image's 4 patches: pass ids_keep"),
    "too many for the grid": ({"patches": PATCHES, "ids_keep": IDS_KEEP, "grid": (1, 2)}, "1 <= K <= 2"),
    "a grid of images": ({"pixel_values": torch.zeros(3, 3, 32, 32), "grid": (4, 4)}, "Pass grid with patches alone"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD.values(), ids=BAD.keys())
def test_arguments_that_do_not_fit_are_refused(inputs, message, model):
    with pytest.raises(ValueError, match=message):
        model.vision_model(**inputs)


def test_every_model_refuses_missing_inputs(model, texts):
    with pytest.raises(ValueError, match="needs input_ids and pixel_values"):
        model(**texts)
    for model_class in (FlipForImageClassification, FlipVisionModelWithProjection):
        with pytest.raises(ValueError, match="pixel_values or patches"):
            build(model_class)()


def test_patches_compile_and_export_with_the_mask_as_an_input():
    model = build(FlipVisionModelWithProjection)
    inputs = as_patches(make_inputs(FlipVisionModelWithProjection), IDS_KEEP)
    expected = model(**inputs)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)[0], expected[0])
    batch = torch.export.Dim("images")
    kept = torch.export.Dim("kept", max=NUM_PATCHES)
    shapes = {"patches": {0: batch, 1: kept}, "ids_keep": {0: batch, 1: kept}}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for case in (inputs, {name: value[:2, :2] for name, value in inputs.items()}):
        assert torch.allclose(program(**case)[0], model(**case)[0], atol=1e-6)


def test_images_smaller_than_a_patch_are_named(model):
    with pytest.raises(ValueError, match="Images of 8 x 7 pixels are smaller than a patch of 8 x 8"):
        cut_patches(torch.zeros(1, 3, 8, 7), 8)
    for mask_ratio in (0.0, 0.5):
        with pytest.raises(ValueError, match="smaller than a patch"):
            model.get_image_features(torch.zeros(1, 3, 4, 4), interpolate_pos_encoding=True, mask_ratio=mask_ratio)
