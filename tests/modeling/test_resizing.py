"""Another image size, another patch size: the same picture must mean the same."""

import pytest
import torch

from flip_hf import FlipModel, FlipTextModel, FlipVisionModel
from flip_hf.modeling.resizing_flip import resize_patch_kernel
from tests.helpers.models import randomize, tiny_config


def tokens(kernel: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    return torch.einsum("dchw,bchw->bd", kernel, patches)


def resized(patches: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(patches, (side, side), mode="bicubic", antialias=True)


def test_a_larger_kernel_gives_resized_patches_the_same_tokens():
    kernel = torch.randn(8, 3, 8, 8)
    patches = torch.randn(20, 3, 8, 8)
    larger = resize_patch_kernel(kernel, 12)
    assert larger.shape == (8, 3, 12, 12) and larger.dtype == kernel.dtype
    torch.testing.assert_close(tokens(larger, resized(patches, 12)), tokens(kernel, patches), rtol=1e-4, atol=1e-4)


def test_the_papers_step_from_16_to_14_keeps_the_tokens_of_smooth_patches():
    kernel = torch.randn(8, 3, 16, 16)
    patches = resized(torch.randn(50, 3, 5, 5), 16)
    expected = tokens(kernel, patches)
    smaller = resize_patch_kernel(kernel, 14)
    error = (tokens(smaller, resized(patches, 14)) - expected).norm() / expected.norm()
    as_an_image = (tokens(resized(kernel, 14), resized(patches, 14)) - expected).norm() / expected.norm()
    assert error < 0.01 and as_an_image > 0.1
    flat = torch.ones(1, 3, 16, 16)
    torch.testing.assert_close(tokens(smaller, flat[..., :14, :14]), tokens(kernel, flat), rtol=0.02, atol=0.2)


def test_nothing_changes_where_the_size_stays():
    kernel = torch.randn(8, 3, 8, 8)
    assert torch.equal(resize_patch_kernel(kernel, 8), kernel)
    model = randomize(FlipModel(tiny_config()))
    model.get_position_embeddings().weight.mul_(1 + 1e-6)  # as the official table, which is not quite ours
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.resize_patch_embeddings(8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_class", [FlipModel, FlipVisionModel])
@pytest.mark.parametrize("positions", ["sincos2d", "learned"])
def test_a_model_for_other_patches_and_images_is_saved_and_loaded(model_class, positions, tmp_path):
    config = tiny_config(vision={"position_embedding_type": positions, "image_size": 64, "patch_size": 16})
    model = randomize(model_class(config if model_class is FlipModel else config.vision_config)).eval()
    tower = getattr(model, "vision_model", model)
    model.resize_patch_embeddings(14, image_size=84)
    assert (tower.config.patch_size, tower.config.image_size, tower.config.num_patches) == (14, 84, 36)
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 84, 84)
    features = tower(images).pooler_output
    assert torch.equal(getattr(again, "vision_model", again)(images).pooler_output, features)
    tower(images, mask_ratio=0.5).pooler_output.sum().backward()
    assert tower.embeddings.patch_embedding.weight.grad.shape == (32, 3, 14, 14)


def test_an_image_and_its_patches_enlarged_together_keep_their_features():
    model = randomize(FlipVisionModel(tiny_config().vision_config)).eval()
    coarse = torch.randn(2, 3, 4, 4)
    # Patch by patch, as the kernel is: a filter over the whole image would mix neighbours at the edges.
    small = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
    large = coarse.repeat_interleave(12, 2).repeat_interleave(12, 3)
    before = model(small).pooler_output
    model.resize_patch_embeddings(12, image_size=48)
    torch.testing.assert_close(model(large).pooler_output, before, rtol=1e-4, atol=1e-4)


def test_sizes_that_do_not_fit_are_refused():
    model = FlipModel(tiny_config())
    for arguments in ((7,), (0,), (8, 36), (64,)):
        with pytest.raises(ValueError, match="must be a multiple of patch_size"):
            model.resize_patch_embeddings(*arguments)
    with pytest.raises(NotImplementedError, match="no vision tower"):
        FlipTextModel(tiny_config().text_config).resize_patch_embeddings(16)
