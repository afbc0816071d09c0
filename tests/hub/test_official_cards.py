"""The cards of the official conversions: what the Hub reads of them, and that publishing keeps them."""

import shutil

import pytest
from huggingface_hub import ModelCard

from flip_hf.hub.folder import prepare
from tests.helpers.programs import ROOT

CARDS = {"flip-vit-large-patch16-laion2b": 76.4, "flip-vit-huge-patch14-laion2b": 78.5}


@pytest.mark.parametrize("name", CARDS)
def test_an_official_card_is_read_by_the_hub_and_stays_when_published(name, run_folder, tmp_path):
    path = ROOT / "model_cards" / name / "README.md"
    shutil.copy(path, run_folder)
    ready = prepare(run_folder, tmp_path / "ready", repo_id=f"you/{name}", license="mit")
    assert (ready / "README.md").read_bytes() == path.read_bytes()
    data = ModelCard.load(path).data
    assert data.license == "cc-by-nc-4.0" and data.library_name == "transformers"
    (figure,) = data.eval_results
    assert figure.metric_value == CARDS[name] and not figure.verified and "authors" in figure.source_name
