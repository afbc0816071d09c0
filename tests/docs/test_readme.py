"""Every block of the pages that lie beside the code is run."""

import pytest

from tests.docs.conftest import blocks_of
from tests.programs import ROOT

PAGES = sorted(ROOT.glob("*.md"))


@pytest.mark.parametrize("block", blocks_of(PAGES))
def test_block_runs(run_block, block):
    run_block(block)
