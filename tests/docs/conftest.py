"""Documents that are run while the tests of a file go through their blocks."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.documents.blocks import Block
from tests.helpers.documents.document import BlockError, Document
from tests.helpers.hub_server import HubServer, running_hub


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def run_block(trained, hub, tmp_path_factory) -> Iterator[Callable[[Block], None]]:
    """Runs a block where the others of its document have run."""
    documents: dict[Path, Document] = {}

    def run_block(block: Block) -> None:
        if block.path not in documents:
            folder = tmp_path_factory.mktemp(block.path.stem)
            documents[block.path] = Document(block.path, folder, trained[0], hub.endpoint)
        problem = None
        try:
            documents[block.path].run(block)
        except BlockError as error:
            problem = str(error)
        if problem:  # of the document, and not of what calls this
            pytest.fail(problem, pytrace=False)

    yield run_block
    for document in documents.values():
        document.close()
