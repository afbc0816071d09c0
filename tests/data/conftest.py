"""A web server of the test's folder."""

import threading

import pytest

from flip_hf.data import reading
from tests.helpers.web_server import Server


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "RETRY_WAITS", (0, 0, 0))
    server = Server(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
