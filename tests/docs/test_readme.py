"""Every block of the pages that lie beside the code is run."""

import pytest

from tests.helpers.documents.pages import TOP_PAGES, blocks_of


@pytest.mark.parametrize("block", blocks_of(TOP_PAGES))
def test_block_runs(run_block, block):
    run_block(block)
