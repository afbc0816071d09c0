"""Documents that are run while the tests of a file go through their blocks."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import Block, read_blocks
from tests.docs.document import BlockError, Document
from tests.hub.hub_server import running_hub
from tests.training.conftest import trained  # noqa: F401


def blocks_of(paths: Iterable[Path]) -> list:
    """All blocks of these documents, as parameters of a test."""
    blocks = [block for path in paths for block in read_blocks(path)]
    return [pytest.param(block, id=block.place(0)) for block in blocks]


@pytest.fixture(scope="module")
def run_block(trained, tmp_path_factory) -> Iterator[Callable[[Block], None]]:  # noqa: F811
    """Runs a block where the others of its document have run."""
    documents: dict[Path, Document] = {}

    def run_block(block: Block) -> None:
        if block.path not in documents:
            folder = tmp_path_factory.mktemp(block.path.stem)
            documents[block.path] = Document(block.path, folder, trained[0], server.endpoint)
        problem = None
        try:
            documents[block.path].run(block)
        except BlockError as error:
            problem = str(error)
        if problem:  # of the document, and not of what calls this
            pytest.fail(problem, pytrace=False)

    with running_hub() as server:
        yield run_block
        for document in documents.values():
            document.close()
