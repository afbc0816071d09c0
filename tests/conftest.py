"""Tiny models and data that every test may use."""

import itertools
import os

# Of the runs that tests start side by side, threads that wait must not keep a core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nor do their tiny models gain by a second one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from flip_hf import FlipConfig, FlipModel, FlipProcessor
from flip_hf.data.shapes import generate_train
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.training.models import make_processor

# For tensors this small, two threads wait for each other longer than they compute.
torch.set_num_threads(1)

IMAGE_SIZE, PATCH_SIZE = 32, 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2


def tiny_config(text: dict | None = None, vision: dict | None = None, **kwargs) -> FlipConfig:
    """Two blocks a tower; other fields as given."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FlipConfig(
        text_config={**size, "vocab_size": 600, "max_position_embeddings": 16, **(text or {})},
        vision_config={**size, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **(vision or {})},
        **{"projection_dim": 24, **kwargs},
    )


def randomize(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Moves every trainable parameter off its initial value: biases and norms count then."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return model


def shapes_rows(count: int) -> list[dict]:
    """The first rows, at most 512, of the embedded data, without drawing all of them."""
    return list(itertools.islice(generate_train([0], 512, 64, seed=0), count))


# Files that start many programs. Workers take files in the order of their collection (`--no-loadscope-reorder`): begun
# last, one of these would keep a single worker busy after the others have finished.
LONG_FILES = (
    "training/test_kill.py",
    "docs/test_guides.py",
    "modeling/test_export.py",
    "training/test_failures.py",
    "hub/test_published.py",
    "evaluation/test_evaluate.py",
    "training/test_pretrain.py",
    "scripts/test_benchmark.py",
    "training/test_plan.py",
    "training/test_interruptions.py",
    "demo/test_page.py",
    "training/test_distribution.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(places)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def config() -> FlipConfig:
    return tiny_config()


@pytest.fixture
def model(config) -> FlipModel:
    return randomize(FlipModel(config)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.fixture
def texts() -> dict[str, torch.Tensor]:
    """Three texts of 3, 7 and 5 tokens, padded on the right with 0."""
    input_ids = torch.randint(1, 600, (3, 7))
    attention_mask = torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate((3, 7, 5)):
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


@pytest.fixture(scope="session")
def tokenizer():
    return train_wordpiece((row["caption"] for row in shapes_rows(500)), vocab_size=600, context_length=16)


@pytest.fixture
def processor(config, tokenizer) -> FlipProcessor:
    return make_processor(config, tokenizer)


@pytest.fixture
def saved(model, processor, tmp_path):
    """A folder as a training run leaves it."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
