import json

import pytest
import yaml
from huggingface_hub import HfApi, constants

from flip_hf.training.recipes import parse_arguments
from tests.helpers.hub_server import WRITER, running_hub
from tests.helpers.pretraining import TINY
from tests.helpers.programs import ROOT


@pytest.fixture(autouse=True)
def _nobody(monkeypatch, tmp_path):
    """Whoever runs the tests is not logged in."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
def api(hub, monkeypatch) -> HfApi:
    """The real client, logged in at the local server."""
    # What stores large files behind the Hub (xet) has a protocol of its own; LFS is the client's other way.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.endpoint, token=WRITER)


@pytest.fixture
def run_folder(saved):
    """A folder as a training run leaves it: beside the model recipe, results, logs, a checkpoint, a stranger's file."""
    arguments = parse_arguments(
        [
            "shapes",
            "--train_data",
            "shapes",
            "user/pairs",
            *TINY,
            "--train_samples",
            "4096",
            "--unmasked_samples",
            "512",
        ],
        ROOT / "flip_hf" / "recipes",
        "shapes",
    )
    (saved / "recipe.yaml").write_text(yaml.safe_dump(arguments.to_recipe(), sort_keys=False))
    results = {
        "top1": 0.4375,
        "top5": 0.875,
        "images": 480,
        "sources": {
            "shapes": {"samples": 4000, "refused": {}},
            "user/pairs": {"samples": 608, "refused": {"the image is truncated": 3}},
        },
        "samples": 4608,
        "skipped_steps": 2,
        "seconds": 7200.0,
        "hardware": {"device": "NVIDIA A100-SXM4-80GB", "processes": 4, "watts": 400},
    }
    (saved / "results.json").write_text(json.dumps(results))
    (saved / "log.jsonl").write_text('{"samples": 1024, "loss": 2.5}\n')
    (saved / "training_curves.png").write_bytes(b"\x89PNG not a picture")
    (saved / "logs").mkdir()
    (saved / "logs" / "events.out.tfevents.1").write_bytes(b"\x00\xffevents")
    checkpoint = saved / "checkpoint-000000001024"
    checkpoint.mkdir()
    (checkpoint / "optimizer.bin").write_bytes(b"moments")
    (saved / "notes.py").write_text("print('mine')")
    return saved
