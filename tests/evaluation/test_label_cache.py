"""Class embeddings on disk are found by the content of all that decides them, and never in place of others."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from flip_hf.evaluation import label_cache
from flip_hf.evaluation.label_cache import LabelCache, default_folder
from flip_hf.evaluation.labels import LabelEmbeddings
from tests.helpers.clip_folder import make_clip_folder
from tests.helpers.evaluating import evaluated

LABELS = ("red circle", "blue square")
TEMPLATES = ("a {}.",)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "clip"
    make_clip_folder(folder)
    return folder


@pytest.fixture
def cache(clip, tmp_path) -> Callable[..., LabelCache]:
    """Makes the cache of the model, after a change to it or to its tokenizer."""

    def make(change: Callable[..., object] = lambda model, tokenizer: None, summed: str = "stacked") -> LabelCache:
        model = AutoModel.from_pretrained(clip)
        tokenizer = AutoTokenizer.from_pretrained(clip)
        change(model, tokenizer)
        return LabelCache(tmp_path / "labels", model, tokenizer, summed)

    return make


def kept(
    cache: LabelCache, *, labels: tuple[str, ...] = LABELS, templates: tuple[str, ...] = TEMPLATES
) -> torch.Tensor:
    weights = torch.randn(len(labels), 32)
    cache.save(LabelEmbeddings(labels, templates, weights, cache.fingerprint))
    return weights


def change_weight(model, tokenizer) -> None:
    model.text_projection.weight.data[0, 0] += 1e-6


def change_settings(model, tokenizer) -> None:
    model.config.text_config.eos_token_id += 1


def change_tokenizer(model, tokenizer) -> None:
    tokenizer.add_tokens(["circle"])


def change_length(model, tokenizer) -> None:
    tokenizer.model_max_length = 8


def change_type(model, tokenizer) -> None:
    model.bfloat16()


def test_what_was_kept_is_found_again(cache):
    weights = kept(cache())
    found = cache().load(LABELS, TEMPLATES)
    assert found is not None and torch.equal(found.weights, weights)


@pytest.mark.parametrize("change", [change_weight, change_settings, change_tokenizer, change_length, change_type])
def test_another_model_or_tokenizer_finds_nothing(change, cache):
    kept(cache())
    assert cache(change).load(LABELS, TEMPLATES) is None


def test_other_labels_prompts_and_sums_find_nothing(cache):
    kept(cache())
    assert cache().load(LABELS[::-1], TEMPLATES) is None
    assert cache().load(LABELS, ("a photo of a {}.",)) is None
    assert cache(summed="one by one").load(LABELS, TEMPLATES) is None


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_not_taken(damage, cache, caplog):
    kept(cache())
    kept(cache(), labels=("a", "b"))
    first, second = sorted(cache().folder.iterdir())
    whole = first.read_bytes(), second.read_bytes()
    for path, other in zip((first, second), reversed(whole), strict=True):
        path.write_bytes(other[:50] if damage == "cut" else other)
    assert cache().load(LABELS, TEMPLATES) is None
    assert "encoded again" in caplog.text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{\\"labels\\": [', b'{\\"LABELS\\": ['),
        (b'"fingerprint\\"', b'"FINGERPRINT\\"'),
        (b"\0\0\x80\x3f", b"\0\0\0\x3f"),
        (b'"F32"', b'"I32"'),
    ],
    ids=["no labels", "no fingerprint", "another number", "another type"],
)
def test_a_file_of_other_content_is_not_taken(before, after, cache, caplog):
    cache().save(LabelEmbeddings(LABELS, TEMPLATES, torch.ones(2, 32), cache().fingerprint))
    (path,) = cache().folder.iterdir()
    whole = path.read_bytes()
    assert before in whole
    path.write_bytes(whole.replace(before, after, 1))
    assert cache().load(LABELS, TEMPLATES) is None
    assert "encoded again" in caplog.text


def test_a_folder_that_no_file_system_has_is_only_warned_of(clip, tmp_path, caplog):
    model = AutoModel.from_pretrained(clip)
    cache = LabelCache(tmp_path / ("a" * 300), model, AutoTokenizer.from_pretrained(clip), "stacked")
    assert cache.load(LABELS, TEMPLATES) is None
    assert "encoded again" in caplog.text


def test_the_files_unused_for_longest_are_removed(cache, monkeypatch):
    for number, labels in enumerate((("a",), ("b",), ("c",))):
        kept(cache(), labels=labels)
        for path in cache().folder.iterdir():
            if path.stat().st_mtime > 10:
                os.utime(path, (number, number))
    assert cache().load(("a",), TEMPLATES) is not None
    monkeypatch.setattr(label_cache, "MAX_BYTES", 3 * path.stat().st_size)
    kept(cache(), labels=("d",))
    assert [cache().load((name,), TEMPLATES) is not None for name in "abcd"] == [True, False, True, True]


def test_a_folder_that_cannot_be_written_is_only_warned_of(clip, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    model = AutoModel.from_pretrained(clip)
    kept(LabelCache(tmp_path / "file" / "labels", model, AutoTokenizer.from_pretrained(clip), "stacked"))
    assert "could not be kept" in caplog.text


def test_the_folder_is_below_the_variable_or_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("FLIP_HF_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "labels"
    monkeypatch.setenv("FLIP_HF_CACHE", "~/kept")
    assert default_folder() == Path.home() / "kept" / "labels"
    monkeypatch.setenv("FLIP_HF_CACHE", "")
    assert default_folder() is None
    monkeypatch.delenv("FLIP_HF_CACHE")
    assert default_folder().parts[-2:] == ("flip_hf", "labels")


def test_a_second_evaluation_takes_the_kept_embeddings_and_says_the_same(clip, colours, tmp_path, monkeypatch):
    monkeypatch.setenv("FLIP_HF_CACHE", str(tmp_path / "cache"))
    first = evaluated(tmp_path / "first", clip, *colours)
    (path,) = (tmp_path / "cache" / "labels").iterdir()
    assert evaluated(tmp_path / "second", clip, *colours)["results"] == first["results"]
    found = LabelEmbeddings.load(path)
    # Others in their place give other results, so it is these that are taken.
    shuffled = LabelEmbeddings(found.labels, found.templates, found.weights.roll(1, 0), found.fingerprint)
    shuffled.save(path)
    assert evaluated(tmp_path / "third", clip, *colours)["results"] != first["results"]
    shutil.rmtree(tmp_path / "cache")
