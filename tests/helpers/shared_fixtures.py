"""Fixtures that every test may use: tiny models, data and a finished run."""

import json
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from flip_hf import FlipConfig, FlipModel, FlipProcessor
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.training.models import make_processor
from tests.helpers.models import IMAGE_SIZE, randomize, tiny_config
from tests.helpers.pairs import shapes_rows, write_tar
from tests.helpers.pretraining import pretrain

# For tensors this small, two threads wait for each other longer than they compute.
torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def samples() -> list[tuple[str, bytes, bytes]]:
    """160 keyed pairs; the caption begins with the key, so that a sample can be recognised."""
    rows = enumerate(shapes_rows(160))
    return [(f"{i:05d}", row["image"]["bytes"], f"{i:05d} {row['caption']}".encode()) for i, row in rows]


@pytest.fixture
def tar_folder(samples, tmp_path) -> Path:
    """Five shards of 32 samples."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard in range(5):
        write_tar(folder / f"shard-{shard:04d}.tar", samples[32 * shard : 32 * (shard + 1)])
    return folder


@pytest.fixture
def image_folder(samples, tmp_path) -> Path:
    """160 JPEG files and their metadata.jsonl."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for key, image, caption in samples:
            (folder / f"{key}.jpg").write_bytes(image)
            metadata.write(json.dumps({"file_name": f"{key}.jpg", "caption": caption.decode()}) + "\n")
    return folder.parent


@pytest.fixture
def parquet_folder(samples, tmp_path) -> Path:
    """Four parquet files."""
    from datasets import Dataset, Features, Image, Value  # seconds, which only these tests need

    folder = tmp_path / "parquet"
    folder.mkdir()
    features = Features({"picture": Image(), "words": Value("string")})
    for part in range(4):
        rows = samples[40 * part : 40 * (part + 1)]
        columns = {"picture": [{"bytes": r[1], "path": None} for r in rows], "words": [r[2].decode() for r in rows]}
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"part-{part}.parquet"))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The embedded data's recipe, shortened to seconds: (folder, what it printed). Tests only read it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # trained once for all workers, in the folder that holds theirs
        shared = shared.parent
    folder = shared / "shapes"
    printed = shared / "shapes.txt"
    with FileLock(shared / "shapes.lock"):
        if not printed.exists():
            run = pretrain(
                "shapes", "--train_samples", "2048", "--unmasked_samples", "512", "--output_dir", str(folder)
            )
            assert run.returncode == 0, run.stderr[-3000:]
            printed.write_text(run.stdout)
    return folder, printed.read_text()
