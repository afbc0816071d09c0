"""A Space as `demo.py --space` writes it: complete, and its app starts without this repository."""

import os
import runpy
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import gradio
import pytest
from huggingface_hub import SpaceCard

from flip_hf.demo.space import REQUIREMENTS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "demo.py"


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")  # in this process: each start of another takes seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url: str, app: subprocess.Popen) -> str:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url) as answer:
                return answer.read().decode()
        except OSError:
            assert app.poll() is None, app.communicate()[0]
            time.sleep(0.1)
    raise AssertionError("the app does not answer")


def test_a_space_starts_by_itself(whole, photos, tmp_path, monkeypatch, capsys):
    (whole / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# Whole\n")
    run(monkeypatch, whole, "--images", photos, "--space", tmp_path / "space")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'space'}: a Space; `hf upload OWNER/NAME")
    card = SpaceCard.load(tmp_path / "space" / "README.md").data
    assert (card.sdk, card.sdk_version, card.app_file, card.license) == (
        "gradio",
        gradio.__version__,
        "app.py",
        "cc-by-nc-4.0",
    )
    assert len(list((tmp_path / "space" / "images").iterdir())) == 6
    # Without `site`, the packages are there but not what is installed as editable: only the Space's own flip_hf.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "GRADIO_SERVER_PORT": str(free_port())}
    app = subprocess.Popen(
        [sys.executable, "-S", "app.py"],
        cwd=tmp_path / "space",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{environment['GRADIO_SERVER_PORT']}"
        assert "<title>Try whole</title>" in get(url, app)
        settings = get(f"{url}/config", app)
        for tab in ("What is it?", "Search", "Reconstruction"):
            assert f'"label":"{tab}"' in settings
        assert str(ROOT) not in settings and "6 pictures, which the first search encodes" in settings
    finally:
        app.terminate()
        app.communicate()
    with pytest.raises(SystemExit, match="exists already"):
        run(monkeypatch, whole, "--space", tmp_path / "space")


def test_what_a_space_asks_for_is_what_the_package_asks_for():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {*project["dependencies"], *project["optional-dependencies"]["demo"]}
    assert set(REQUIREMENTS) == {line for line in asked if not line.startswith("gradio")}


def test_what_cannot_be_served_ends_in_a_sentence(tmp_path, monkeypatch):
    for arguments, message in (
        ([tmp_path / "none"], "error: "),
        ([tmp_path, "--images", tmp_path / "none"], "error: There is no folder"),
    ):
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, *arguments)
        assert str(end.value).startswith(message)
