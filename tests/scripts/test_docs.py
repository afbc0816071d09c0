"""The pages of the site: every relative link of theirs leads somewhere."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

pytest.importorskip("pdoc")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def build():
    spec = spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_pages_lead_nowhere_that_is_not_there(build, tmp_path):
    site = build.Site(tmp_path)
    site.write()
    assert site.problems == []
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "docs" / f"{page.stem}.html").is_file(), f"no page links {page.name}"
    assert (tmp_path / "docs" / "figures" / "method.svg").is_file()


def test_what_leads_nowhere_is_named(build, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# A\n\n[b](b.md) [c](#c) [a](#a) [d](d.png) `[e](e.md)`\n")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "START", ("README.md",))
    site = build.Site(tmp_path / "out")
    site.write()
    assert sorted(site.problems) == [
        "README.md: README.md has no heading #c",
        "README.md: there is no b.md",
        "README.md: there is no d.png",
    ]
