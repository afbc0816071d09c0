"""ZeroShotClassifier: the pipeline's answers, with the labels encoded once."""

import functools
import http.server
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel, pipeline

from flip_hf import FlipConfig, FlipModel, ZeroShotClassifier
from flip_hf.evaluation.labels import LabelEmbeddings
from flip_hf.evaluation.templates import prompt_set, resolve_templates
from tests.helpers.hostile_pictures import EPS
from tests.helpers.models import tiny_clip

LABELS = ["red circle", "large striped blue star", "x", "green"]


@pytest.fixture
def pictures(tmp_path) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)) for i in range(5)]
    pictures[0].save(tmp_path / "0.png")
    return pictures


@pytest.fixture
def classifier(saved) -> ZeroShotClassifier:
    return ZeroShotClassifier.from_pretrained(saved)


@pytest.fixture
def encoded(classifier, monkeypatch) -> list[int]:
    """Counts the texts that the model encodes."""
    counts = []
    encode = classifier.model.get_text_features

    def counting(input_ids, **kwargs):
        counts.append(len(input_ids))
        return encode(input_ids, **kwargs)

    monkeypatch.setattr(classifier.model, "get_text_features", counting)
    return counts


def by_label(answer: list[dict]) -> list[float]:
    scores = {entry["label"]: entry["score"] for entry in answer}
    return [scores[label] for label in LABELS]


def test_one_template_gives_the_pipelines_answers(classifier, saved, pictures, tmp_path):
    template = "This is a photo of {}."
    stock = pipeline("zero-shot-image-classification", model=str(saved))
    expected = stock(pictures, candidate_labels=LABELS, hypothesis_template=template)
    answers = classifier(pictures, LABELS, template, batch_size=2)
    for ours, theirs in zip(answers, expected, strict=True):
        assert by_label(ours) == pytest.approx(by_label(theirs), abs=1e-6)
        assert [e["score"] for e in ours] == sorted((e["score"] for e in ours), reverse=True)
    # One image, in every form, gives one answer.
    for image in (pictures[0], tmp_path / "0.png", str(tmp_path / "0.png"), np.asarray(pictures[0])):
        assert by_label(classifier(image, LABELS, template)) == pytest.approx(by_label(answers[0]), abs=1e-6)
    best = classifier(iter(pictures), LABELS, template, top_k=2)[1]
    assert [entry["label"] for entry in best] == [entry["label"] for entry in answers[1][:2]]


def test_a_bias_of_all_logits_changes_no_answer(classifier, saved, pictures, tmp_path):
    """Of a FlipModel trained with the sigmoid loss; the pipeline, too, takes its labels for alternatives."""
    config = FlipConfig.from_pretrained(saved, logit_bias_init_value=-10)
    FlipModel.from_pretrained(saved, config=config).save_pretrained(tmp_path / "biased")
    classifier.processor.save_pretrained(tmp_path / "biased")
    biased = ZeroShotClassifier.from_pretrained(tmp_path / "biased")
    assert biased.model.logit_bias.item() == -10
    expected = by_label(classifier(pictures[0], LABELS, "{}"))
    assert by_label(biased(pictures[0], LABELS, "{}")) == pytest.approx(expected, abs=1e-6)
    stock = pipeline("zero-shot-image-classification", model=str(tmp_path / "biased"))
    answer = stock(pictures[0], candidate_labels=LABELS, hypothesis_template="{}")
    assert by_label(answer) == pytest.approx(expected, abs=1e-6)


def test_templates_are_averaged_as_clip_does(classifier):
    templates = ["a photo of a {}.", "the {}!"]
    means = []
    for label in LABELS:
        inputs = classifier.processor(text=[t.format(label) for t in templates], return_tensors="pt")
        with torch.no_grad():
            embeds = classifier.model.get_text_features(**inputs).pooler_output
        mean = torch.nn.functional.normalize(embeds, dim=1).mean(0)
        means.append(mean / mean.norm())
    weights = classifier.encode_labels(LABELS, templates).weights
    assert (weights - torch.stack(means)).abs().max() < 1e-6


def test_labels_are_encoded_once_and_again_when_the_model_changes(classifier, pictures, encoded):
    for _ in range(3):
        classifier(pictures, LABELS, "clip_7")
    assert sum(encoded) == 7 * len(LABELS)
    before = classifier(pictures[0], LABELS)
    with torch.no_grad():
        classifier.model.text_projection.weight.neg_()
    encoded.clear()
    after = classifier(pictures[0], LABELS)
    assert sum(encoded) == len(LABELS)
    assert by_label(before) != pytest.approx(by_label(after), abs=1e-3)


def test_a_folder_keeps_labels_between_runs(saved, pictures, tmp_path):
    first = ZeroShotClassifier.from_pretrained(saved, cache_dir=tmp_path / "labels")
    expected = first(pictures, LABELS, "clip_7")
    assert [p.suffix for p in (tmp_path / "labels").iterdir()] == [".safetensors"]
    second = ZeroShotClassifier.from_pretrained(saved, cache_dir=tmp_path / "labels")
    second.model.get_text_features = None  # nothing is encoded
    assert second(pictures, LABELS, "clip_7") == expected
    with torch.no_grad():
        first.model.text_projection.weight.mul_(2).add_(1)
    first(pictures, LABELS, "clip_7")
    assert len(list((tmp_path / "labels").iterdir())) == 2  # another model's are kept apart


def test_saved_labels_are_taken_from_the_same_model_only(classifier, pictures, tmp_path):
    embeddings = classifier.encode_labels(LABELS, ["{}", "the {}"])
    embeddings.save(tmp_path / "labels.safetensors")
    loaded = LabelEmbeddings.load(tmp_path / "labels.safetensors")
    assert (loaded.labels, loaded.templates) == (tuple(LABELS), ("{}", "the {}"))
    assert torch.equal(loaded.weights, embeddings.weights)
    assert classifier(pictures, loaded) == classifier(pictures, LABELS, ["{}", "the {}"])
    with torch.no_grad():
        classifier.model.text_model.final_layer_norm.bias.add_(1)
    with pytest.raises(ValueError, match="made by another model"):
        classifier(pictures, loaded)


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"weights": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold label embeddings: its format is not"):
        LabelEmbeddings.load(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="does not hold label embeddings"):
        LabelEmbeddings.load(tmp_path / "broken.safetensors")


def test_prompt_sets_are_clips():
    assert [len(set(prompt_set(name))) for name in ("clip_1", "clip_7", "clip_80")] == [1, 7, 80]
    assert prompt_set("clip_1") == ("a photo of a {}.",)
    assert set(prompt_set("clip_7")) < set(prompt_set("clip_80"))
    assert all(template.count("{}") == 1 for template in prompt_set("clip_80"))


def test_invalid_requests_are_refused(classifier, pictures):
    with pytest.raises(ValueError, match="'clip_70' has no {} for the label. Sets of templates are clip_1"):
        resolve_templates("clip_70")
    with pytest.raises(ValueError, match="at least one template"):
        resolve_templates([])
    refused = (("a cat, a dog", r"got the text 'a cat, a dog': give \['a cat', 'a dog'\]"), ([], "give at least one"))
    refused += ((["a", "a"], "each label once"), (["a", ""], "Label 2 of 2 is empty"))
    for labels, said in refused:
        with pytest.raises(ValueError, match=said):
            classifier(pictures, labels)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["red circle", "\u732b", "\u72d7"], ["'\u732b' and '\u72d7', so"]),
        (["red circle", *"\u732b\u72d7\u9ce5"], ["(nor others: 3 of 4 names)"]),
        (["red circle", "\u732b", "Red circle"], []),
    ],
)
def test_labels_that_a_tokenizer_confuses_are_said(classifier, labels, said, caplog):
    classifier.encode_labels(labels)
    assert len(caplog.records) == len(said) and all(each in caplog.text for each in said)


def test_labels_may_be_an_array(classifier, pictures):
    assert classifier(pictures[0], np.array(LABELS)) == classifier(pictures[0], LABELS)


def test_a_clip_is_served_too_and_a_siglip_is_not(processor, pictures):
    clip = tiny_clip(99)
    clip.text_model.resize_token_embeddings(600)
    stock_processor = CLIPProcessor(processor.image_processor, processor.tokenizer)
    stock_processor.image_processor.size = stock_processor.image_processor.crop_size = {"height": 48, "width": 48}
    answers = ZeroShotClassifier(clip, stock_processor)(pictures, LABELS, "{}")
    flip = FlipModel.from_clip(clip)
    assert isinstance(clip, CLIPModel)
    expected = ZeroShotClassifier(flip, processor)(pictures, LABELS, "{}")
    assert [by_label(a) for a in answers] == [pytest.approx(by_label(e), abs=1e-6) for e in expected]
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipModel(SiglipConfig(text_config={**size, "vocab_size": 50}, vision_config=size))
    with pytest.raises(ValueError, match="SigLIP.*`flip-hf convert siglip"):
        ZeroShotClassifier(siglip, processor)


def test_pictures_are_opened_within_limits(classifier, tmp_path):
    """Of extreme shape, in every form, one is cut before it is enlarged; what is no file or no picture is named."""
    strip = Image.new("RGB", (600_000, 1), "red")
    strip.save(tmp_path / "strip.png")
    answers = classifier([strip, np.asarray(strip), tmp_path / "strip.png", Image.new("RGB", (8, 8), "red")], LABELS)
    for answer in answers[:3]:
        assert by_label(answer) == pytest.approx(by_label(answers[3]), abs=1e-6)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "eps.jpg").write_bytes(EPS)
    for name, message in (("fifo.png", "cannot be read: Not a regular file"), ("eps.jpg", "is not an image")):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            classifier(tmp_path / name, LABELS)


def test_pictures_at_an_address_are_opened_by_the_same_door(classifier, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert classifier(f"{url}/red.png", LABELS) == classifier(tmp_path / "red.png", LABELS)
        with pytest.raises(ValueError, match="none.png cannot be read"):
            classifier(f"{url}/none.png", LABELS)
        server.shutdown()
