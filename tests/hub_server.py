"""A stand-in for the Hugging Face hub on 127.0.0.1: repositories of models, in memory.

It speaks what huggingface_hub asks: who a token is, creating repositories and branches, the upload
of small files inside a commit and of large ones by Git LFS, listings and downloads.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, READER = "hf_writer0secret", "hf_reader0secret"  # of `me`, and of nobody who may write
LARGE = re.compile(r"\.(safetensors|pt2|onnx)$")
NO_REPO = (404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"})


@dataclass
class Repo:
    """A repository: for each branch its commits, the last one last, as path -> content."""

    private: bool
    branches: dict[str, list[str]] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        text = f"{branch}{len(self.trees)}{sorted(tree)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.trees[sha] = tree
        self.branches.setdefault(branch, []).append(sha)
        return sha

    def resolve(self, revision: str) -> str | None:
        return (
            self.branches[revision][-1]
            if revision in self.branches
            else (revision if revision in self.trees else None)
        )

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.trees[str(self.resolve(revision))]


@dataclass
class Hub:
    """The state of the stand-in: what is there, and what was asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: str = ""  # requests whose path has this in it end with 500


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, headers: dict[str, str], body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", **headers}
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.broken and self.hub.broken in path:
            return self.answer(500, {}, {"error": "out of order"})
        if token and token not in (TOKEN, READER):
            said = "Invalid credentials in Authorization header"
            return self.answer(401, {"X-Error-Message": said}, {"error": said})
        for pattern, method in ROUTES:
            verb, _, form = pattern.partition(" ")
            found = re.fullmatch(form, path)
            if self.command in verb.split("|") and found:
                return self.answer(*method(self.hub, token, body, *map(unquote, found.groups())))
        return self.answer(404, {}, {"error": f"the stand-in does not know {self.path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


Answer = tuple[int, dict[str, str], Any]


def whoami(hub: Hub, token: str, body: bytes) -> Answer:
    return 200, {}, {"name": "me", "type": "user"}


def create(hub: Hub, token: str, body: bytes) -> Answer:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if token != TOKEN or asked["organization"] != "me":
        return 403, {}, {"error": f"You don't have the rights to create a model under {name}"}
    if name in hub.repos:
        said = "You already created this model repo"
        return 409, {}, {"error": said, "url": f"{hub.url}/{name}"}
    private = asked.get("private") or asked.get("visibility") == "private"
    hub.repos[name] = Repo(private=bool(private))
    hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
    return 200, {}, {"url": f"{hub.url}/{name}", "name": name}


def branch(hub: Hub, token: str, body: bytes, name: str, new: str) -> Answer:
    repo = hub.repos[name]
    if new in repo.branches:
        return 409, {}, {"error": "Reference already exists"}
    repo.branches[new] = list(repo.branches["main"])
    return 200, {}, {}


def preupload(hub: Hub, token: str, body: bytes, name: str, revision: str) -> Answer:
    def mode(path: str) -> str:
        return "lfs" if LARGE.search(path) else "regular"

    files = [
        {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False}
        for file in json.loads(body)["files"]
    ]
    return 200, {}, {"files": files}


def batch(hub: Hub, token: str, body: bytes, name: str) -> Answer:
    objects = [
        {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}}
        for item in json.loads(body)["objects"]
    ]
    return 200, {}, {"transfer": "basic", "objects": objects}


def put(hub: Hub, token: str, body: bytes, oid: str) -> Answer:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.large[oid] = body
    return 200, {}, b""


def commit(hub: Hub, token: str, body: bytes, name: str, revision: str) -> Answer:
    repo = hub.repos[name]
    tree = dict(repo.files(revision))
    for line in body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            tree[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            tree[value["path"]] = hub.large[value["oid"]]
        elif item["key"] == "deletedFile":
            del tree[value["path"]]
    sha = repo.commit(revision, tree)
    return 200, {}, {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha}


def _readable(hub: Hub, token: str, name: str, revision: str) -> tuple[Repo, str] | Answer:
    repo = hub.repos.get(name)
    if repo is None or (repo.private and token != TOKEN):
        return NO_REPO
    sha = repo.resolve(revision)
    if sha is None:
        return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}
    return repo, sha


def info(hub: Hub, token: str, body: bytes, name: str, revision: str = "main") -> Answer:
    found = _readable(hub, token, name, revision)
    if len(found) == 3:
        return found
    repo, sha = found
    siblings = [{"rfilename": path} for path in repo.trees[sha]]
    return 200, {}, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings}


def tree(hub: Hub, token: str, body: bytes, name: str, revision: str) -> Answer:
    found = _readable(hub, token, name, revision)
    if len(found) == 3:
        return found
    repo, sha = found
    return 200, {}, [_entry(path, content) for path, content in repo.trees[sha].items()]


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
    if LARGE.search(path):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entry


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def resolve(hub: Hub, token: str, body: bytes, name: str, revision: str, path: str) -> Answer:
    found = _readable(hub, token, name, revision)
    if len(found) == 3:
        return found
    repo, sha = found
    if path not in repo.trees[sha]:
        return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
    content = repo.trees[sha][path]
    etag = hashlib.sha256(content).hexdigest() if LARGE.search(path) else _etag(content)
    return 200, {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}, content


_REPO = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, Any]] = [
    ("GET /api/whoami-v2", whoami),
    ("POST /api/repos/create", create),
    ("POST /api/validate-yaml", lambda *_: (200, {}, {"warnings": [], "errors": []})),
    (f"POST /api/models/{_REPO}/branch/(.+)", branch),
    (f"POST /api/models/{_REPO}/preupload/(.+)", preupload),
    (f"POST /{_REPO}\\.git/info/lfs/objects/batch", batch),
    ("PUT /lfs/([0-9a-f]{64})", put),
    (f"POST /api/models/{_REPO}/commit/(.+)", commit),
    (f"GET /api/models/{_REPO}", info),
    (f"GET /api/models/{_REPO}/revision/(.+)", info),
    (f"GET /api/models/{_REPO}/tree/([^/]+)", tree),
    (f"GET|HEAD /{_REPO}/resolve/([^/]+)/(.+)", resolve),
]


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """A stand-in at a free port, for as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
