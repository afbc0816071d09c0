"""Data behind URLs: a real web server, with and without ranges, that drops connections."""

import itertools
import os
import re
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from flip_hf.data import files, reading
from flip_hf.data.refusals import BadDataError
from flip_hf.data.sources import open_source
from flip_hf.data.waits import WaitEnded, allow_waits, end_waits
from tests.data.conftest import write_tar
from tests.data.loading import make_train_loader, numbers, saved
from tests.training.watched import serve

KEYS = list(range(160))


class Server(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        ranges: whether it gives parts of files.
        lengths: whether it says how long they are.
        drops: names of files whose next answer of more than 4 kB ends in its middle, once for each mention.
        down: whether every answer is "503 Service Unavailable".
        busy: names of files whose next answer is "503", once for each mention.
        extra_length: how many bytes too long it says that files are.
        redirect: where it sends whoever asks for `elsewhere.tar`.
        silent: names of files of which it answers nothing at all (`head`), only headers (`body`), or half and then a
            byte now and then (`trickle`), once for each mention.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.ranges = True
        self.lengths = True
        self.drops = []
        self.down = False
        self.requests = []
        self.silent: list[tuple[str, str]] = []
        self.busy: list[str] = []
        self.extra_length = 0
        self.redirect = ""
        self.asked = threading.Event()
        self.closing = threading.Event()

    def handle_error(self, *args):
        """Silent: a reader may leave in the middle of an answer."""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.server.folder / self.path.lstrip("/")
        if self.refused(path):
            return None
        data = path.read_bytes()
        silence = self.silence(path.name, body)
        if silence == "head":
            self.close_connection = True
            return self.server.closing.wait(30)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.server.ranges else None
        if wanted:
            first = int(wanted[1])
            last = min(int(wanted[2] or len(data)), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if self.server.lengths:
            self.send_header("Content-Length", str(len(data) + (0 if body else self.server.extra_length)))
        self.end_headers()
        if silence:
            return self.keep_waiting(silence, data)
        if body and len(data) > 4096 and path.name in self.server.drops:
            self.server.drops.remove(path.name)
            data = data[: len(data) // 2]
        if body:
            self.server.requests.append((path.name, len(data)))
            self.wfile.write(data)

    def refused(self, path: Path) -> bool:
        """Gives another response than the file, if asked to; returns whether it did."""
        if path.name == "elsewhere.tar":
            self.send_response(302)
            self.send_header("Location", self.server.redirect)
            self.end_headers()
        elif self.server.down or path.name in self.server.busy:
            if not self.server.down:
                self.server.busy.remove(path.name)
            self.send_error(503)
        elif not path.is_file():
            self.send_error(404)
        else:
            return False
        return True

    def silence(self, name: str, body: bool) -> str | None:
        """Returns how to be silent about a file, if at all."""
        for kind in ("head", "body", "trickle") if body else ("head",):
            if (name, kind) in self.server.silent:
                self.server.silent.remove((name, kind))
                return kind
        return None

    def keep_waiting(self, silence: str, data: bytes) -> None:
        if silence == "trickle":
            self.wfile.write(data[: len(data) // 2])
        self.server.asked.set()
        while not self.server.closing.wait(0.02 if silence == "trickle" else 30):
            self.wfile.write(b"x")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "RETRY_WAITS", (0, 0, 0))
    server = Server(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranges", [True, False])
def test_tar_shards_of_a_web_server_are_read_and_resumed(server, tar_folder, ranges, workers):
    server.ranges = ranges
    url = server.url("tars/shard-{0000..0004}.tar")
    whole = numbers(itertools.islice(make_train_loader(url, workers=workers), 20))
    assert len(set(whole)) > 120 and (workers or sorted(whole) == KEYS)
    local = numbers(itertools.islice(make_train_loader(tar_folder / "shard-{0000..0004}.tar", workers=workers), 20))
    assert whole == local
    loader = make_train_loader(url, workers=workers)
    assert numbers(itertools.islice(loader, 7)) == whole[:56]
    rest = make_train_loader(url, workers=workers, states=saved([loader]))
    assert numbers(itertools.islice(rest, 13)) == whole[56:]


def test_parquet_of_a_web_server_is_read(server, parquet_folder):
    url = server.url("parquet/part-{0..3}.parquet")
    source = open_source(url, image_column="picture", target_column="words")
    assert sorted(int(source.target(row)[:5]) for row in source.rows()) == KEYS


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_is_taken_up_where_it_broke(server, tar_folder, ranges, caplog):
    loader = make_train_loader(server.url("tars/shard-{0000..0004}.tar"), batch_size=1)
    server.ranges = ranges
    server.drops = ["shard-0001.tar", "shard-0003.tar", "shard-0003.tar"]
    assert sorted(numbers(itertools.islice(loader, 160))) == KEYS
    assert server.drops == [] and loader.counts["refused"] == {}
    assert caplog.text.count("was interrupted") >= 3 and "ClientPayloadError" in caplog.text


@pytest.mark.parametrize("lengths", [True, False])
def test_large_files_come_in_one_go_where_there_are_no_ranges(server, samples, tmp_path, lengths):
    """Larger than what fsspec asks for at once (5 MiB)."""
    rows = [(key, image + bytes(400_000), caption) for key, image, caption in samples[:32]]
    write_tar(tmp_path / "large.tar", rows)
    server.ranges = False
    server.lengths = lengths
    loader = make_train_loader(server.url("large.tar"), batch_size=1)
    server.drops = ["large.tar"] if lengths else []
    assert sorted(numbers(itertools.islice(loader, 32))) == list(range(32))
    assert server.drops == [] and loader.counts["refused"] == {}


def test_a_shard_that_stays_away_is_counted_and_left(server, tar_folder, caplog):
    (tar_folder / "shard-0002.tar").unlink()
    url = server.url("tars/shard-{0000..0004}.tar")
    server.drops = ["shard-0003.tar"] * 99
    loader = make_train_loader(url, batch_size=1, block=1)
    got = numbers(itertools.islice(loader, 96 + 32))
    assert set(range(64)) | set(range(128, 160)) <= set(got)
    assert loader.counts["refused"][url]["unreadable shard"] in (2, 3, 4)
    assert "FileNotFoundError" in caplog.text and caplog.text.count("shard-0002.tar was interrupted") == 0


def test_a_server_that_is_gone_ends_the_run_in_words(server, tar_folder):
    source = server.url("tars/shard-{0000..0004}.tar")
    loader = make_train_loader(*[source], batch_size=1, block=1)
    server.down = True
    with pytest.raises(BadDataError, match="no usable sample.*unreadable shard"):
        next(iter(loader))


@pytest.mark.parametrize("kind", ["head", "body", "trickle"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_falls_silent_is_asked_again(server, tar_folder, monkeypatch, caplog, ranges, kind):
    monkeypatch.setattr(files, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(files, "REQUEST_SECONDS", 0.6)
    server.ranges = ranges
    loader = make_train_loader(server.url("tars/shard-{0000..0004}.tar"), batch_size=1)
    server.silent = [("shard-0001.tar", kind), ("shard-0003.tar", kind)]
    assert sorted(numbers(itertools.islice(loader, 160))) == KEYS
    assert server.silent == [] and loader.counts["refused"] == {}
    assert caplog.text.count("was interrupted") >= (
        0 if kind == "head" else 2
    )  # fsspec itself asks twice for the length


@pytest.mark.parametrize("kind", ["head", "body"])
def test_a_shard_that_never_comes_is_left_and_counted(server, tar_folder, monkeypatch, kind):
    monkeypatch.setattr(files, "SILENT_SECONDS", 0.3)
    url = server.url("tars/shard-{0000..0004}.tar")
    loader = make_train_loader(url, batch_size=1, block=1)
    server.silent = [("shard-0003.tar", kind)] * 99
    assert set(numbers(itertools.islice(loader, 128))) == {*range(96), *range(128, 160)}
    assert loader.counts["refused"][url] == {"unreadable shard": 1} and len(server.silent) < 99 - 3


def test_an_overloaded_server_is_asked_again(server, tar_folder, caplog):
    loader = make_train_loader(server.url("tars/shard-{0000..0004}.tar"), batch_size=1)
    server.busy = ["shard-0002.tar"] * 4  # fsspec itself asks twice
    assert sorted(numbers(itertools.islice(loader, 160))) == KEYS
    assert "was interrupted (FileNotFoundError" in caplog.text and loader.counts["refused"] == {}


def test_a_signal_ends_the_wait_for_a_silent_server(server, tar_folder):
    """Without workers the main process reads; what waits for a server must let go."""
    loader = make_train_loader(server.url("tars/shard-{0000..0004}.tar"), batch_size=1)
    server.silent = [(f"shard-{n:04d}.tar", "body") for n in range(5)]
    previous = signal.signal(signal.SIGUSR1, lambda *args: end_waits())
    asked = threading.Thread(target=lambda: server.asked.wait(20) and os.kill(os.getpid(), signal.SIGUSR1))
    asked.start()
    try:
        with pytest.raises(WaitEnded):
            next(iter(loader))
    finally:
        asked.join()
        signal.signal(signal.SIGUSR1, previous)
        allow_waits()


def test_no_redirect_leads_out_of_the_web(server, tar_folder):
    """To a file of this machine, above all."""
    server.redirect = f"file://{tar_folder}/shard-0000.tar"
    with pytest.raises(ValueError, match="no samples"):
        open_source(server.url("elsewhere.tar"))


def test_a_length_that_lies_costs_nothing(server, tar_folder):
    """A megabyte more is said to come than does: what comes is used."""
    server.extra_length = 2**20
    source = open_source(server.url("tars/shard-0000.tar"))
    assert [int(source.target(row)[:5]) for row in source.rows()] == KEYS[:32]


def test_any_file_system_of_fsspec_is_read_with_patterns_and_folders(tar_folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(tar_folder), "/bucket/tars", recursive=True)
    try:
        for name in (
            "memory://bucket/tars/*.tar",
            "memory://bucket/tars/shard-{0000..0004}.tar",
            "memory://bucket/tars",
        ):
            source = open_source(name)
            assert sorted(int(source.target(row)[:5]) for row in source.rows()) == KEYS, name
        with pytest.raises(FileNotFoundError, match="There are no .tar or .* files in 'memory://bucket/none'"):
            open_source("memory://bucket/none")
        with pytest.raises(FileNotFoundError, match=r"no file 'memory://bucket/none\*.tar'"):
            open_source("memory://bucket/none*.tar")
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_url_that_nothing_opens_says_so():
    with pytest.raises(ValueError, match="'nonsense://x/a.tar' .*nonsense"):
        open_source("nonsense://x/a.tar")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_says_nothing_costs_its_shard(workers, tar_folder, monkeypatch):
    """The connection stands and no byte comes: after a while the shard is left and counted, and the others are read."""
    monkeypatch.setattr(files, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(reading, "RETRY_WAITS", (0,))
    with serve(tar_folder, lambda name: 8000 if name.endswith("3.tar") else None) as address:
        loader = make_train_loader(f"{address}/shard-{{0000..0004}}.tar", workers=workers, block=1, batch_size=32)
        seen = numbers(itertools.islice(loader, 4))
    assert len(set(seen)) == 128
    # Of the silent shard some samples came; nothing of it came twice.
    assert loader.counts["refused"] == {} or list(loader.counts["refused"].values()) == [{"unreadable shard": 1}]
