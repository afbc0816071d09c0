"""Hostile files by the thousand: each is answered within its bounds, and none ends a run.

`FLIP_HF_FUZZ=10000 pytest -s tests/data/test_fuzz.py` is the long form; without it there are 300. They are real
pictures of every format with bits flipped, parts cut, doubled and exchanged, sizes in headers replaced, and the small
files of hostile_pictures.py that ask for much; captions that are no text; and the tar archives around them, spoilt
alike.
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.hostile_pictures import EPS, HOSTILE
from tests.helpers.pretraining import PRETRAIN, TINY
from tests.helpers.programs import ROOT, run_program
from tests.helpers.spoiling import spoil

COUNT = int(os.environ.get("FLIP_HF_FUZZ", "300"))
KINDS = {
    "JPEG": {"quality": 80},
    "PNG": {},
    "WEBP": {"quality": 60},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
    "ICO": {},
    "TGA": {},
    "AVIF": {},
}
# Each decode in a process of its own limits: seconds and bytes that a sample may take, whatever is in it.
SECONDS = 1.0
BYTES = 2 * 2**30
MEASURE = """
import resource, sys, time, tarfile, warnings
import numpy as np, torch
from flip_hf.data.decode import RefusedSample, choose_caption
from flip_hf.data.transforms import TrainTransform
warnings.simplefilter("error")
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]),) * 2)
transform, slowest, refused, used = TrainTransform(), (0.0, ""), {}, 0
with tarfile.open(sys.argv[1]) as archive:
    for member in archive:
        data = archive.extractfile(member).read()
        start = time.process_time()
        try:
            if member.name.endswith("txt"):
                choose_caption(data, np.random.default_rng(0))
            else:
                transform(data, np.random.default_rng(0), 32)
            used += 1
        except RefusedSample as error:
            refused[error.reason] = refused.get(error.reason, 0) + 1
        slowest = max(slowest, (time.process_time() - start, member.name))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{used} used, {sum(refused.values())} refused {refused}")
print(f"slowest {slowest[0]:.2f} s ({slowest[1]}), {peak / 1e6:.2f} GB")
assert slowest[0] < float(sys.argv[3]), slowest
"""


def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((120, 90))
    found = []
    for kind, options in KINDS.items():
        for mode in ("RGB", "L", "RGBA", "P", "CMYK"):
            buffer = io.BytesIO()
            try:
                smooth.convert(mode).save(buffer, kind, **options)
            except (OSError, KeyError, ValueError):
                continue  # a format that has not this mode
            found.append(buffer.getvalue())
    progressive = io.BytesIO()
    smooth.save(progressive, "JPEG", progressive=True)
    return [*found, progressive.getvalue()]


def captions(rng: np.random.Generator) -> bytes:
    text = ["a red circle", "", " ", "\ud7ff", "x" * 9000, "é" * 5000, "a\0b", "\u202e\u200b", "[1, 2", "🟥" * 999]
    data = text[int(rng.integers(len(text)))].encode()
    return spoil(data, rng, [data or b"x"]) if rng.random() < 0.5 else data


def hostile_files() -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(7)
    sound = pictures()
    special = [*(make() for _, make in HOSTILE.values()), EPS, b"", b"<html>404</html>"]
    files = []
    for number in range(COUNT):
        if number < len(special):
            data = special[number]
        else:
            data = spoil(sound[int(rng.integers(len(sound)))], rng, sound)
        files.append((f"{number:06d}.jpg", data))
        files.append((f"{number:06d}.txt", captions(rng)))
    return files


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in hostile_files():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_each_hostile_file_is_answered_within_its_bounds(archive, tmp_path):
    """Processor time and memory that decoding takes; whatever is raised but a refusal ends the script."""
    (tmp_path / "measure.py").write_text(MEASURE)
    run = run_program(tmp_path / "measure.py", archive, BYTES, SECONDS)
    print(run.stdout)
    assert run.returncode == 0, run.stderr[-3000:]


def test_hostile_files_end_no_run(archive, samples, tmp_path):
    """A run that meets all of them, and archives that are themselves spoilt, beside good ones comes to its end."""
    rng = np.random.default_rng(3)
    folder = tmp_path / "tars"
    folder.mkdir()
    data = archive.read_bytes()
    (folder / "hostile.tar").write_bytes(data)
    for number in range(4):
        part = data[: min(len(data), 300_000)]
        (folder / f"spoilt-{number}.tar").write_bytes(spoil(part, rng, [part[:5000]]))
    with tarfile.open(folder / "good.tar", "w") as tar:
        for key, image, caption in samples:
            for extension, content in (("jpg", image), ("txt", caption)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    run = run_program(
        *(PRETRAIN, "--train_data", folder, "--output_dir", tmp_path / "run", *TINY, "--precision", "fp32"),
        *("--batch_size", 16, "--train_samples", 2 * COUNT, "--shuffle_block", 64, "--num_workers", 1),
        *("--max_bad_fraction", 1, "--report_to", "none", "--log_samples", 10**6, "--checkpoint_samples", 0),
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    print(next(line for line in run.stdout.splitlines() if line.startswith("Skipped")))
