"""Every block of the guides is run."""

import pytest

from tests.docs.conftest import blocks_of
from tests.programs import ROOT

# Has a test of its own, with the libraries that it is about.
ELSEWHERE = {"ecosystem.md"}
PAGES = sorted(path for path in (ROOT / "docs").glob("**/*.md") if path.name not in ELSEWHERE)


@pytest.mark.parametrize("block", blocks_of(PAGES))
def test_block_runs(run_block, block):
    run_block(block)
