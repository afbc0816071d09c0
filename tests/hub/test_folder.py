"""Publishing a folder: the files that are taken, and those that are not."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import CLIPConfig, CLIPModel

from flip_hf import FlipForImageClassification, FlipModel
from flip_hf.evaluation.options import parse_options
from flip_hf.evaluation.report import to_json, write_report
from flip_hf.hub.folder import FolderError, prepare
from flip_hf.redaction import redact
from flip_hf.training.build import build_trainer
from flip_hf.training.recipes import parse_arguments
from tests.helpers.models import tiny_config
from tests.helpers.pretraining import SHORT, TINY
from tests.helpers.programs import ROOT

MODULES = ("blocks", "clip", "configuration", "masking", "modeling", "processing", "resizing", "siglip")
CODE = {f"{name}_flip.py" for name in MODULES}
DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TOKEN = "hf_" + "Ab1" * 11


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_prepared_folder_is_complete_and_nothing_else_is_in_it(run_folder, tmp_path):
    ready = prepare(run_folder, tmp_path / "ready", repo_id="you/flip")
    assert names(ready) == {
        *("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", "recipe.yaml", "results.json", "log.jsonl", "training_curves.png"),
        *("logs/events.out.tfevents.1", *CODE),
    }
    for name in names(ready) - {"README.md"}:
        assert (ready / name).read_bytes() == (run_folder / name).read_bytes(), name
    assert not (ready / "model.safetensors").is_symlink()
    again = prepare(ready, tmp_path / "again", repo_id="you/flip", link=True)
    assert names(again) == names(ready)
    weights = again / "model.safetensors"
    assert not weights.is_symlink() and weights.samefile(ready / "model.safetensors")  # a hard link: no copy either
    assert (again / "README.md").read_bytes() == (ready / "README.md").read_bytes()


def test_tokens_passwords_and_signed_urls_stay_behind(run_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    urls = ["https://me:pass-word@host/{0..9}.tar", "https://bucket/a.tar?X-Amz-Signature=f00ba4&part=1&sig=f00ba5"]
    recipe["train_data"] = [*urls, f"hf://{TOKEN}@data"]
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run_folder / "log.jsonl").write_text('{"samples": 1, "key": "0123456789abcdef", "name": "hf_hub_download"}\n')
    (run_folder / "logs" / "events.out.tfevents.1").write_bytes(b"\x00\xff" + TOKEN.encode())
    ready = prepare(run_folder, tmp_path / "ready")
    everything = "".join((ready / name).read_text("latin-1") for name in names(ready))
    for secret in ("pass-word", "f00ba", TOKEN, "0123456789abcdef"):
        assert secret not in everything, secret
    assert "events.out.tfevents.1 contains something like a token" in caplog.text
    kept = yaml.safe_load((ready / "recipe.yaml").read_text())["train_data"]
    assert kept[0] == "https://[removed]@host/{0..9}.tar" and "&part=1&sig=[removed]" in kept[1]
    assert json.loads((ready / "log.jsonl").read_text())["name"] == "hf_hub_download"


def test_plain_words_are_left_alone(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    text = "false hf://datasets/u/d hf_transfer https://host/a?page=2 model@main tokenizer: bert"
    assert redact(text) == text


def test_a_checkpoint_is_made_whole(run_folder, tmp_path):
    for name in CODE:
        (run_folder / name).unlink()
    FlipModel.from_pretrained(run_folder).config.save_pretrained(run_folder)
    ready = prepare(run_folder, tmp_path / "ready")
    assert names(ready) >= CODE and "AutoModel" in json.loads((ready / "config.json").read_text())["auto_map"]
    before, after = (FlipModel.from_pretrained(folder).state_dict() for folder in (run_folder, ready))
    assert all(before[name].equal(tensor) for name, tensor in after.items()) and len(before) == len(after)


def test_a_model_that_can_be_a_clip_model_is_exported_as_one(run_folder, tmp_path):
    towers = [dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"num_attention_heads": 2} for _ in range(2)]
    text = {**towers[0], "vocab_size": 600, "num_hidden_layers": 1, "eos_token_id": 5}
    vision = {**towers[1], "image_size": 32, "patch_size": 8, "num_hidden_layers": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    FlipModel.from_clip(clip).save_pretrained(run_folder)
    (run_folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Flip\n\n`trust_remote_code=True`\n")
    ready = prepare(run_folder, tmp_path / "ready", export_clip=True, repo_id="you/clip")
    assert not list(ready.glob("*.py")) and "auto_map" not in "".join(p.read_text() for p in ready.glob("*.json"))
    loaded = CLIPModel.from_pretrained(ready)
    assert all(tensor.equal(clip.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    card = (ready / "README.md").read_text()
    assert "license: mit" in card and 'model="you/clip")' in card and "trust_remote_code" not in card
    assert (ready / "recipe.yaml").is_file()


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "is not a model folder"),
        ("model.safetensors", "has no model.safetensors"),
        ("processor_config.json", "processor.save_pretrained"),
        ("tokenizer*", "no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_refused_by_the_file_it_lacks(lost, message, run_folder, tmp_path):
    for path in run_folder.glob(lost):
        path.unlink()
    with pytest.raises(FolderError, match=message):
        prepare(run_folder, tmp_path / "ready")


def test_a_model_that_cannot_be_published_is_refused_with_the_reason(run_folder, tmp_path):
    with pytest.raises(FolderError, match="CLIPModel cannot compute"):
        prepare(run_folder, tmp_path / "ready", export_clip=True)
    FlipForImageClassification(tiny_config(num_labels=2)).save_pretrained(run_folder)
    with pytest.raises(FolderError, match="(?s)not for a FlipForImageClassification.*README.md"):
        prepare(run_folder, tmp_path / "ready")


def test_a_name_or_an_output_that_cannot_be_used_is_refused(run_folder, tmp_path):
    with pytest.raises(FolderError, match="OWNER/flip"):
        prepare(run_folder, tmp_path / "ready", repo_id="flip")
    with pytest.raises(FolderError, match="is not empty"):
        prepare(run_folder, run_folder)


def test_a_model_with_a_decoder_is_published_with_a_card_that_runs(tar_folder, tmp_path):
    """The folder of an MAE run: no tokenizer, a decoder, an image processor."""
    words = ["--train_data", str(tar_folder), *TINY, *SHORT, "--unmasked_samples", "0", "--num_workers", "0"]
    words += ["--objective", "reconstruction", "--output_dir", str(tmp_path / "mae"), "--checkpoint_samples", "128"]
    words += ["--decoder_config", json.dumps(DECODER), "--eval_data", "shapes"]
    build_trainer(parse_arguments(words, ROOT / "flip_hf" / "recipes", "shapes")).run()
    for folder in (tmp_path / "mae", tmp_path / "mae" / "checkpoint-000000000128"):
        ready = prepare(folder, tmp_path / f"ready-{folder.name}", repo_id="you/mae")
        assert {"pretraining_flip.py", "decoder_flip.py", "config.json", "model.safetensors"} <= names(ready)
        card = ModelCard.load(ready / "README.md")
        assert card.data.pipeline_tag == "image-feature-extraction" and card.data.tags.count("mae") == 1
        for said in (
            "trained to reconstruct the dropped 50% of the patches of every image, without captions",
            "| | images | decoder |\n|---|---|---|\n| blocks x width | 1 x 32, 2 heads | 1 x 16, 2 heads |",
            "| images seen | 192, 32 per step |" if folder.name == "mae" else "| images seen | 180, 32 per step |",
            "| reconstructed | pixels of dropped patches, of each patch's own mean and deviation |",
            "the text tower of this class is untrained",
        ):
            assert said in card.text, said
        assert ("Error of the reconstructed patches on 480 images: **" in card.text) == (folder.name == "mae")
        code = "".join(re.findall(r"```python\n(.*?)```", card.text, flags=re.S)).replace("you/mae", str(ready))
        namespace = {}
        exec(code, namespace)
        assert namespace["features"].shape == (1, 32) and namespace["outputs"].reconstruction_loss > 0


def test_no_path_of_this_machine_is_published(run_folder, tmp_path):
    secret = "/home/somebody/work"
    recipe = (run_folder / "recipe.yaml").read_text()
    data = [f"{secret}/my pairs/{{00..09}}.tar", f"{secret}/pictures"]
    changed = {**yaml.safe_load(recipe), "train_data": data, "output_dir": f"{secret}/runs/x", "class_names": "~/c.txt"}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(changed))
    results = json.loads((run_folder / "results.json").read_text())
    results["sources"] = {name: {"samples": 3, "refused": {}} for name in data}
    (run_folder / "results.json").write_text(json.dumps(results))
    (run_folder / "log.jsonl").write_text(json.dumps({"samples": 1, "said": f"read {secret}/a/b.tar"}) + "\n")
    options = parse_options(["--data", f"{secret}/pictures", "--class_names", f"{secret}/classes.txt"])
    report = {
        **to_json(f"{secret}/runs/x", options, [], {}, ""),
        "command": f"flip-hf evaluate {secret}/runs/x --data '{secret}/my pictures'",
    }
    write_report(run_folder / "evaluation", report, "")
    prepare(run_folder, tmp_path / "out", repo_id="you/x")
    published = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for path in published:
        assert b"somebody" not in path.read_bytes(), path
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["class_names"] == "c.txt"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- `my pairs/{00..09}.tar`: 3 pairs seen" in text and "- `pictures`: 3 pairs seen" in text
    assert "--data 'my pictures'" in (tmp_path / "out" / "evaluation" / "results.md").read_text()
