"""A server on a loopback port that speaks as much of the Hub's HTTP API as its real client needs here."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


TOKEN = "hf_the_right_token"


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        sha = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits.append(Commit(sha, message, files))
        self.branches[branch] = sha
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)


class HubServer(ThreadingHTTPServer):
    """`repos` holds what was uploaded; `drop_commits = n` breaks the next n commit requests off in their middle.

    `delays` are the seconds that the next requests of uploads wait at first.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.drop_commits = 0
        self.delays: list[float] = []
        self.requests: list[str] = []
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.answer("POST")

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def answer(self, method: str) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append(f"{method} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.server.delays and ("/preupload/" in path or "/commit/" in path):
            time.sleep(self.server.delays.pop(0))
        if "/commit/" in path and self.server.drop_commits > 0:
            self.server.drop_commits -= 1
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        for verbs, pattern, handle in ROUTES:
            if method in verbs and (match := re.fullmatch(pattern, path)):
                handle(self, body, **match.groupdict())
                return
        self.fail(404, "EntryNotFound", f"no such page: {method} {path}")

    # --- replies ---

    def reply(self, data: object, status: int = 200) -> None:
        self.send(json.dumps(data).encode(), status, {"Content-Type": "application/json"})

    def fail(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(json.dumps({"error": message}).encode(), status, headers)

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # --- who may do what ---

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """Return the repository, or reply why not and return `None`."""
        if write and not self.has_token():
            self.fail(401, None, "Invalid username or password.")
            return None
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.has_token()):
            self.fail(401 if not self.has_token() else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    def revision(self, name: str, revision: str) -> Commit | None:
        repo = self.repo(name)
        if repo is None:
            return None
        if (commit := repo.at(revision)) is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # --- pages ---

    def who_am_i(self, body: bytes) -> None:
        if self.has_token():
            self.reply({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        else:
            self.fail(401, None, "Invalid username or password.")

    def create(self, body: bytes) -> None:
        data = json.loads(body)
        name = f"{data.get('organization') or 'me'}/{data['name']}"
        if not self.has_token():
            self.fail(401, None, "Invalid username or password.")
        elif name in self.server.repos:
            self.reply({"url": f"{self.server.url}/{name}", "error": "You already created this model repo"}, 409)
        else:
            private = bool(data.get("private")) or data.get("visibility") == "private"
            self.server.repos[name] = Repo(private)
            self.server.repos[name].commit("main", "initial commit", {".gitattributes": b"\n"})
            self.reply({"url": f"{self.server.url}/{name}"})

    def validate_yaml(self, body: bytes) -> None:
        self.reply({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self.repo(name, write=True) is not None:
            files = json.loads(body)["files"]
            self.reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if (repo := self.repo(name, write=True)) is None:
            return
        if (parent := repo.at(revision)) is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files, message = dict(parent.files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repo.commit(revision, message, files).sha
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def branch(self, body: bytes, name: str, revision: str) -> None:
        if (repo := self.repo(name, write=True)) is None:
            return
        if revision in repo.branches:
            self.fail(409, None, "Reference already exists")
        else:
            start = (json.loads(body) if body else {}).get("startingPoint") or "main"
            repo.branches[revision] = repo.branches[start]
            self.reply({})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        if (commit := self.revision(name, revision)) is not None:
            siblings = [{"rfilename": path} for path in commit.files]
            private = self.server.repos[name].private
            self.reply({"id": name, "modelId": name, "sha": commit.sha, "private": private, "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if (commit := self.revision(name, revision)) is not None:
            entries = [(path, content) for path, content in commit.files.items()]
            self.reply([{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in entries])

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (commit := self.revision(name, revision)) is None:
            return
        if path not in commit.files:
            self.fail(404, "EntryNotFound", f"{path} does not exist")
            return
        content = commit.files[path]
        self.send(content, 200, {"X-Repo-Commit": commit.sha, "ETag": f'"{_etag(content)}"'})


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ({"GET"}, "/api/whoami-v2", Handler.who_am_i),
    ({"POST"}, "/api/repos/create", Handler.create),
    ({"POST"}, "/api/validate-yaml", Handler.validate_yaml),
    ({"POST"}, MODEL + "/preupload/(?P<revision>.+)", Handler.preupload),
    ({"POST"}, MODEL + "/commit/(?P<revision>.+)", Handler.commit),
    ({"POST"}, MODEL + "/branch/(?P<revision>.+)", Handler.branch),
    ({"GET"}, MODEL + "/tree/(?P<revision>[^/]+)", Handler.tree),
    ({"GET"}, MODEL + "/revision/(?P<revision>.+)", Handler.info),
    ({"GET"}, MODEL, Handler.info),
    ({"GET", "HEAD"}, r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
