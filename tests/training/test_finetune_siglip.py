"""A SigLIP is fine-tuned on half of its patches with its own loss, and shipped as a SigLIP again."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, SiglipModel, SiglipProcessor, pipeline

from flip_hf import FlipModel
from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.interpolation import load_ends
from flip_hf.conversion.siglip import convert_from_siglip
from tests.helpers.pairs import shapes_rows
from tests.helpers.pretraining import pretrain
from tests.helpers.programs import ROOT, run_program
from tests.helpers.siglip_folder import make_siglip_folder, save_siglip_1

CONVERT = ROOT / "scripts" / "convert.py"
TEXTS = ["a red circle", "a blue star on a white background"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    make_siglip_folder(folder / "siglip")
    for i, row in enumerate(shapes_rows(2)):
        (folder / f"{i}.jpg").write_bytes(row["image"]["bytes"])
    return folder


def logits_of(model, processor, folder, **padding) -> torch.Tensor:
    pictures = [Image.open(folder / f"{i}.jpg") for i in range(2)]
    inputs = processor(text=TEXTS, images=pictures, return_tensors="pt", **padding)
    inputs.pop("attention_mask", None)  # SigLIP's own processor gives none
    with torch.no_grad():
        return model(**inputs).logits_per_image


def test_a_folder_becomes_a_flip_and_a_siglip_again(siglip, tmp_path):
    made = run_program(CONVERT, "siglip", siglip / "siglip", tmp_path / "flip", "--mask_ratio", "0.75")
    assert made.returncode == 0, made.stderr
    flip = FlipModel.from_pretrained(tmp_path / "flip")
    processor = AutoProcessor.from_pretrained(tmp_path / "flip")
    assert flip.config.mask_ratio == 0.75
    assert flip.config.text_config.pad_token_id == processor.tokenizer.pad_token_id
    theirs = SiglipModel.from_pretrained(siglip / "siglip")
    expected = logits_of(
        theirs, SiglipProcessor.from_pretrained(siglip / "siglip"), siglip, padding="max_length", max_length=16
    )
    assert (logits_of(flip, processor, siglip) - expected).abs().max() < 1e-5
    back = run_program(CONVERT, "to-siglip", tmp_path / "flip", tmp_path / "again")
    assert back.returncode == 0, back.stderr
    again = SiglipModel.from_pretrained(tmp_path / "again")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert "SiglipProcessor" in (tmp_path / "again" / "processor_config.json").read_text()


def test_a_run_starts_from_it_and_trains_on_masked_images(siglip, tmp_path):
    run = pretrain(
        *("--model_name_or_path", str(siglip / "siglip"), "--mask_ratio", "0.5", "--train_data", "shapes"),
        *("--train_samples", "3200", "--unmasked_samples", "32", "--unmasked_base_lr", "1e-3", "--batch_size", "32"),
        *("--base_lr", "0.02", "--warmup_samples", "320", "--unmasked_warmup_samples", "0", "--log_samples", "160"),
        *("--report_to", "none", "--precision", "fp32", "--output_dir", str(tmp_path / "run"), "--num_workers", "0"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "siglip is a SiglipModel; training continues as a FlipModel with its weights" in run.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.8 * losses[0], losses
    flip = FlipModel.from_pretrained(tmp_path / "run")
    assert flip.logit_bias is not None and flip.config.text_config.pad_token_id == 0
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "run"))
    assert len(classify(Image.open(siglip / "0.jpg"), candidate_labels=TEXTS)) == 2
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    shipped = logits_of(flip.to_siglip(), processor, siglip, padding="max_length", max_length=16)
    assert (logits_of(flip, processor, siglip) - shipped).abs().max() < 1e-5


def test_a_run_starts_from_a_siglip_1_with_its_own_texts(siglip, tmp_path):
    """Its tokenizer is a sentencepiece file; in the run's folder it is one that needs no such file."""
    (tmp_path / "siglip_1").mkdir()
    save_siglip_1(tmp_path / "siglip_1")
    run = pretrain(
        *("--model_name_or_path", str(tmp_path / "siglip_1"), "--mask_ratio", "0.5", "--train_data", "shapes"),
        *("--train_samples", "64", "--unmasked_samples", "0", "--batch_size", "32", "--warmup_samples", "0"),
        *("--report_to", "none", "--precision", "fp32", "--output_dir", str(tmp_path / "run"), "--num_workers", "0"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ours = AutoProcessor.from_pretrained(tmp_path / "run")
    theirs = SiglipProcessor.from_pretrained(tmp_path / "siglip_1")
    options = {"padding": "max_length", "truncation": True}
    some = [*TEXTS, "A Red, CIRCLE!"]
    assert ours(text=some, **options).input_ids == theirs(text=some, **options).input_ids
    assert FlipModel.from_pretrained(tmp_path / "run").config.text_config.pad_token_id == theirs.tokenizer.pad_token_id
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "run"))
    labels = {"candidate_labels": ["red", "blue"], "hypothesis_template": "{}"}
    assert len(classify(Image.open(siglip / "0.jpg"), **labels)) == 2


@pytest.mark.parametrize("begins", ["--model_name_or_path", "--init_vision_from"])
def test_its_image_tower_can_be_frozen_and_ignores_a_remainder(begins, tmp_path):
    """Of 34 pixels, patches of 8 leave 2, as those of SigLIP so400m/14 at 384 pixels leave 6."""
    make_siglip_folder(tmp_path / "siglip", image_size=34)
    convert_from_siglip(str(tmp_path / "siglip")).save(tmp_path / "flip")
    start = tmp_path / ("siglip" if begins == "--model_name_or_path" else "flip")
    projection = ["--projection_dim", "48"] if begins == "--init_vision_from" else []
    run = pretrain(
        *(begins, str(start), *projection, "--freeze", "image", "--mask_ratio", "0.5", "--train_data", "shapes"),
        *("--train_samples", "64", "--unmasked_samples", "0", "--batch_size", "32", "--warmup_samples", "0"),
        *("--report_to", "none", "--precision", "fp32", "--output_dir", str(tmp_path / "run"), "--num_workers", "0"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Frozen: the image tower" in run.stdout
    before = FlipModel.from_pretrained(tmp_path / "flip").vision_model
    after = FlipModel.from_pretrained(tmp_path / "run").vision_model
    assert after.config.image_size == 34 and after.config.num_patches == 16
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())


def test_a_run_and_the_siglip_that_it_began_from_are_interpolated(siglip):
    convert_from_siglip(str(siglip / "siglip")).save(siglip / "tuned")
    flip = FlipModel.from_pretrained(siglip / "tuned")
    before = flip.text_projection.weight.detach().clone()
    with torch.no_grad():
        flip.text_projection.weight.add_(1)
    flip.save_pretrained(siglip / "tuned")
    middle = load_ends(str(siglip / "siglip"), str(siglip / "tuned")).set_alpha(0.5)
    assert isinstance(middle, FlipModel)
    assert (middle.text_projection.weight - before - 0.5).abs().max() < 1e-6
    two = load_ends(str(siglip / "siglip"), str(siglip / "siglip"))
    assert isinstance(two.model, SiglipModel) and isinstance(two.processor, SiglipProcessor)


def test_checkpoints_for_images_of_any_shape_are_refused(tmp_path):
    (tmp_path / "naflex").mkdir()
    (tmp_path / "naflex" / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(ConversionError, match="is a NaFlex checkpoint of SigLIP 2"):
        convert_from_siglip(str(tmp_path / "naflex"))
    run = pretrain("--model_name_or_path", str(tmp_path / "naflex"), "--train_data", "shapes")
    assert run.returncode != 0 and "use the checkpoint of the same size with a fixed resolution" in run.stderr
