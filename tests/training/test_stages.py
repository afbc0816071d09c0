"""Stages of a run: how they are read, and what a run makes of them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from flip_hf import FlipModel
from flip_hf.training.arguments import ModelArguments
from flip_hf.training.build import build_trainer
from flip_hf.training.masks import TextMasks
from flip_hf.training.models import make_config
from flip_hf.training.packing import Tokenize
from flip_hf.training.patches import Views
from flip_hf.training.phases import plan_phases
from flip_hf.training.recipes import parse_arguments, write_recipe
from flip_hf.training.stage_checks import check_stages_fit, check_text_lengths
from tests.helpers.arguments import parse
from tests.helpers.models import tiny_config
from tests.helpers.pretraining import TINY
from tests.helpers.programs import ROOT

RECIPES = ROOT / "flip_hf" / "recipes"
TWO = [{"samples": 1000, "mask_ratio": 0.75}, {"samples": 100, "mask_ratio": 0, "base_lr": 1e-5}]


def with_stages(stages: object, *argv: str):
    return parse("shapes", "--stages", json.dumps(stages), *argv)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_masked_training_with_tuning_is_the_case_of_two_stages():
    argv = ["--batch_size", "64", "--base_lr", "1e-4", "--warmup_samples", "50", "--mask_ratio", "0.75"]
    stages = [{"samples": 1000}, {"samples": 100, "mask_ratio": 0, "base_lr": 1e-5, "warmup_samples": 10}]
    tuning = ["--unmasked_samples", "100", "--unmasked_base_lr", "1e-5", "--unmasked_warmup_samples", "10"]
    ours = plan_phases(with_stages(stages, *argv))
    theirs = plan_phases(parse("shapes", "--train_samples", "1000", *tuning, *argv))
    assert [phase.name for phase in ours] == ["stage 1", "stage 2"]
    for phase, other in zip(ours, theirs, strict=True):
        assert {**vars(phase), "name": other.name} == vars(other)


def test_a_stage_continues_the_learning_rate_unless_it_has_its_own():
    stages = [*({"samples": 100} for _ in range(2)), {"samples": 100, "base_lr": 0.5}, {"samples": 100}]
    options = ["--batch_size", "64", "--base_lr", "1", "--warmup_samples", "20"]
    phases = plan_phases(with_stages(stages, *options))
    assert [(phase.curve.start, phase.curve.end) for phase in phases] == [(0, 200), (0, 200), (200, 400), (200, 400)]
    assert [phase.begins_curve for phase in phases] == [True, False, True, False]
    assert phases[1].curve.at(110) == pytest.approx(0.25 * 0.5)  # in the middle of the cosine
    assert phases[2].curve.at(220) == pytest.approx(0.25 * 0.5) and phases[3].curve.at(400) == pytest.approx(0)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("x", "^--stages must be a JSON list of objects"),
        ([], "^--stages lists between 1 and 64 stages, got 0.$"),
        ([{}] * 65, "^--stages lists between 1 and 64 stages, got 65.$"),
        ([TWO[0], 3], "^--stages must be a JSON list of objects"),
        ([TWO[0], {"mask_ratio": 0.5}], "^--stages, stage 2 has no samples.$"),
        ([TWO[0], {"samples": 0}], "^--stages, stage 2: samples must be between 1"),
        ([{"samples": 1e3}], "^--stages, stage 1: samples must be an integer"),
        ([{"samples": 100, "mask_ration": 0.5}], "stage 1 has no field 'mask_ration'. Did you mean 'mask_ratio'"),
        ([{"samples": 100, "mask_ratio": 1}], "^--stages, stage 1: mask_ratio must be in .0, 1., got 1.$"),
        ([{"samples": 100, "base_lr": "fast"}], "^--stages, stage 1: base_lr must be a number"),
        ([{"samples": 100, "base_lr": None}], "^--stages, stage 1: base_lr must be a number"),
        ([TWO[0], {"samples": 100, "warmup_samples": 3}], "^--stages, stage 2: warmup_samples is .*give its base_lr"),
        ([{"samples": 100, "image_size": 0}], "^--stages, stage 1: image_size must be between 1 and"),
        ([TWO[0], {"samples": 63}], "^--stages, stage 2: samples is 63, less than a step's --batch_size 64.$"),
    ],
)
def test_mistakes_in_a_stage_name_its_number(stages, message):
    with pytest.raises(ValueError, match=message) as caught:
        with_stages(stages, "--batch_size", "64")
    assert "\n" not in str(caught.value)


def test_text_that_is_no_list_of_stages_is_refused():
    for text, message in [
        ("[{", "^--stages must be JSON such as"),
        ('[{"samples": 100, "samples": 200}]', "one of samples is given twice in a stage"),
        ("[" * 100_000, "^--stages must be JSON such as"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            parse("--stages", text)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_samples", "1000"], "takes the place of --train_samples: give one of them"),
        (["--unmasked_samples", "1000"], "takes the place of --unmasked_samples"),
        (["--unmasked_base_lr", "1"], "takes the place of --unmasked_base_lr"),
        (["--unmasked_warmup_samples", "1"], "takes the place of --unmasked_warmup_samples"),
        (["--mask_ratio_end", "0.5"], "takes the place of --mask_ratio_end"),
        (["--early_stopping_patience", "3"], "--early_stopping_patience would skip the stages that are left"),
        (["--objective", "both"], "stage 2: on whole images --objective both has nothing to reconstruct"),
    ],
)
def test_options_that_contradict_stages_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        with_stages(TWO, *argv)


# -- recipes ----------------------------------------------------------------------------------------------------------


def parse_file(path: Path, *argv: str):
    return parse_arguments([str(path), *argv], RECIPES, "shapes")


def test_stages_take_the_place_of_the_phases_of_a_base(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "base: shapes\nstages:\n  - {samples: 4096, mask_ratio: 0.75}\n  - {samples: 1024, base_lr: 1e-3}\n"
    )
    first, second = plan_phases(parse_file(tmp_path / "r.yaml"))
    assert (first.end, second.end, first.mask_ratios, second.mask_ratios) == (4096, 5120, (0.75,), (0.5,))
    assert second.curve.peak_lr == 1e-3 * 64 / 256  # which YAML reads as text
    with pytest.raises(ValueError, match="takes the place of --train_samples"):
        parse_file(tmp_path / "r.yaml", "--train_samples", "3")
    assert [phase.end for phase in plan_phases(parse_file(tmp_path / "r.yaml", "--stages", json.dumps(TWO)))] == [
        *(1000, 1100),
    ]


def test_a_written_recipe_has_the_stages_and_nothing_in_their_place(tmp_path):
    arguments = with_stages(TWO)
    write_recipe(arguments, tmp_path / "recipe.yaml")
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert written["stages"] == TWO and "train_samples" not in written
    assert parse_file(tmp_path / "recipe.yaml") == arguments


# -- the model --------------------------------------------------------------------------------------------------------


def check(stages: list[dict], *argv: str, **model) -> None:
    """Checks stages of images of 64 pixels in patches of 8, and of texts of 32 tokens."""
    arguments = with_stages(stages, *argv)
    config = make_config(arguments.model, arguments.objective)
    for name, value in model.items():
        part = config.vision_config if hasattr(config.vision_config, name) else config.text_config
        setattr(part, name, value)
    check_stages_fit(arguments, config)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"image_size": 36}, "stage 2: image_size 36 is not a multiple of the patch size, 8; use 32.$"),
        ({"image_size": 4}, "stage 2: image_size 4 is not a multiple of the patch size, 8; use 8.$"),
        ({"image_size": 8, "mask_ratio": 0.5}, "stage 2: mask_ratio=0.5 keeps none of the 1 patches"),
        ({"text_length": 33}, "stage 2: text_length 33 is beyond the model's context of 32 tokens.$"),
        ({"text_length": 4, "text_mask_ratio": 0.6}, "stage 2: text_mask_ratio 0.6 keeps fewer than 2 .* 4 tokens"),
        ({"base_lr": 1e-5}, "stage 2: the warm-up of its learning rate, 2,048 samples, is not shorter than the 200 .*"),
        ({"text_mask_ratio": 0.95}, "stage 2: text_mask_ratio 0.95 keeps fewer than 2 of the context's 32 tokens"),
    ],
)
def test_stages_that_do_not_fit_the_model_are_refused_by_their_number(stage, message):
    with pytest.raises(ValueError, match=f"^--stages, {message}"):
        check([TWO[0], {"samples": 100, **stage}, {"samples": 100}])


def test_images_end_at_the_models_own_size():
    small = {"samples": 100, "image_size": 32}
    check([small, {"samples": 100, "image_size": 64}])
    with pytest.raises(
        ValueError, match="stage 2: its images of 32 pixels are the last ones, and the model is made for 64"
    ):
        check([{"samples": 100}, small])


def test_a_model_that_ignores_a_remainder_takes_images_with_one():
    check([{"samples": 100, "image_size": 36}, {"samples": 100}], ignore_remainder=True)


def test_a_decoder_has_images_of_one_size():
    with pytest.raises(ValueError, match="stage 1: the decoder of --objective both is made for images of 64 pixels"):
        check([{"samples": 100, "image_size": 32}, {"samples": 100}], "--objective", "both")


def test_texts_are_cut_where_that_has_an_effect():
    short = [{"samples": 100, "text_length": 8}]
    check(short)
    with pytest.raises(ValueError, match="stage 1: text_length has no effect on a model that pads its texts again"):
        check(short, attend_to_padding=True)
    with pytest.raises(ValueError, match="stage 1: --objective reconstruction reads no texts. Leave text_length out."):
        check(short, "--objective", "reconstruction", "--mask_ratio", "0.5")


@pytest.fixture
def with_ends(tokenizer):
    """A tokenizer whose texts have a start and an end."""
    tokenizer.add_special_tokens({"bos_token": "<start>", "eos_token": "<end>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<start>", "<end>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ids)
    return tokenizer


def test_a_text_that_is_cut_keeps_its_end(with_ends):
    end = with_ends.convert_tokens_to_ids("<end>")
    pooling = {"pooling_type": "eos", "eos_token_id": end, "vocab_size": len(with_ends)}
    config = FlipModel(tiny_config(text=pooling)).config.text_config  # with its attention, which packing asks for
    texts = ["a red circle left of a blue square"] * 16
    tokenize = Tokenize(with_ends, config)
    whole, cut = (tokenize(texts, length) for length in (None, 5))
    assert cut["input_ids"].numel() == 16 * 6  # three texts of five to a row of sixteen
    assert whole["input_ids"].numel() > cut["input_ids"].numel()
    for tokens in (whole, cut):
        assert (tokens["input_ids"].flatten()[tokens["pooled_tokens"]] == end).all()
    tokenize.packs = False
    padded = tokenize(texts, 5)
    assert padded["input_ids"].shape == (16, 5) and (padded["input_ids"][:, -1] == end).all()


def test_a_text_has_room_for_a_word_beside_its_ends(with_ends):
    phases = plan_phases(with_stages([{"samples": 100, "text_length": 3}, {"samples": 100, "text_length": 2}]))
    check_text_lengths(phases[:1], with_ends)
    with pytest.raises(ValueError, match="stage 2: text_length 2 leaves no room .* 2 special tokens; use at least 3"):
        check_text_lengths(phases, with_ends)


def test_masks_are_drawn_of_a_text_that_is_cut(with_ends):
    phases = plan_phases(with_stages([{"samples": 100, "text_length": 6, "text_mask_ratio": 0.5}]))
    config = tiny_config()
    view = Views("random", config.vision_config, phases, context=16)(0)
    assert (view.text_length, view.text_noise, view.text_kept) == (6, 6, 3)
    text_config = config.get_text_config()
    masks = TextMasks(ModelArguments(text_mask_strategy="random"), text_config, with_ends)
    tokenize = Tokenize(with_ends, text_config, masks)
    tokenize.packs = False
    masked = tokenize(["a red circle left of a blue square"] * 8, 6, torch.rand(8, 6), 3)
    assert masked["input_ids"].shape == (8, 3) and masked["position_ids"].max() < 6


def test_the_model_is_told_the_grid_of_masked_patches_of_another_size(tar_folder, tmp_path):
    stages = [{"samples": 64, "image_size": 24}, {"samples": 64, "image_size": 16, "mask_ratio": 0}, {"samples": 64}]
    options = ["--batch_size", "32", "--num_workers", "0", "--report_to", "none", "--mask_ratio", "0.5"]
    folders = ["--train_data", str(tar_folder), "--output_dir", str(tmp_path / "run")]
    trainer = build_trainer(parse(*folders, *TINY, *options, "--stages", json.dumps(stages)))
    made = []
    for phase in trainer.phases:
        trainer.loader.begin_at(phase.start)
        made.append(trainer.prepare(next(iter(trainer.loader)), phase))
    assert [batch.get("grid") for batch in made] == [(3, 3), None, None]
    assert [batch["patches"].shape[1] for batch in made] == [4, 4, 8]
    assert made[0]["ids_keep"].max() == 8 and made[2]["ids_keep"].max() == 15
    assert [batch["interpolate_pos_encoding"] for batch in made] == [False, True, False]
