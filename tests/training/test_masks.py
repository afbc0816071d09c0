"""The trainer's preparation of a batch for the model."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flip_hf import FlipImageProcessorPil, FlipModel
from flip_hf.data.stream import View
from flip_hf.modeling.masking_flip import MASK_STRATEGIES, cut_patches, draw_mask
from flip_hf.training.arguments import ModelArguments
from flip_hf.training.build import build_trainer
from flip_hf.training.edges import keep_edges
from flip_hf.training.masks import check_masks
from flip_hf.training.patches import Views, resized_side
from flip_hf.training.phases import Curve, Phase
from flip_hf.training.recipes import parse_arguments
from flip_hf.training.resizing import resized_image_processor
from tests.helpers.models import randomize, tiny_config
from tests.helpers.pretraining import SHORT, TINY, pretrain
from tests.helpers.programs import ROOT
from tests.helpers.trainers import make_trainer

MASKED = Phase("masked", 0, 1000, (0.75, 0.5), Curve(0, 1000, 1e-3, 0), text_mask_ratio=0.5)
UNMASKED = Phase("unmasked", 1000, 1100, (0.0,), Curve(1000, 1100, 1e-3, 0))


PHASES = [MASKED, UNMASKED]


@pytest.fixture
def batch(images, texts) -> dict[str, torch.Tensor]:
    return {"pixel_values": images, **texts}


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_the_phase_gives_the_mask_ratio_and_the_option_the_strategy(strategy, config):
    views = Views(strategy, config.vision_config, PHASES)
    torch.manual_seed(1)
    ids_keep = views(499).draw(3)
    torch.manual_seed(1)
    assert torch.equal(ids_keep, draw_mask(strategy, 3, (4, 4), 0.75, "cpu"))
    assert views(500).draw(3).shape == (3, 8) and views(999).image_size == 32
    # Beyond the end too: a worker reads ahead.
    assert views(1000) == views(1100) == views(5000) == View(32)


def test_random_numbers_for_texts_are_drawn_in_the_phase_that_masks_them(config):
    views = Views("random", config.vision_config, PHASES, context=16)
    assert views(0).text_noise == views(999).text_noise == 16 and views(1000) == View(32)
    assert Views("resize", config.vision_config, PHASES, context=16)(0) == View(16, text_noise=16, text_kept=8)
    whole_images = [replace(MASKED, mask_ratios=(0.0,))]
    assert Views("random", config.vision_config, whole_images, context=16)(0) == View(32, text_noise=16, text_kept=8)
    whole_texts = [replace(MASKED, text_mask_ratio=0.0)]
    assert Views("random", config.vision_config, whole_texts, context=16)(0).text_noise == 0


def test_patches_with_edges_are_chosen_with_the_strength_of_the_step(config):
    phase = replace(MASKED, edge_strengths=(2.0, 0.0))
    views = Views("edges", config.vision_config, [phase, UNMASKED])
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    images[:, :, :16] = 128
    for samples, kept, strength in ((0, 4, 2.0), (250, 4, 1.5), (750, 8, 0.5), (999, 8, 0.002)):
        view = views(samples)
        noise = view.draw(3)
        expected = keep_edges(images, noise, patch_size=8, kept=kept, strength=strength)
        assert noise.shape == (3, 16) and torch.equal(view.ids_keep(images, noise), expected)
    assert views(1000) == views(5000) == View(32)


def test_the_phase_gives_the_size_of_the_images(config):
    """The model's own is 32 pixels, its patches of 8."""
    small = replace(MASKED, image_size=24)
    phases = [small, replace(UNMASKED, image_size=16)]
    views = Views("grid", config.vision_config, phases)
    torch.manual_seed(1)
    ids_keep = views(0).draw(3)
    torch.manual_seed(1)
    assert torch.equal(ids_keep, draw_mask("grid", 3, (3, 3), 0.75, "cpu"))
    assert views(0).image_size == 24 and views(1000) == View(16)
    assert Views("resize", config.vision_config, phases)(0) == View(8)  # 2 of 9 patches are kept: nearly 1 x 1


@pytest.mark.parametrize(
    ("num_patches", "ratio", "side"), [(196, 0.5, 10), (196, 0.75, 7), (256, 0.5, 11), (16, 0.9, 1)]
)
def test_resizing_leaves_about_as_many_patches_as_masking(num_patches, ratio, side):
    assert resized_side(num_patches, ratio) == side  # (196, 0.75): 112 pixels, CLIPA's and RECLIP's


def test_a_small_image_is_seen_as_the_whole_one(batch):
    """Of flat quarters, all is left: the same pixels at interpolated positions."""
    model = randomize(FlipModel(tiny_config(vision={"image_size": 64}))).eval()
    view = Views("resize", model.config.vision_config, PHASES)(0)
    assert view == View(32)
    quarters = torch.randn(3, 3, 2, 2)
    small, large = (quarters.repeat_interleave(n, 2).repeat_interleave(n, 3) for n in (16, 32))
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    seen = model(patches=cut_patches(small, 8), interpolate_pos_encoding=True, **texts)
    assert seen.ids_keep is None and seen.vision_model_output.last_hidden_state.shape[1] == 1 + 16
    whole = model(pixel_values=large, **texts)
    others = model(pixel_values=large.flip(0), **texts)  # the first and the last exchanged
    similarity = (seen.image_embeds * whole.image_embeds).sum(1)
    assert (similarity > (seen.image_embeds * others.image_embeds).sum(1))[[0, 2]].all() and similarity.min() > 0.9


@pytest.mark.parametrize("strategy", ["random", "edges", "resize"])
def test_nothing_is_left_for_the_model_to_draw(strategy, tar_folder, tmp_path):
    """Gradient caching encodes a batch twice: what the model drew itself would differ."""
    options = [*TINY, *SHORT, "--num_workers", "0", "--mask_strategy", strategy, "--mask_ratio", "0.75"]
    argv = ["--train_data", str(tar_folder), "--output_dir", str(tmp_path), *options]
    trainer = build_trainer(parse_arguments(argv, ROOT / "flip_hf" / "recipes", "shapes"))
    for samples, phase in zip((0, trainer.phases[0].end), trainer.phases, strict=True):
        trainer.loader.begin_at(samples)
        batch = trainer.prepare(next(iter(trainer.loader)), phase)
        vision = trainer.flip.config.vision_config
        resized = resized_side(vision.num_patches, 0.75) ** 2
        kept = resized if strategy == "resize" else vision.num_patches // 4
        assert batch["patches"].shape[1] == (kept if phase.mask_ratio else vision.num_patches)
        assert ("ids_keep" in batch) == (strategy != "resize" and phase.mask_ratio > 0)
        first, second = (trainer.flip.train()(**batch).logits_per_image for _ in range(2))
        assert torch.equal(first, second)


def test_ratios_that_do_not_fit_the_model_are_refused():
    text = tiny_config().get_text_config()
    with pytest.raises(ValueError, match="mask_ratio=0.99 keeps none of the 16 patches"):
        check_masks(ModelArguments(mask_ratio_end=0.99), text, 16)
    with pytest.raises(ValueError, match="--text_mask_ratio 0.9 keeps fewer than 2 of the context's 16 tokens"):
        check_masks(ModelArguments(text_mask_ratio=0.9), text, 16)
    text.attend_to_padding = True
    with pytest.raises(ValueError, match="attend_to_padding"):
        check_masks(ModelArguments(text_mask_ratio=0.5), text, 16)
    check_masks(ModelArguments(), text, 16)


@pytest.mark.parametrize("kind", ["clip", "margin", "official"])
def test_the_image_processor_follows_the_image_size(kind, tmp_path):
    square = {"height": 32, "width": 32}
    image_processor, size = {
        "clip": (CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square), {"shortest_edge": 48}),
        "margin": (CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=square), {"shortest_edge": 60}),
        "official": (FlipImageProcessorPil(size=square, crop_size=square), {"height": 48, "width": 48}),
    }[kind]
    assert resized_image_processor(image_processor, 32) is image_processor
    resized_image_processor(image_processor, 48).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert (
        loaded.to_dict()["size"] == size and loaded.to_dict()["image_mean"] == image_processor.to_dict()["image_mean"]
    )
    assert loaded(torch.zeros(3, 70, 90), return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)


# -- real runs --------------------------------------------------------------------------------------------------------


def test_a_run_with_a_schedule_and_masked_texts(image_folder, tmp_path):
    run = pretrain(
        *("--train_data", str(image_folder), "--output_dir", str(tmp_path), "--micro_batch_size", "8"),
        *(*TINY, *SHORT, "--num_workers", "0", "--mask_strategy", "gaussian", "--mask_ratio", "0.75"),
        *("--mask_ratio_end", "0.25", "--mask_ratio_steps", "3", "--text_mask_ratio", "0.5"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "masked: 180 samples, mask ratio 0.75, 0.5, 0.25" in run.stdout
    assert "unmasked: 64 samples, mask ratio 0," in run.stdout
    losses = [json.loads(line).get("loss", 0) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 8 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    config = FlipModel.from_pretrained(tmp_path).config
    assert (config.mask_strategy, config.mask_ratio) == ("gaussian", 0.75)


def test_a_run_that_prefers_edges_less_and_less_resumes_to_the_same_weights(tar_folder, tmp_path):
    """From the middle of the schedule; the model itself masks at random, as it has no strategy that needs pixels."""
    options = ["--mask_strategy", "edges", "--mask_edge_strength", "2", "--mask_edge_strength_end", "0"]
    options += ["--checkpoint_samples", "96", "--keep_checkpoints", "9", "--mask_ratio", "0.75"]
    make_trainer(tmp_path / "straight", tar_folder, *options).run()
    checkpoint = tmp_path / "straight" / f"checkpoint-{96:012d}"
    trainer = make_trainer(tmp_path / "again", tar_folder, *options, "--resume_from_checkpoint", str(checkpoint))
    assert trainer.state.samples == 96
    trainer.run()
    weights, again = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "again"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    config = FlipModel.from_pretrained(tmp_path / "straight").config
    assert (config.mask_strategy, config.mask_ratio) == ("random", 0.75)
    assert "mask_strategy: edges" in (tmp_path / "straight" / "recipe.yaml").read_text()


def test_a_saved_model_resumes_with_larger_images_and_other_patches(trained, tmp_path):
    folder, _ = trained  # 64 pixels, patches of 8
    run = pretrain(
        *("shapes", "--train_samples", "128", "--unmasked_samples", "64", "--output_dir", str(tmp_path / "out")),
        *("--model_name_or_path", str(folder), "--vision_config", "", "--text_config", "", "--report_to", "none"),
        *("--image_size", "96", "--patch_size", "12", "--mask_strategy", "resize", "--mask_ratio", "0.75"),
        *("--base_lr", "1e-5", "--unmasked_base_lr", "1e-5"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    vision = FlipModel.from_pretrained(tmp_path / "out").config.vision_config
    assert (vision.image_size, vision.patch_size, vision.mask_strategy) == (96, 12, "random")
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").to_dict()["crop_size"]["height"] == 96
    before, after = (json.loads((path / "results.json").read_text())["top1"] for path in (folder, tmp_path / "out"))
    assert after > before - 0.05  # patches and positions mean what they meant
