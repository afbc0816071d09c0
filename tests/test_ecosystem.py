"""docs/ecosystem.md as a reader types it: every block in order, in one process, then what its values must be."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from flip_hf import FlipModel, FlipTextModel
from flip_hf.training.models import make_processor
from tests.helpers.models import randomize, tiny_config

PAGE = Path(__file__).parents[1] / "docs" / "ecosystem.md"
LIBRARIES = ("sentence_transformers", "faiss", "peft", "diffusers", "onnxscript", "onnxruntime", "torchao")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A folder that holds `runs/shapes`: a tiny model with weights that nobody has trained."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    one = {"num_hidden_layers": 1}
    model = randomize(FlipModel(tiny_config(text=one, vision=one)))
    model.save_pretrained(folder / "runs" / "shapes")
    make_processor(model.config, tokenizer).save_pretrained(folder / "runs" / "shapes")
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """The names that the page's blocks leave behind."""
    for library in LIBRARIES:
        pytest.importorskip(library)
    names = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for number, block in enumerate(
            re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
        ):
            exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    return names


def close(first, second, atol: float = 1e-5) -> bool:
    return torch.allclose(torch.as_tensor(first).cpu(), torch.as_tensor(second).cpu(), atol=atol)


def test_the_features_used_for_comparison_distinguish_images_and_texts(page):
    images = page["image_features"](page["model"], page["images"][:24])
    texts = page["text_features"](page["model"], page["labels"][:24])
    for features in (images, texts):
        assert close(features.norm(dim=1), torch.ones(24))
        cosines = features @ features.T - torch.eye(24)
        assert cosines.max() < 0.9999


def test_heads_are_new_on_towers_that_are_not(page):
    tower = page["model"].vision_model.state_dict()
    images = page["images"][:2]
    pixels = page["processor"](images=images, return_tensors="pt")
    for name in ("classifier", "of_the_tower"):
        found = page[name].vision_model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in tower.items())
        assert page[name].eval()(**pixels).logits.shape == (2, 24)
    assert close(
        page["image_features"](page["with_decoder"].flip.eval(), images), page["image_features"](page["model"], images)
    )
    assert page["with_decoder"].eval()(**pixels, objective="reconstruction").reconstruction_loss > 0


def test_sentence_transformers_gives_the_models_features(page, folder):
    images = page["images"]
    queries = page["queries"]
    features = page["image_features"](page["model"], images)
    assert close(page["corpus"], features)
    sentences = page["searcher"].encode(queries, normalize_embeddings=True)
    assert close(sentences, page["text_features"](page["model"], queries))
    best = [[hit["corpus_id"] for hit in hits] for hits in page["found"]]
    assert best == (torch.from_numpy(sentences) @ features.T).topk(3).indices.tolist()
    again = page["SentenceTransformer"](str(folder / "runs" / "searcher"))
    assert close(again.encode(images[:2]), page["searcher"].encode(images[:2]), 1e-6)
    images[5].save(folder / "five.png")
    assert close(again.encode([str(folder / "five.png")], normalize_embeddings=True), features[5:6])


def test_the_index_finds_an_image_by_itself(page):
    gallery = page["gallery"]
    features = page["image_features"](page["model"], page["images"])
    assert close(gallery["embedding"][:], features)
    for number in (0, 100, 479):
        scores, nearest = gallery.get_nearest_examples("embedding", features[number].numpy(), k=2)
        assert scores[0] == pytest.approx(1, abs=1e-5) and scores[1] < scores[0]
        assert close(nearest["embedding"][0], features[number])
    text = page["text_features"](page["model"], ["a red circle"])[0]
    assert close(page["scores"], (features @ text).topk(3).values)


def test_adapters_learn_under_masks_and_merge(page, folder):
    losses = page["losses"]
    base = page["model"]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert page["outputs"].ids_keep.shape == (24, 8)  # half of the patches
    assert not (folder / "runs" / "shapes-lora" / "model.safetensors").exists()
    merged = page["merged"]
    images = page["images"][:4]
    assert type(merged) is FlipModel
    learnt = page["image_features"](page["adapted"].eval(), images)
    assert close(page["image_features"](merged, images), learnt, 1e-4)
    assert not close(page["image_features"](base, images), learnt, 1e-2)
    texts = page["captions"][:4]
    assert close(page["text_features"](merged, texts), page["text_features"](page["adapted"], texts), 1e-4)


def test_trainer_learns_unseen_pairs_under_masks(page, folder):
    assert page["after"] < 0.95 * page["before"]
    trainer = page["trainer"]
    assert trainer.state.global_step == 20 and trainer.model.config.mask_ratio == 0.5
    saved = FlipModel.from_pretrained(folder / "runs" / "shapes-dutch")
    images = page["images"][:4]
    assert torch.equal(page["image_features"](saved, images), page["image_features"](trainer.model.eval(), images))


def test_the_painter_reads_flips_text_encoder(page, folder):
    pipe = page["pipe"]
    prompt = "a red circle"
    assert isinstance(page["picture"], Image.Image) and page["picture"].size == (64, 64)
    ids = page["processor"].tokenizer(prompt, padding="max_length", return_tensors="pt")
    encoder = FlipTextModel.from_pretrained(folder / "runs" / "shapes")
    with torch.no_grad():
        expected = encoder(**ids).last_hidden_state
    assert expected.shape == (1, 16, 32)
    assert close(pipe.encode_prompt(prompt, "cpu", 1, False)[0], expected)
    again = page["StableDiffusionPipeline"].from_pretrained(folder / "runs" / "painter")
    assert type(again.text_encoder) is FlipTextModel
    assert close(again.encode_prompt(prompt, "cpu", 1, False)[0], expected)
    # What was saved is the painter before its three steps.
    trained = zip(pipe.unet.parameters(), again.unet.parameters(), strict=True)
    assert all(parameter.isfinite().all() and not torch.equal(parameter, start) for parameter, start in trained)


def test_onnx_programs_give_the_models_features(page):
    model = page["model"]
    normalize = torch.nn.functional.normalize
    images = torch.from_numpy(page["image_embeds"])
    texts = torch.from_numpy(page["text_embeds"])
    assert close(normalize(images, dim=1), page["image_features"](model, page["images"][:7]), 1e-4)
    assert close(normalize(texts, dim=1), page["text_features"](model, page["captions"][:7]), 1e-4)


def test_quantised_models_are_smaller_and_near(page):
    model = page["model"]
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    saved = sum(3 * weight.numel() - 4 * len(weight) for weight in weights)  # a byte of four, and a scale a row
    assert page["size"] == pytest.approx(1 - saved / model.get_memory_footprint(), abs=0.01)
    assert 0.999 < page["cosines"].min() < 0.99999
    images = page["images"][:4]
    quantized = page["image_features"](page["quantized"], images)
    assert close(page["image_features"](page["loaded"], images), quantized)
    texts = page["labels"][:4]
    nearly = page["text_features"](page["loaded"], texts)
    assert close(nearly, page["text_features"](model, texts), 0.02)
    assert not torch.equal(nearly, page["text_features"](model, texts))
    pixels = page["processor"](images=images, return_tensors="pt")
    with torch.no_grad():
        embeds = page["tower"](**pixels).image_embeds
        assert torch.equal(page["again"](**pixels).image_embeds, embeds)
    assert torch.cosine_similarity(embeds, quantized).min() > 0.999


def test_the_pipeline_ranks_as_the_features_do(page):
    answers = page["classify"](page["images"][0], candidate_labels=page["labels"][:5])
    texts = [f"This is a photo of {label}." for label in page["labels"][:5]]
    cosines = page["image_features"](page["model"], page["images"][:1]) @ page["text_features"](page["model"], texts).T
    order = cosines[0].argsort(descending=True)
    assert [answer["label"] for answer in answers] == [page["labels"][number] for number in order]
