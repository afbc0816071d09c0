"""Fixtures of the conformance tests."""

import logging

import pytest


@pytest.fixture
def warnings_logged():
    """The messages of level WARNING and above that Transformers logs; its loggers do not reach pytest's."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
