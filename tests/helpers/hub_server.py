"""A server that speaks the part of the Hub's HTTP API that publishing and loading a model take, over a folder."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# Of the Hub's own form; none of them is anybody's.
WRITER = "hf_" + "abcdefghij" * 3 + "abcd"
READER = "hf_" + "zyxwvutsrq" * 3 + "zyxw"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])


class HubServer(ThreadingHTTPServer):
    """The Hub of a user named `you`, in memory.

    Attributes:
        repositories: by id.
        blobs: large files that were uploaded, by SHA-256.
        large: whether safetensors go the way of large files; else everything lies in the commit.
        drops: patterns of requests (`PUT /lfs`); the next one that fits ends in the middle, once for each mention.
        late: patterns of requests that are done, but never answered, once for each mention.
        busy: patterns of requests that are answered with "503", once for each mention.
        requests: all so far, as `METHOD /path`.
        gate: while it is not set, commits wait.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.large = True
        self.drops = []
        self.late = []
        self.busy = []
        self.requests = []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, request)) for request in self.requests)

    def handle_error(self, *args):
        """Silent: a client may leave in the middle of an answer."""


@contextmanager
def running_hub():
    server = HubServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        server.server_close()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Refusal(Exception):
    """Ends a request with a status and a message."""


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_ANY(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        self.request_line = f"{self.command} {path}"
        self.server.requests.append(self.request_line)
        length = int(self.headers.get("Content-Length") or 0)
        if self.takes(self.server.drops):
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body = self.rfile.read(length)
        if self.takes(self.server.busy):
            return self.answer({"error": "try later"}, 503)
        for method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                try:
                    return handle(self, *match.groups())
                except Refusal as refusal:
                    return self.answer({"error": refusal.args[1]}, refusal.args[0])
        self.answer({"error": f"no such route: {self.request_line}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_ANY

    def takes(self, patterns: list[str]) -> bool:
        """Returns whether this request is one of those, and removes it."""
        fits = next((pattern for pattern in patterns if re.match(pattern, self.request_line)), None)
        if fits is not None:
            patterns.remove(fits)
        return fits is not None

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(2)

    def answer(self, body, status: int = 200, **headers: str):
        if self.takes(self.server.late):
            return self.hang_up()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        """Silent."""

    # -- who may do what -----------------------------------------------------------------------------------------------

    def user(self, write: bool = False) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            raise Refusal(401, "Invalid credentials in Authorization header" if token else "Who are you?")
        if write and token != WRITER:
            raise Refusal(403, "You don't have the rights to do this")
        return "you"

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        found = self.server.repositories.get(repo_id)
        if found is None or found.private:
            self.user()
        if found is None:
            raise Refusal(404, "Repository not found")
        if write:
            self.user(write=True)
        return found

    # -- routes --------------------------------------------------------------------------------------------------------

    def create(self):
        user = self.user(write=True)
        asked = json.loads(self.body)
        owner = asked.get("organization") or user
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under {owner}")
        repo_id = f"{owner}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        exists = repo_id in self.server.repositories
        if not exists:
            self.server.repositories[repo_id] = Repository(private)
        self.answer({"url": f"{self.server.endpoint}/{repo_id}"}, 409 if exists else 200)

    def settings(self, repo_id: str):
        asked = json.loads(self.body)
        self.repository(repo_id, write=True).private = asked.get("private", asked.get("visibility") == "private")
        self.answer({})

    def info(self, repo_id: str):
        found = self.repository(repo_id)
        siblings = [{"rfilename": path} for path in found.files]
        self.answer(
            {"id": repo_id, "sha": found.commits[-1], "private": found.private, "siblings": siblings, "tags": []}
        )

    def tree(self, repo_id: str, folder: str | None):
        entries = []
        for path, data in self.repository(repo_id).files.items():
            if not path.startswith(f"{folder}/" if folder else ""):
                continue
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if path in self.server.repositories[repo_id].large:
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        if folder and not entries:
            raise Refusal(404, "no such folder")
        self.answer(entries)

    def validate(self):
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo_id: str):
        found = self.repository(repo_id, write=True)
        modes = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            large = self.server.large and path.endswith(".safetensors")
            there = found.files.get(path)
            oid = None if there is None else sha256(there) if large else git_hash(there)
            mode = "lfs" if large else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": modes})

    def batch(self, repo_id: str):
        self.repository(repo_id, write=True)
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.blobs:
                href = f"{self.server.endpoint}/lfs/{entry['oid']}?X-Amz-Signature=secretsignature"
                entry["actions"] = {"upload": {"href": href}}
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str):
        if sha256(self.body) != oid:
            raise Refusal(400, "the file is not what it was said to be")
        self.server.blobs[oid] = self.body
        self.answer({})

    def commit(self, repo_id: str):
        found = self.repository(repo_id, write=True)
        self.server.gate.wait(30)  # a client that waits for it fails, and does not hang
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found.files[value["path"]] = self.server.blobs[value["oid"]]
                found.large.add(value["path"])
            elif line["key"] == "deletedFile":
                del found.files[value["path"]]
        state = json.dumps([*found.commits, *((path, git_hash(data)) for path, data in found.files.items())])
        found.commits.append(hashlib.sha1(state.encode()).hexdigest())
        oid = found.commits[-1]
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{oid}"})

    def resolve(self, repo_id: str, path: str):
        found = self.repository(repo_id)
        if path not in found.files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        data = found.files[path]
        etag = sha256(data) if path in found.large else git_hash(data)
        self.answer(data, ETag=f'"{etag}"', X_Repo_Commit=found.commits[-1])


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (("POST",), r"/api/repos/create", Handler.create),
    (("PUT",), rf"/api/models/{REPO}/settings", Handler.settings),
    (("GET",), rf"/api/models/{REPO}/tree/\w+(?:/(.+))?", Handler.tree),
    (("GET",), rf"/api/models/{REPO}(?:/revision/\w+)?", Handler.info),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("POST",), rf"/api/models/{REPO}/preupload/\w+", Handler.preupload),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/lfs/(\w+)", Handler.upload),
    (("POST",), rf"/api/models/{REPO}/commit/\w+", Handler.commit),
    (("GET", "HEAD"), rf"/{REPO}/resolve/\w+/(.+)", Handler.resolve),
)
