"""Saved folders through Transformers' own pipelines, with this package and without it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForTextEncoding,
    AutoModelForZeroShotImageClassification,
    pipeline,
)
from transformers.utils import is_torchvision_available

import flip_hf
from flip_hf import (
    FlipForImageClassification,
    FlipForPreTraining,
    FlipModel,
    FlipTextModel,
    FlipTextModelWithProjection,
    FlipVisionModel,
    FlipVisionModelWithProjection,
)
from tests.helpers.models import NUM_PATCHES

LABELS = ["red circle", "large striped blue star", "x"]


def test_zero_shot_pipeline_gives_the_models_scores(folders, image):
    classifier = pipeline("zero-shot-image-classification", model=folders["full"])
    answer = {entry["label"]: entry["score"] for entry in classifier(image, candidate_labels=LABELS)}
    prompts = [f"This is a photo of {label}." for label in LABELS]
    inputs = {**classifier.tokenizer(prompts, padding=True, return_tensors="pt")}
    inputs |= classifier.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        expected = FlipModel.from_pretrained(folders["full"])(**inputs).logits_per_image.softmax(dim=1)[0]
    assert [answer[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-5)


def test_labels_do_not_depend_on_their_neighbours_padding(folders, image):
    classifier = pipeline("zero-shot-image-classification", model=folders["full"])
    ratios = []
    for labels in (LABELS, [*LABELS, "blue star " * 4]):
        score = {e["label"]: e["score"] for e in classifier(image, candidate_labels=labels)}
        ratios.append(score["red circle"] / score["x"])
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)


def test_classification_and_feature_pipelines(folders, image):
    answer = pipeline("image-classification", model=folders["classifier"])(image)
    assert {entry["label"] for entry in answer} == {"LABEL_0", "LABEL_1", "LABEL_2"}
    features = np.array(pipeline("image-feature-extraction", model=folders["tower"])(image))
    assert features.shape == (1, 1 + NUM_PATCHES, 32)
    from_full = FlipVisionModel.from_pretrained(folders["full"])
    processor = pipeline("image-feature-extraction", model=folders["tower"]).image_processor
    extract = pipeline("image-feature-extraction", model=from_full, image_processor=processor)
    assert np.allclose(extract(image), features, atol=1e-6)
    assert np.array(extract(image, pool=True)).shape == (1, 32)


def test_auto_classes_know_flip(folders):
    assert type(AutoModel.from_pretrained(folders["full"])) is FlipModel
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(folders["full"])) is FlipModel
    assert type(AutoModel.from_pretrained(folders["tower"])) is FlipVisionModel
    classifier = AutoModelForImageClassification.from_pretrained(folders["full"], num_labels=7)
    assert type(classifier) is FlipForImageClassification and classifier.classifier.out_features == 7


@pytest.mark.parametrize(
    ("model_class", "encoder_class"),
    [
        (FlipTextModel, FlipTextModel),
        (FlipTextModelWithProjection, FlipTextModel),
        (FlipVisionModel, None),
        (FlipVisionModelWithProjection, None),
    ],
)
def test_a_tower_is_loaded_as_it_was_saved(folders, model_class, encoder_class, tmp_path):
    """With its projection if it has one; the text encoder of other models needs none."""
    tower = model_class.from_pretrained(folders["full"])
    tower.save_pretrained(tmp_path / "part")
    loaded = AutoModel.from_pretrained(tmp_path / "part")
    assert type(loaded) is model_class
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in tower.state_dict().items())
    auto_map = json.loads((tmp_path / "part" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == f"modeling_flip.{model_class.__name__}"
    if encoder_class is not None:
        assert type(AutoModelForTextEncoding.from_pretrained(tmp_path / "part")) is encoder_class
        assert auto_map["AutoModelForTextEncoding"] == f"modeling_flip.{encoder_class.__name__}"


def test_a_saved_folder_names_every_auto_class_it_answers_to(folders, tmp_path):
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_flip.FlipConfig",
        "AutoModel": "modeling_flip.FlipModel",
        "AutoModelForZeroShotImageClassification": "modeling_flip.FlipModel",
        "AutoModelForImageClassification": "modeling_flip.FlipForImageClassification",
    }
    # A classifier made from it does not claim to be the full model.
    FlipForImageClassification.from_pretrained(folders["full"], num_labels=2).save_pretrained(tmp_path / "again")
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert "AutoModel" not in auto_map and "AutoModelForImageClassification" in auto_map


WITHOUT_PACKAGE = """
import json, sys
sys.path.insert(0, sys.argv[5])
from recorder import record
lines = record()
sys.modules["flip_hf"] = None  # any import of it fails
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining, AutoModelForTextEncoding
from transformers import AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
folders = json.loads(sys.argv[1])
try:
    AutoModel.from_pretrained(folders["full"])
    unasked = "loaded"
except ValueError as error:
    unasked = str(error)
options = {"trust_remote_code": True}
zero_shot = pipeline("zero-shot-image-classification", model=folders["full"], **options)
new_head = AutoModelForImageClassification.from_pretrained(folders["full"], num_labels=7, **options)
answers = {
    "warnings": lines,
    "unasked": unasked,
    "zero_shot": zero_shot(sys.argv[2], candidate_labels=json.loads(sys.argv[3])),
    "classes": pipeline("image-classification", model=folders["classifier"], **options)(sys.argv[2]),
    "features": pipeline("image-feature-extraction", model=folders["tower"], **options)(sys.argv[2]),
    "pretraining": AutoModelForPreTraining.from_pretrained(folders["pretraining"], **options).num_parameters(),
    "processor": type(AutoProcessor.from_pretrained(folders["full"], **options)).__name__,
    "new_head": list(new_head.classifier.weight.shape),
    "texts": type(AutoModelForTextEncoding.from_pretrained(folders["texts"], **options)).__name__,
    "projected": type(AutoModel.from_pretrained(folders["texts"], **options)).__name__,
    "official": type(AutoImageProcessor.from_pretrained(folders["official"], **options)).__name__,
}
zero_shot.model.save_pretrained(sys.argv[4])  # what was loaded as remote code is published again
print("ANSWERS " + json.dumps(answers))
"""


def test_folders_work_without_this_package_where_their_code_is_trusted(folders, image, tmp_path):
    script = [
        WITHOUT_PACKAGE,
        json.dumps(folders),
        str(tmp_path / "image.png"),
        json.dumps(LABELS),
        str(tmp_path / "re"),
        str(Path(__file__).parents[1] / "helpers" / "recording"),
    ]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", *script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,  # nobody there to be asked
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = json.loads(run.stdout.split("ANSWERS ")[1])
    new_heads = [line for line in answers["warnings"] if "LOAD REPORT" in line]
    assert len(new_heads) == 1 and "classifier.weight" in new_heads[0] and "layers" not in new_heads[0]
    assert answers["warnings"] == new_heads
    assert "trust_remote_code" in answers["unasked"]
    here = pipeline("zero-shot-image-classification", model=folders["full"])(image, candidate_labels=LABELS)
    for there, ours in zip(answers["zero_shot"], here, strict=True):
        assert there["label"] == ours["label"] and there["score"] == pytest.approx(ours["score"], abs=1e-5)
    features = pipeline("image-feature-extraction", model=folders["tower"])(image)
    assert np.allclose(answers["features"], features, atol=1e-5)
    assert answers["pretraining"] == FlipForPreTraining.from_pretrained(folders["pretraining"]).num_parameters()
    assert answers["processor"] == "FlipProcessor"
    assert answers["new_head"] == [7, 32]
    assert answers["texts"] == "FlipTextModel" and answers["projected"] == "FlipTextModelWithProjection"
    assert answers["official"] == ("FlipImageProcessor" if is_torchvision_available() else "FlipImageProcessorPil")
    assert (tmp_path / "re" / "modeling_flip.py").is_file()


def test_the_public_names_are_exported():
    for name in flip_hf.__all__:
        assert getattr(flip_hf, name).__module__.startswith(("flip_hf.modeling", "flip_hf.evaluation"))
