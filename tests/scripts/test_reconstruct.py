"""scripts/reconstruct.py as a person runs it, and what it draws."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flip_hf import FlipForPreTraining, FlipPreTrainingConfig
from flip_hf.commands.reconstruct import main
from flip_hf.data.sources import open_source
from flip_hf.evaluation.reconstruction import join_patches, reconstruct
from flip_hf.evaluation.reconstruction_error import draw_masks
from flip_hf.evaluation.spread import batches_at, spread_places
from flip_hf.modeling.masking_flip import cut_patches
from tests.helpers.models import PATCH_SIZE, tiny_config

SCRIPT = Path(__file__).parents[2] / "scripts" / "reconstruct.py"
DECODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def pretraining() -> FlipForPreTraining:
    return FlipForPreTraining(FlipPreTrainingConfig(flip_config=tiny_config(), decoder_config=DECODER)).eval()


@pytest.fixture
def folder(pretraining, processor, tmp_path) -> Path:
    pretraining.save_pretrained(tmp_path / "pretraining")
    processor.image_processor.save_pretrained(tmp_path / "pretraining")
    return tmp_path / "pretraining"


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def run(*arguments) -> None:
    main([str(word) for word in arguments])  # in this process: each start of another takes seconds


def test_patches_are_joined_as_they_were_cut(images):
    assert torch.equal(join_patches(cut_patches(images, PATCH_SIZE), PATCH_SIZE), images)


@pytest.mark.parametrize("norm_pixel_target", [True, False])
def test_visible_patches_stay_and_dropped_ones_get_their_own_scale(pretraining, images, norm_pixel_target):
    pretraining.config.norm_pixel_target = norm_pixel_target
    ids_keep = draw_masks(pretraining, [(0, 0), (0, 1), (0, 2)], 0.75, seed=0)
    visible, pasted = reconstruct(pretraining, images, ids_keep)
    assert visible.shape == (3, 1, 32, 32) and visible.float().mean() == 0.25
    assert torch.equal(visible[0, 0, ::PATCH_SIZE, ::PATCH_SIZE].flatten().nonzero().flatten(), ids_keep[0])
    seen = visible.expand_as(images)
    for pixels in pasted.values():
        assert torch.equal(pixels[seen], images[seen]) and not torch.isclose(pixels[~seen], images[~seen]).all()
    # The baseline's area is plain, and has the patch's own colour.
    means = cut_patches(images, PATCH_SIZE).unflatten(2, (3, -1)).mean(dim=3, keepdim=True)  # (B, L, 3, 1)
    expected = join_patches(means.expand(-1, -1, -1, PATCH_SIZE**2).flatten(2), PATCH_SIZE)
    assert torch.allclose(pasted["patch_mean"][~seen], expected[~seen], atol=1e-5)
    # A decoder that always predicts zero: of normalised pixels, that is the patch's mean.
    torch.nn.init.zeros_(pretraining.decoder.pixel_projection.weight)
    _, pasted = reconstruct(pretraining, images, ids_keep)
    means = cut_patches(images, PATCH_SIZE).mean(dim=-1, keepdim=True).expand(-1, -1, 3 * PATCH_SIZE**2)
    expected = join_patches(means, PATCH_SIZE) if norm_pixel_target else torch.zeros_like(images)
    assert torch.allclose(pasted["model"][~seen], expected[~seen], atol=1e-6)


def test_a_picture_is_drawn(folder, picture, tmp_path, monkeypatch, capsys):
    run(folder, picture, picture, "--output", tmp_path / "out.png")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out.png'}: 2 images at mask ratios [0.5, 0.75, 0.9]")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 7 * 100 and drawn.height > 2 * 100
        assert len(set(drawn.convert("L").tobytes())) > 50
    first = (tmp_path / "out.png").read_bytes()
    run(folder, picture, picture, "--output", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == first  # the same masks


def test_a_data_set_is_measured_and_drawn(folder, tmp_path, monkeypatch, capsys):
    """Of images alone; the baselines take two columns more a ratio."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    options = [folder, "--data", tmp_path / "images", "--split", "train", "--mask_ratios"]
    run(*options, "0.5", "0.75", "--output", tmp_path / "plain.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"{tmp_path / 'plain.png'}: images from all over {tmp_path / 'images'}")
    rows = [line.strip("| ").split(" | ") for line in lines if "%" in line]
    assert [(row[0], row[-1]) for row in rows] == [("50%", "3"), ("75%", "3")]
    for row in rows:
        model, mean, nearest, ratio = map(float, row[1:5])
        assert ratio == pytest.approx(model / min(mean, nearest), abs=0.006)
        assert 0.9 < mean < 1.1 and 1.7 < nearest < 2.3  # of noise: its variance, and twice that
    run(*options, "0.75", "--output", tmp_path / "wide.png", "--baselines", "--samples", "2")
    assert "| 2 |" in capsys.readouterr().out
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "wide.png") as wide:
        assert plain.width == wide.width  # 1 + 2 * 2 and 1 + 4 columns
        assert plain.height > 3 * 100 and wide.height * 3 == pytest.approx(plain.height * 2, rel=0.1)  # those measured


def test_images_are_from_all_over_a_sorted_folder(tmp_path):
    for number in range(60):
        folder = tmp_path / "images" / f"{number // 20}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:02d}.png")
    (tmp_path / "images" / "0" / "05.png").write_text("damaged")
    source = open_source(str(tmp_path / "images"), kind="image")
    places = spread_places(source, 12, seed=0)
    assert len(set(places)) == 12 and places == sorted(places) == spread_places(source, 12, seed=0)
    assert places != spread_places(source, 12, seed=1)

    def red(image):
        return torch.tensor(np.asarray(image)[0, 0, 0])

    def numbers(places):
        batches = list(batches_at(source, places, red, 5))
        assert all(len(batch["images"]) == len(batch["places"]) <= 5 for batch in batches)
        return [int(image) for batch in batches for image in batch["images"]]

    classes = Counter(number // 20 for seed in range(20) for number in numbers(spread_places(source, 12, seed)))
    assert min(classes.values()) > 50 and sum(classes.values()) <= 240
    every = spread_places(source, 100, seed=0)
    assert sorted(numbers(every)) == sorted({*range(60)} - {5})
    assert max(numbers(spread_places(source, 3, seed=0, max_rows=10))) < 60


def test_inputs_that_cannot_be_drawn_are_named(folder, saved, picture, tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("no image")
    cases = [
        ([folder, tmp_path / "text.jpg"], "text.jpg is not an image"),
        ([folder, tmp_path / "none.jpg"], "none.jpg cannot be read: No such file"),
        ([saved, picture], "type 'flip', which has no decoder"),
        ([folder, picture, "--mask_ratios", "0"], "all 16 patches are visible"),
        ([folder, picture, "--mask_ratios", "0.99"], "keeps none of the 16 patches"),
        ([folder, "--data", tmp_path / "nowhere"], "no file or folder"),
        ([folder, "--data", "shapes", "--image_column", "photo"], "no image column 'photo'"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as end:
            run(*arguments, "--output", tmp_path / "out.png")
        assert str(end.value).startswith("error: ") and message in str(end.value)
    assert not (tmp_path / "out.png").exists()
