"""Every block of the guides is run."""

import pytest

from tests.helpers.documents.pages import GUIDES, blocks_of


@pytest.mark.parametrize("block", blocks_of(GUIDES))
def test_block_runs(run_block, block):
    run_block(block)
