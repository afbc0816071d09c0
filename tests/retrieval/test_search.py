"""`flip-hf search` in the features of a small data set: what it finds, draws and refuses."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from flip_hf.commands.main import main as program
from flip_hf.commands.search import main
from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.nearest import nearest
from flip_hf.retrieval.search import EmbeddedData
from tests.helpers.embedding import embedded, features_of


@pytest.fixture(scope="module")
def features(clip, tars, tmp_path_factory):
    """A folder of features, which tests only read."""
    folder = tmp_path_factory.mktemp("features") / "out"
    embedded(clip, tars, folder)
    return folder


@pytest.fixture
def own(features, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(features, tmp_path / "own")


def test_the_nearest_are_those_of_a_whole_sort():
    rng = np.random.default_rng(0)
    answers = rng.integers(-2, 3, (50, 3)).astype(np.float16)  # with many equal products
    queries = rng.integers(-2, 3, (4, 3)).astype(np.float32)
    products = queries @ answers.astype(np.float32).T
    expected = np.argsort(-products, axis=1, kind="stable")
    for count in (1, 7, 50, 60):
        scores, numbers = nearest(queries, np.split(answers, [1, 20, 20]), count)
        assert np.array_equal(numbers, expected[:, :count])
        assert np.array_equal(scores, np.take_along_axis(products, numbers, axis=1))


def test_texts_rank_all_pictures_by_cosine(clip, features):
    texts = ["a red circle", "a blue square"]
    found = EmbeddedData(features).search(Encoder.from_pretrained(clip).texts(texts).numpy(), 59)
    cosines = Encoder.from_pretrained(clip).texts(texts).numpy() @ features_of(features).astype(np.float32).T
    for hits, row in zip(found, cosines, strict=True):
        assert np.allclose([hit.score for hit in hits], np.sort(row)[::-1], atol=1e-6)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_index_finds_what_an_exact_search_finds(kind, clip, tars, own):
    assert embedded(clip, tars, own, "--index", kind)["index"]["kind"] == kind
    queries = features_of(own).astype(np.float32)[:10]
    by_index = EmbeddedData(own).search(queries, 5)
    exact = EmbeddedData(own, exact=True).search(queries, 5)
    assert [[hit.key for hit in hits] for hits in by_index] == [[hit.key for hit in hits] for hits in exact]


def test_a_picture_finds_itself_first(features, samples, tmp_path, capsys):
    (tmp_path / "asked.jpg").write_bytes(samples[42][1])
    main([str(features), "--image", str(tmp_path / "asked.jpg"), "--top", "3"])
    asked, first, *_ = capsys.readouterr().out.splitlines()
    assert asked == str(tmp_path / "asked.jpg")
    assert first.split(maxsplit=2) == ["1.000", "00042", samples[42][2].decode()]


def test_what_is_found_is_drawn(features, tmp_path):
    main([str(features), "a red circle", "a star", "--top", "4", "--output", str(tmp_path / "hits.png")])
    with Image.open(tmp_path / "hits.png") as drawn:
        assert drawn.width > 2 * drawn.height > 0  # five columns, two rows


def refusal(capsys, *words: object) -> str:
    with pytest.raises(SystemExit):
        main([*map(str, words)])
    return capsys.readouterr().err


def test_only_finished_and_whole_folders_are_searched(own, tmp_path, capsys):
    assert "There is no file" in refusal(capsys, tmp_path, "a")
    manifest = json.loads((own / "embeddings.json").read_text())
    (own / "embeddings.json").write_text(json.dumps({**manifest, "finished": False}))
    assert "is not finished" in refusal(capsys, own, "a")
    (own / "embeddings.json").write_text(json.dumps(manifest))
    (own / "part-00001-00000.parquet").unlink()
    assert "lacks part-00001-00000.parquet" in refusal(capsys, own, "a")


def test_only_the_features_own_model_is_taken(features, clip, tmp_path, capsys):
    other = shutil.copytree(clip, tmp_path / "other")
    config = json.loads((other / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (other / "processor_config.json").write_text(json.dumps(config))
    said = refusal(capsys, features, "a", "--model", other)
    assert "is not the model of these features: its image_processor differ" in said


def test_a_text_without_tokens_is_refused(saved, tars, tmp_path, capsys):
    embedded(saved, tars, tmp_path / "out")
    assert "tokenizer knows no word of the text" in refusal(capsys, tmp_path / "out", "a", "")


def test_an_index_that_was_changed_is_not_opened(clip, tars, own, capsys):
    embedded(clip, tars, own, "--index", "flat")
    (own / "index.faiss").write_bytes((own / "index.faiss").read_bytes()[:-1] + b"?")
    assert "build it again with `flip-hf embed" in refusal(capsys, own, "a")


def test_without_faiss_the_extra_is_named(clip, tars, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SystemExit):
        program(["embed", str(clip), str(tars), str(tmp_path / "out"), "--index", "flat"])
    assert "needs faiss, which is not installed: pip install 'flip_hf[search]'" in capsys.readouterr().err
