"""The documents whose blocks are run."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers.documents.blocks import read_blocks
from tests.helpers.programs import ROOT

# Has a test of its own, with the libraries that it is about.
ELSEWHERE = {"ecosystem.md"}
CARDS = sorted((ROOT / "model_cards").glob("*/**/*.md"))
GUIDES = sorted(path for path in (ROOT / "docs").glob("**/*.md") if path.name not in ELSEWHERE)
# Those that lie beside the code: the README and what GitHub links to.
TOP_PAGES = sorted(ROOT.glob("*.md"))


def blocks_of(paths: Iterable[Path]) -> list:
    """All blocks of these documents, as parameters of a test."""
    blocks = [block for path in paths for block in read_blocks(path)]
    return [pytest.param(block, id=block.place(0)) for block in blocks]
