"""Every block of the published cards is run."""

import pytest

from tests.helpers.documents.pages import CARDS, blocks_of


@pytest.mark.parametrize("block", blocks_of(CARDS))
def test_block_runs(run_block, block):
    run_block(block)
