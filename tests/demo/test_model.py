"""The page's requests to a model, without the page: any kind of model, and anything that a visitor may write."""

import os

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from flip_hf import FlipForPreTraining, FlipPreTrainingConfig, ZeroShotClassifier
from flip_hf.demo.answers import comparison_table, read_labels, read_prompt, read_query
from flip_hf.demo.model import DemoModel
from flip_hf.demo.page import make_page
from flip_hf.demo.parts import choose_examples
from flip_hf.demo.search import ImageSearch, Picture, embedded_pictures, fit_to_show, pictures_below
from flip_hf.modeling.masking_flip import num_kept
from tests.helpers.models import DECODER, NUM_PATCHES, tiny_config

LABELS = ("red circle", "blue square", "green star")


@pytest.fixture
def photo(photos) -> Image.Image:
    return Image.effect_noise((70, 50), 60).convert("RGB")


def tabs(page) -> list[str]:
    return [block.label for block in page.blocks.values() if block.get_block_name() == "tabitem"]


def test_whole_images_are_classified_as_the_classifier_does(whole, saved, photo):
    model = DemoModel.from_pretrained(saved)
    (answer,) = model.classify(photo, LABELS, "a photo of a {}.", [0.0], seed=0)
    expected = ZeroShotClassifier.from_pretrained(saved)(photo, LABELS, "a photo of a {}.")
    assert answer == pytest.approx({entry["label"]: entry["score"] for entry in expected}, rel=1e-5)
    assert model.pretraining is None and tabs(make_page(model, embedded_pictures())) == ["What is it?", "Search"]


def test_the_seed_chooses_the_mask_and_nothing_else_does(whole, photo):
    model = DemoModel.from_pretrained(whole)
    first = model.classify(photo, LABELS, "{}", [0.5, 0.75], seed=3)
    torch.rand(7)
    assert model.classify(photo, LABELS[::-1], "{}", [0.75], seed=3)[0] == pytest.approx(first[1], rel=1e-5)
    assert model.classify(photo, LABELS, "{}", [0.75], seed=4)[0] != pytest.approx(first[1], rel=1e-3)
    assert first[0] != pytest.approx(first[1], rel=1e-3)
    assert num_kept(NUM_PATCHES, 0.75) == 4
    with pytest.raises(ValueError, match="keeps none of the 16 patches"):
        model.seen(photo, 0.99, seed=0)


def test_a_clip_model_sees_whole_images(saved, photo, tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**size, "vocab_size": 600, "max_position_embeddings": 16, "eos_token_id": 599}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=24)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    for path in saved.iterdir():
        if "processor" in path.name or "tokenizer" in path.name:
            (tmp_path / "clip" / path.name).write_bytes(path.read_bytes())
    model = DemoModel.from_pretrained(tmp_path / "clip")
    assert not model.knows_masks and model.about().startswith("CLIP, which sees whole images. ")
    (answer,) = model.classify(photo, LABELS, "{}", [0.0], seed=0)
    assert sum(answer.values()) == pytest.approx(1)
    page = make_page(model, embedded_pictures())
    assert tabs(page) == ["What is it?", "Search"]
    classify = next(event.fn for event in page.fns.values() if event.api_name == "classify")
    seen, caption, shown, _ = classify(photo, ", ".join(LABELS), "{}", 50, None)  # as if the hidden slider were moved
    assert caption == "What it answers, of the whole image"
    assert shown == pytest.approx(answer) and seen.tobytes() == fit_to_show(model.seen(photo, 0.0, 0)).tobytes()


def test_a_model_that_only_reconstructs_has_that_tab_alone(processor, photo, tmp_path):
    config = FlipPreTrainingConfig(flip_config=tiny_config(), decoder_config=DECODER, objective="reconstruction")
    FlipForPreTraining(config).save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    model = DemoModel.from_pretrained(tmp_path)
    assert tabs(make_page(model, embedded_pictures())) == ["Reconstruction"]
    original, masked, made = model.reconstruct(photo, 0.75, seed=0)
    assert original.size == masked.size == made.size == (32, 32) and masked.tobytes() != made.tobytes()
    assert model.seen(photo, 0.75, seed=0).tobytes() == masked.tobytes()


def test_models_the_page_cannot_use_are_refused(model, processor, tmp_path):
    model.vision_model.save_pretrained(tmp_path / "tower")
    processor.image_processor.save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="only a vision tower"):
        DemoModel.from_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="it has no config.json"):
        DemoModel.from_pretrained(tmp_path)


def test_a_search_finds_the_picture_that_is_nearest(whole, photos):
    """Pictures that do not exist any more are left out; the others are those of `get_image_features`."""
    pictures = pictures_below(photos)
    assert [picture.name for picture in pictures][:3] == ["blue.PNG", "cut.jpeg", "green.PNG"]
    search = ImageSearch(DemoModel.from_pretrained(whole), pictures)
    seen = []
    embeds = search.encode(lambda *done: seen.append(done))
    assert embeds.shape == (4, 24) and seen == [(0, 6)] and search.reasons() == "1 damaged image, 1 not an image"
    found = search.search("a red circle", 3)
    assert len(found) == 3 and found[0][2] > found[1][2] > found[2][2]
    assert found[0][2] == pytest.approx((embeds @ search.model.embed_text("a red circle")).max().item(), abs=1e-6)
    assert search.encode(lambda *done: seen.append(done)) is embeds and len(seen) == 1
    broken = [picture for picture in pictures if picture.name in ("cut.jpeg", "text.jpg")]
    with pytest.raises(ValueError, match="None of the 2 pictures can be used"):
        ImageSearch(search.model, broken).search("a red circle", 3)
    assert choose_examples(broken) == []


def test_pictures_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="no image files"):
        pictures_below(tmp_path)
    with pytest.raises(ValueError, match="There is no folder"):
        pictures_below(tmp_path / "none")


def test_examples_are_of_several_classes():
    examples = choose_examples(embedded_pictures())
    assert len({example.label for example in examples}) == 6
    assert {fit_to_show(example.image).size for example in examples} == {(256, 256)}
    assert choose_examples([Picture({"bytes": b"none"}, "none")]) == []
    assert fit_to_show(Image.new("RGB", (3000, 100))).size == (512, 17)


def test_a_visitors_input_is_checked():
    assert read_labels(" a cat,a dog\n\na cat, ") == ["a cat", "a dog"]
    for text in ("", " ,\n", None):
        with pytest.raises(ValueError, match="Write the labels"):
            read_labels(text)
    with pytest.raises(ValueError, match="201 labels; the page takes 200"):
        read_labels(",".join(map(str, range(201))))
    assert read_prompt(" a {} ") == "a {}" and read_prompt("clip_80") == "clip_80"
    for prompt in ("", "a", "{} {}", "{0}", "{:>999999999}", "{} {x}", "{{}}", "{}}", None):
        with pytest.raises(ValueError, match="Write {} once"):
            read_prompt(prompt)
    assert read_query(" a cat ") == "a cat"
    with pytest.raises(ValueError, match="Write what to search for"):
        read_query(" ")


def test_a_visitors_input_is_bounded_behind_the_page_too():
    """The fields' own limits hold in a browser alone, not for who calls the page's API."""
    for read, text in ((read_labels, "a," * 5_000_000), (read_prompt, "{}" + "a" * 499), (read_query, "a" * 1001)):
        with pytest.raises(ValueError, match="must not be longer than"):
            read(text)
    for read in (read_labels, read_prompt, read_query):
        with pytest.raises(ValueError, match="must be Unicode text"):
            read("{} \ud800")


def test_a_table_has_the_best_labels_first_and_no_markup_of_a_visitor():
    answers = [{f"<b>{n}</b>": n / 66 for n in range(12)}, {f"<b>{n}</b>": (11 - n) / 66 for n in range(12)}]
    table = comparison_table([0.0, 0.75], answers)
    assert "<b>" not in table and table.index("&lt;b&gt;11&lt;/b&gt;") < table.index("&lt;b&gt;10&lt;/b&gt;")
    assert table.count("<tr>") == 11 and "… and 2 labels less probable for the whole image." in table
    assert "<th>whole image</th><th>75% dropped</th>" in table and ">16.7%<" in table


def test_uploads_are_opened_within_limits(tmp_path):
    """As Gradio hands them over, whether they come from the page or through its API."""
    from types import SimpleNamespace

    import gradio

    from flip_hf.demo.parts import image_input
    from tests.helpers.hostile_pictures import EPS, jpeg_of_scans, png

    with gradio.Blocks():
        component = image_input([])
    os.mkfifo(tmp_path / "fifo")
    uploads = {"scans": (jpeg_of_scans(501, 8), "too many scans"), "eps": (EPS, "not an image")}
    uploads["rows"] = (png(size=(1, 9_000_000)), "oversized image")
    for name, (data, _) in uploads.items():
        (tmp_path / name).write_bytes(data)
    reasons = {name: reason for name, (_, reason) in uploads.items()} | {"fifo": "unreadable image file"}
    for name, reason in reasons.items():
        with pytest.raises(gradio.Error, match=reason):
            component.preprocess(SimpleNamespace(path=str(tmp_path / name)))
    (tmp_path / "strip").write_bytes(png(size=(400_000, 4)))
    assert component.preprocess(SimpleNamespace(path=str(tmp_path / "strip"))).size == (400_000, 4)


def test_a_strip_is_seen_as_its_centre(whole):
    model = DemoModel.from_pretrained(whole)
    assert model.seen(Image.new("RGB", (400_000, 4), "red"), 0.5, 0).size == (32, 32)
