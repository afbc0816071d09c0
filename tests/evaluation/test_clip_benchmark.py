"""CLIP_benchmark's own command on a saved folder gives what our zero-shot evaluation gives, sample by sample."""

import io
import json
import pickle
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPProcessor,
    Siglip2ImageProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from flip_hf import FlipForImageClassification
from flip_hf.data.shapes import CLASS_NAMES, generate_test
from flip_hf.evaluation import clip_benchmark as adapter
from flip_hf.evaluation.zero_shot import class_embeddings, normalized
from tests.helpers.models import randomize, tiny_clip

TEMPLATES = ["a photo of a {}.", "a {}, drawn among so many other things that the text is longer than the context."]
ROWS = list(generate_test([0], 36, image_size=48, seed=0))


def save_clip(folder: Path, tokenizer) -> Path:
    clip = tiny_clip(2)  # pools at the highest id: this tokenizer has no end of text
    clip.text_model.resize_token_embeddings(600)
    size = {"height": 48, "width": 48}
    randomize(clip)
    clip.save_pretrained(folder)
    image_processor = AutoProcessor.from_pretrained(folder.parent / "model").image_processor
    image_processor.size = image_processor.crop_size = size
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def save_siglip(folder: Path, tokenizer, image_processor_class: type = SiglipImageProcessor) -> Path:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 600, "max_position_embeddings": 12, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 16})
    SiglipModel(config).save_pretrained(folder)
    image_processor = image_processor_class(size={"height": 32, "width": 32}, do_convert_rgb=False)
    SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def shards(tmp_path) -> Path:
    """The embedded test data in CLIP_benchmark's WebDataset layout: two shards of 18 samples."""
    folder = tmp_path / "shards"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("2")
    (folder / "classnames.txt").write_text("\n".join(CLASS_NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(t.format("{c}") for t in TEMPLATES))
    for shard in range(2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            for index in range(18 * shard, 18 * (shard + 1)):
                row = ROWS[index]
                for extension, data in (("jpg", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                    member = tarfile.TarInfo(f"{index:04d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture
def metrics():
    """CLIP_benchmark's module of zero-shot figures, where it is installed and can count."""
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("CLIP_benchmark 1.6.2 needs NumPy < 2.4")
    return pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", reason="needs clip-benchmark")


@pytest.fixture
def logits_seen(metrics, monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Intermediate results of CLIP_benchmark: logits (B, C) and labels (B)."""
    classify = metrics.run_classification
    seen = []

    def recording(*args, **kwargs):
        seen.append(classify(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(metrics, "run_classification", recording)
    return seen


def run_command(monkeypatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *map(str, options)])
    monkeypatch.delitem(sys.modules, adapter.__name__)
    runpy.run_module(adapter.__name__, run_name="__main__")


@torch.no_grad()
def own_logits(folder: Path) -> torch.Tensor:
    """Cosines (B, C) times 100, as CLIP_benchmark scales them."""
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    weights = class_embeddings(model, processor.tokenizer, CLASS_NAMES, TEMPLATES, torch.device("cpu"))
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in ROWS]
    inputs = processor.image_processor(images=pictures, return_tensors="pt")
    return 100 * normalized(model.get_image_features(**inputs).pooler_output) @ weights.T


@pytest.mark.parametrize("kind", ["flip", "clip"])
def test_the_command_gives_our_own_figures(kind, saved, shards, tokenizer, logits_seen, tmp_path, monkeypatch):
    folder = saved if kind == "flip" else save_clip(tmp_path / "clip", tokenizer)
    monkeypatch.chdir(tmp_path)
    model = f"../{tmp_path.name}/{folder.name}"  # with slashes, as runs/shapes
    options = ("--dataset", "wds/shapes", "--dataset_root", shards, "--batch_size", 8, "--num_workers", 1, "--no_amp")
    run_command(monkeypatch, "eval", "--model_type", "flip_hf", "--model", model, *options)

    ((logits, labels),) = logits_seen
    expected = own_logits(folder)
    predicted = expected.argmax(1)
    assert labels.tolist() == [row["label"] for row in ROWS]
    assert (logits - expected).abs().max() < 1e-4
    assert logits.argmax(1).tolist() == predicted.tolist()
    # Neither images nor classes look all the same to the model, or this would prove little.
    assert expected.std(0).min() > 0.01 and expected.std(1).min() > 0.01
    written = json.loads(Path(f"shapes_main_{tmp_path.name}_{folder.name}_en_zeroshot_classification.json").read_text())
    assert (written["model"], written["pretrained"]) == (model, "main")
    assert written["metrics"]["acc1"] == pytest.approx((predicted == labels).float().mean().item())


def test_registering_twice_changes_nothing_and_load_clip_knows_the_type(metrics, saved):
    cli = adapter.register()
    run = cli.run
    assert adapter.register().run is run and cli.MODEL_TYPES.count("flip_hf") == 1
    model, _, tokenizer = cli.load_clip("flip_hf", str(saved), "main", None, "cpu")
    assert model.encode_text(tokenizer(["a"]).to("cpu")).shape == (1, 24)


def test_everything_sent_to_loader_workers_can_be_pickled(saved):
    _, transform, tokenizer = adapter.load_flip(str(saved))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), transform(image))
    assert pickle.loads(pickle.dumps(tokenizer))(["red circle"])["input_ids"].shape[0] == 1


def test_siglip_gets_full_rows_and_three_channels(tokenizer, tmp_path):
    model, transform, tokenize = adapter.load_flip(str(save_siglip(tmp_path / "siglip", tokenizer)))
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8))
    assert torch.equal(transform(grey), transform(grey.convert("RGB")))
    tokens = tokenize(["a red circle"])
    assert tokens["input_ids"].shape == (1, 12)  # the model's context, less than the tokenizer's
    assert torch.equal(tokenize(["a red circle", "a red circle " * 20])["input_ids"][:1], tokens["input_ids"])
    expected = tokenizer("a red circle", padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        alone = model.model.get_text_features(**expected).pooler_output
        assert (model.encode_text(tokens) - alone).abs().max() < 1e-6


def test_models_that_cannot_be_measured_are_refused(saved, tokenizer, tmp_path):
    whole = AutoModel.from_pretrained(saved)
    processor = AutoProcessor.from_pretrained(saved)
    folder = tmp_path / "part"
    processor.save_pretrained(folder)
    FlipForImageClassification(whole.config).save_pretrained(folder)
    with pytest.raises(ValueError, match="has no weights for .* tensors of FlipModel .*both towers"):
        adapter.load_flip(str(folder))
    whole.vision_model.save_pretrained(folder)
    with pytest.raises(ValueError, match="is only a vision tower; `flip-hf evaluate` can probe it"):
        adapter.load_flip(str(folder))
    with pytest.raises(ValueError, match="takes images as pixel_values, pixel_attention_mask, spatial_shapes"):
        adapter.load_flip(str(save_siglip(tmp_path / "patches", tokenizer, Siglip2ImageProcessor)))


def test_without_clip_benchmark_the_command_names_the_install_command(monkeypatch):
    for name in ("clip_benchmark", "clip_benchmark.cli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="error: CLIP_benchmark cannot be imported.*pip install clip-benchmark"):
        adapter.main()


def test_a_numpy_that_clip_benchmark_cannot_count_with_is_named_before_the_evaluation(metrics, monkeypatch):
    def accuracy(*_):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")  # as NumPy 2.4 does

    monkeypatch.setattr(metrics, "accuracy", accuracy)
    with pytest.raises(ImportError, match="does not work with NumPy .*pip install 'numpy<2.4'"):
        adapter.register()
