import io
import json
import tarfile
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value

from tests.conftest import shapes_rows


def write_tar(path: Path, samples: list[tuple[str, bytes, bytes]]) -> None:
    """Writes (key, jpeg, caption) triples as a WebDataset shard."""
    with tarfile.open(path, "w") as archive:
        for key, image, caption in samples:
            for extension, data in (("jpg", image), ("txt", caption)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


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
    folder = tmp_path / "parquet"
    folder.mkdir()
    features = Features({"picture": Image(), "words": Value("string")})
    for part in range(4):
        rows = samples[40 * part : 40 * (part + 1)]
        columns = {"picture": [{"bytes": r[1], "path": None} for r in rows], "words": [r[2].decode() for r in rows]}
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"part-{part}.parquet"))
    return folder
