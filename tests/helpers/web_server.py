"""A web server of a folder that fails in the ways that servers do."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


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
