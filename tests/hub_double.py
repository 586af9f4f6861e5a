"""A double of the Hugging Face hub: the part of its HTTP interface that downloads of a model and commits need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_double"


@dataclass
class Repository:
    """A model: its commits, and what its branches name."""

    private: bool = True
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Commit -> path -> content."""
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add files to a branch; returns the commit."""
        content = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        digest = hashlib.sha1(repr((sorted(content.items()), len(self.commits))).encode()).hexdigest()
        self.commits[digest], self.branches[branch] = content, digest
        self.messages.append(message)
        return digest

    def find(self, revision: str) -> str | None:
        """The commit of a branch, or of itself."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The repositories of a double, and what it was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Method and path of each request."""
    refuses_commits: bool = False
    url: str = ""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub without models, on a free port, while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = self.path.split("?")[0].strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        words = path.split("/")
        if path == "api/whoami-v2":
            is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._json({"name": "tester", "type": "user"} if is_known else {"error": "who?"}, 200 if is_known else 401)
        elif path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'tester'}/{given['name']}"
            known = name in self.hub.repositories
            is_private = given.get("visibility") == "private" or bool(given.get("private"))  # by version of the client
            repository = self.hub.repositories.setdefault(name, Repository(is_private))
            if not known:
                repository.commit({".gitattributes": b""})
            self._json({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)
        elif words[:2] == ["api", "models"]:
            self._model("/".join(words[2:4]), words[4:], body)
        elif words[2:3] == ["resolve"]:
            self._file("/".join(words[:2]), words[3], "/".join(words[4:]))
        else:
            self._json({"error": "unknown"}, 404)

    def _model(self, name: str, words: list[str], body: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if repository.gated:
            return self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        what, revision = words[0] if words else "revision", words[1] if len(words) > 1 else "main"
        if what == "branch":
            known = revision in repository.branches
            repository.branches.setdefault(revision, repository.branches["main"])
            return self._json({}, 409 if known else 200)
        digest = repository.find(revision)
        if digest is None:
            return self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[digest]
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        if what == "commit":
            if self.hub.refuses_commits:
                return self._json({"error": "the hub refuses this commit"}, 400)
            lines = [json.loads(line) for line in body.splitlines()]
            sent = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            made = repository.commit(sent, revision, lines[0]["value"]["summary"])
            return self._json({"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{name}/commit/{made}"})
        listed = [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()]
        if what == "tree":
            return self._json(listed)
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "sha": digest, "private": repository.private, "siblings": siblings})

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories[name]
        digest = repository.find(revision)
        content = repository.commits[digest].get(path)
        if content is None:
            return self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": digest, "ETag": f'"{_oid(content)}"', "Content-Type": "application/octet-stream"}
        self._send(200, content, headers)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
