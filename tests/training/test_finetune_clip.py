"""A practitioner's way: take a CLIP, fine-tune it on half of its patches, ship it as a CLIP again."""

import json

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from flip_hf import FlipModel
from flip_hf.hub.card import write_card
from tests.helpers.clip_folder import make_clip_folder
from tests.helpers.pairs import shapes_rows
from tests.helpers.pretraining import pretrain
from tests.helpers.programs import ROOT, run_program

CONVERT = ROOT / "scripts" / "convert.py"


def make_image_folder(folder, count: int) -> None:
    """Image-caption pairs, as a person has them."""
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w") as metadata:
        for i, row in enumerate(shapes_rows(count)):
            (folder / f"{i}.jpg").write_bytes(row["image"]["bytes"])
            metadata.write(json.dumps({"file_name": f"{i}.jpg", "text": row["caption"]}) + "\n")


def test_a_clip_folder_is_taken_as_it_is_and_trains_as_the_converted_one_does(tmp_path):
    make_clip_folder(tmp_path / "clip")
    make_image_folder(tmp_path / "pairs", 64)
    assert run_program(CONVERT, "clip", tmp_path / "clip", tmp_path / "flip").returncode == 0
    runs = {}
    for name in ("clip", "flip"):
        runs[name] = pretrain(
            *("--model_name_or_path", str(tmp_path / name), "--mask_ratio", "0.5", "--mask_strategy", "grid"),
            *("--train_data", str(tmp_path / "pairs"), "--train_samples", "96", "--unmasked_samples", "0"),
            *("--batch_size", "32", "--base_lr", "0.02", "--warmup_samples", "32", "--log_samples", "32"),
            *("--report_to", "none", "--precision", "fp32", "--output_dir", str(tmp_path / f"from-{name}")),
            *("--num_workers", "0"),
        )
        assert runs[name].returncode == 0, runs[name].stderr[-3000:]
    said = f"{tmp_path / 'clip'} is a CLIPModel; training continues as a FlipModel with its weights"
    assert said in runs["clip"].stdout and "is a CLIPModel" not in runs["flip"].stdout
    ours, theirs = (load_file(tmp_path / f"from-{name}" / "model.safetensors") for name in ("clip", "flip"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for file in ("config.json", "tokenizer.json", "processor_config.json"):
        texts = ((tmp_path / f"from-{name}" / file).read_text() for name in ("clip", "flip"))
        one, other = ([line for line in text.splitlines() if '"dtype"' not in line] for text in texts)
        assert one == other, file
    write_card(tmp_path / "from-clip")
    assert "| began from | `clip` |" in (tmp_path / "from-clip" / "README.md").read_text()


def test_a_clip_is_fine_tuned_masked_and_shipped_as_a_clip(tmp_path):
    make_clip_folder(tmp_path / "clip")
    make_image_folder(tmp_path / "pairs", 200)
    made = run_program(CONVERT, "clip", tmp_path / "clip", tmp_path / "flip")
    assert made.returncode == 0, made.stderr

    trained = pretrain(
        *("--model_name_or_path", str(tmp_path / "flip"), "--mask_ratio", "0.5", "--output_dir", str(tmp_path / "run")),
        *("--train_data", str(tmp_path / "pairs"), "--train_samples", "4000", "--unmasked_samples", "0"),
        *("--batch_size", "40", "--base_lr", "0.02", "--warmup_samples", "400", "--log_samples", "200"),
        *("--report_to", "none", "--precision", "fp32", "--shuffle_block", "16"),
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.9 * losses[0], losses

    shipped = run_program(CONVERT, "to-clip", tmp_path / "run", tmp_path / "shipped")
    assert shipped.returncode == 0, shipped.stderr
    clip = CLIPModel.from_pretrained(tmp_path / "shipped")
    flip = FlipModel.from_pretrained(tmp_path / "run")
    processor = AutoProcessor.from_pretrained(tmp_path / "shipped")
    assert type(processor) is CLIPProcessor
    pictures = [Image.open(tmp_path / "pairs" / f"{i}.jpg") for i in range(4)]
    inputs = processor(text=["a red circle", "a blue star"], images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = clip(**inputs)
        ours = flip(**inputs)
    assert (theirs.image_embeds - ours.image_embeds).abs().max() < 1e-6
    assert (theirs.text_embeds - ours.text_embeds).abs().max() < 1e-6
