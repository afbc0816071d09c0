"""The site is built, and whatever leads nowhere is an error."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.programs import ROOT

pytest.importorskip("mkdocs")
BUILT = ("mkdocs.yml", "pyproject.toml", "docs/pages.py", "docs/reference.py")
MODULE = '''"""Opens doors.

See [`Door`], [`~Door.open`] and [`door.shut`].
"""

LIMIT = 3


class Door:
    """A door."""

    def open(self) -> None:
        """Opens it, at most [`LIMIT`] times."""


def shut(door: Door) -> None:
    """Shuts what [`Door.open`] has opened.

    Args:
        door: the one.
    """
'''
FILES = {
    "README.md": "# Doors\n\n[guide](docs/guide.md#how-to-open-one), [script](scripts/door.py), [folder](scripts)\n",
    "docs/guide.md": "# Guide\n\n## How to open one\n\n[back](../README.md), ![door](figures/door.png) `[x](y.md)`\n",
    "docs/figures/door.png": "",
    "scripts/door.py": "",
    "flip_hf/__init__.py": '"""Doors."""\n\nfrom flip_hf.door import Door\n\n__all__ = ["Door"]\n',
    "flip_hf/door.py": MODULE,
    "flip_hf/rooms/__init__.py": '"""Rooms."""\n',
    "flip_hf/rooms/index.py": '"""Lists the rooms."""\n',
}


def build(folder: Path) -> subprocess.CompletedProcess:
    """Builds the site of a small project with our configuration."""
    for name in BUILT:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    settings = folder / "mkdocs.yml"
    text = settings.read_text(encoding="utf-8")
    # The navigation names pages of ours.
    settings.write_text(
        re.sub(r"(?ms)^nav:.*?(?=^#)", "nav:\n  - README.md\n  - docs/guide.md\n", text), encoding="utf-8"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(text)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project whose links all lead somewhere, with its site."""
    folder = tmp_path_factory.mktemp("doors")
    write(folder, FILES)
    built = build(folder)
    assert built.returncode == 0, built.stderr
    return folder


def test_links_lead_to_pages_entries_and_the_repository(project):
    home = (project / "site" / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]+)">(?:guide|script|folder)</a>', home)
    address = "https://github.example/ADDRESS/flip_hf"
    assert links == [
        "docs/guide.html#how-to-open-one",
        f"{address}/blob/main/scripts/door.py",
        f"{address}/tree/main/scripts",
    ]
    assert (project / "site" / "docs" / "figures" / "door.png").is_file()

    door = (project / "site" / "reference" / "flip_hf" / "door.html").read_text(encoding="utf-8")
    references = re.findall(r'<a [^>]*href="([^"]+)"><code>([\w.]+)</code></a>', door)
    assert references == [
        ("#flip_hf.door.Door", "Door"),
        ("#flip_hf.door.Door.open", "open"),
        ("#flip_hf.door.shut", "door.shut"),
        ("#flip_hf.door", "LIMIT"),  # a constant has no entry of its own
        ("#flip_hf.door.Door.open", "Door.open"),
    ]
    package = (project / "site" / "reference" / "flip_hf" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'href="([^"]+)"><code>', package) == [
        "door.html#flip_hf.door.Door",
        "door.html#flip_hf.door",
        "rooms/index.html#flip_hf.rooms",
    ]
    # A module named like the page of its package does not take its place.
    rooms = (project / "site" / "reference" / "flip_hf" / "rooms" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'href="([^"]+)"><code>', rooms) == ["index_.html#flip_hf.rooms.index"]


def test_broken_links_are_errors(tmp_path):
    write(tmp_path, FILES)
    write(
        tmp_path,
        {
            "README.md": "\n[a](docs/no_page.md), [b](docs/guide.md#no-heading), [c](scripts/no_script.py)\n",
            "docs/guide.md": "\n![a picture](no_picture.png)\n",
            "docs/not_in_navigation.md": "# Nobody comes here\n",
            "flip_hf/door.py": '\n\ndef knock() -> None:\n    """See [`NoWindow`]."""\n',
        },
    )
    built = build(tmp_path)
    assert built.returncode != 0
    problems = [line for line in built.stderr.splitlines() if line.startswith(("WARNING", "  - docs"))]
    lost = ("no_page.md", "#no-heading", "no_script.py", "no_picture.png", "not_in_navigation.md", "NoWindow")
    assert [name for name in lost if not any(name in line for line in problems)] == []
    assert len(problems) == len(lost) + 1, problems  # the list of pages has a title


def test_pages_ask_nothing_of_other_hosts(project):
    """Neither fonts nor scripts nor styles."""
    for page in (project / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8"))
        assert loaded and not [tag for tag in loaded if re.search(r'(?:src|href)="(?:https?:)?//', tag)]
