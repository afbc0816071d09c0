"""zero_shot.py as a user runs it."""

import os
import re

import pytest
from PIL import Image

from tests.helpers.hostile_pictures import jpeg_of_scans
from tests.helpers.programs import ROOT, run_program

SCRIPT = ROOT / "scripts" / "zero_shot.py"


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (64, 64), (235, 55, 55)).save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_zero_shot_prints_an_answer_a_person_can_read(trained, picture):
    done = run_program(SCRIPT, trained[0], picture, picture, "--labels", "red circle", "blue square")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and lines[0].startswith(f"{picture}: ")
    best, second = (float(re.search(r"([\d.]+)%", line).group(1)) for line in lines[1:3])
    assert best >= second and best + second == pytest.approx(100, abs=0.2)
    assert lines[0].endswith(" ".join(lines[1].split()[:2]))


def test_zero_shot_names_unreadable_inputs(trained, tmp_path, picture):
    (tmp_path / "text.jpg").write_text("no image")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "scans.jpg").write_bytes(jpeg_of_scans(501, 8))
    cases = [
        ([str(trained[0]), str(tmp_path / "text.jpg"), "--labels", "a", "b"], "text.jpg is not an image"),
        ([str(trained[0]), str(tmp_path / "none.jpg"), "--labels", "a", "b"], "none.jpg cannot be read: No such file"),
        (
            [str(trained[0]), str(tmp_path / "fifo.jpg"), "--labels", "a", "b"],
            "fifo.jpg cannot be read: Not a regular file",
        ),
        ([str(trained[0]), str(tmp_path), "--labels", "a", "b"], "is a folder; name the pictures in it, such as /"),
        (
            [str(trained[0]), str(tmp_path / "scans.jpg"), "--labels", "a", "b"],
            "scans.jpg cannot be used: too many scans.",
        ),
        ([str(trained[0]), picture, "--labels", "a", "b", "--template", "x"], "no {} for the label"),
        ([str(tmp_path), picture, "--labels", "a", "b"], "cannot be loaded"),
    ]
    for argv, message in cases:
        done = run_program(SCRIPT, *argv)
        assert done.returncode != 0 and message in done.stderr, (argv, done.stderr[-500:])
        assert "Traceback" not in done.stderr


def test_unusable_pictures_do_not_cost_the_others_their_answers(trained, picture, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    pictures = [str(tmp_path / "text.jpg"), picture, str(tmp_path / "none.jpg")]
    done = run_program(SCRIPT, trained[0], *pictures, "--labels", "red circle", "blue square")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 3 and done.stdout.startswith(f"{picture}: ")
    assert done.stderr.count("error: ") == 1 and "text.jpg is not an image. " in done.stderr
    assert "none.jpg cannot be read: No such file or directory." in done.stderr
