"""A small Hub on the loopback, for the real client: the endpoints that downloads and uploads use, and a log.

It keeps commits in memory, answers `Range`, checks tokens, sends the error codes the client knows, and can cut a
download after some bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes from which a file goes through LFS


@dataclass
class Commit:
    files: dict[str, bytes]
    message: str = ""


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str = "", ref: str = "main") -> str:
        """Make `files` the whole content of `ref`; return the commit's hash."""
        seed = repr((sorted(files), message, ref, len(self.commits), id(self))).encode()
        sha = hashlib.sha1(seed).hexdigest()
        self.commits[sha] = Commit(dict(files), message)
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """What the server knows. `tokens` maps a token to whether it may write; `cut` a file to bytes before a cut."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: dict[str, bool] = field(default_factory=lambda: {"hf_write": True, "hf_read": False})
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)  # patterns of paths whose answer is an error

    def fetched(self) -> list[str]:
        """Return the names of the files whose content was sent, in order."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for do, path, _ in self.log
            if do == "GET" and "/resolve/" in path
        ]


class Refused(Exception):
    def __init__(self, status: int, code: str, text: str = "") -> None:
        self.status, self.code, self.text = status, code, text


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if any(re.search(pattern, path) for pattern in self.hub.broken):
                raise Refused(400, "BadRequest", "broken on purpose")
            self.route(path, body)
        except Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.text or error.code}
            self.reply(json.dumps({"error": error.text or error.code}).encode(), error.status, headers)

    def reply(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- who asks for what

    def may_write(self) -> bool:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(given, False)

    def repo(self, name: str, write: bool = False) -> Repo:
        allowed, known = self.may_write(), self.headers.get("Authorization")
        found = self.hub.repos.get(name)
        if found is None or (found.private and not known):
            raise Refused(401 if not known else 404, "RepoNotFound", "Repository not found")
        if found.gated and not known:
            raise Refused(401, "GatedRepo", "Access to this model is restricted")
        if write and not allowed:
            raise Refused(403, "", "this token may not write")
        return found

    def revision(self, repo: Repo, name: str) -> tuple[str, Commit]:
        sha = repo.find(name)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return sha, repo.commits[sha]

    def route(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif parts[0] == "lfs":
            self.hub.blobs[parts[1]] = body
            self.reply({})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(path, json.loads(body))
        elif parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            raise Refused(404, "NotFound", f"{self.command} {path} is not served here")

    def api(self, name: str, rest: list[str], body: bytes) -> None:
        verb = rest[0] if rest else "revision"
        if self.command == "POST":
            repo = self.repo(name, write=True)
            {"preupload": self.preupload, "commit": self.commit, "branch": self.branch}[verb](name, repo, rest[1], body)
            return
        repo = self.repo(name)
        sha, commit = self.revision(repo, "/".join(rest[1:]) if rest else "main")
        if verb == "tree":
            self.reply([self.entry(file, data) for file, data in commit.files.items()])
        else:
            siblings = [{"rfilename": file} for file in commit.files]
            self.reply({"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    @staticmethod
    def entry(file: str, data: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {
            "type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest(),
        }  # fmt: skip
        if len(data) >= LARGE:
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    # -- downloads

    def resolve(self, name: str, revision: str, file: str) -> None:
        sha, commit = self.revision(self.repo(name), revision)
        if file not in commit.files:
            raise Refused(404, "EntryNotFound", f"{file} does not exist")
        data = commit.files[file]
        kind = hashlib.sha256 if len(data) >= LARGE else hashlib.sha1
        headers = {"ETag": f'"{kind(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if (wanted := self.headers.get("Range")) and self.command == "GET":
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cut.get(file)
        if self.command == "GET" and cuts:
            self.send_response(status)
            for header, value in {**headers, "Content-Length": str(len(data) - start)}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(data[start : start + cuts.pop(0)])
            self.close_connection = True
        else:
            self.reply(data[start:], status, headers)

    # -- uploads

    def create(self, wish: dict[str, Any]) -> None:
        if not self.may_write():
            raise Refused(401 if not self.headers.get("Authorization") else 403, "", "you may not create repositories")
        name = f"{wish.get('organization') or 'me'}/{wish['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            self.reply({"url": url, "error": "You already created this model repo"}, 409)
            return
        self.hub.repos[name] = Repo(private=wish.get("visibility") == "private" or bool(wish.get("private")))
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs"}, "initial commit")
        self.reply({"url": url, "name": name})

    def preupload(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        self.revision(repo, revision)
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self.reply({"files": files})

    def batch(self, path: str, wish: dict[str, Any]) -> None:
        self.repo(path.strip("/").split(".git/")[0], write=True)
        objects = []
        for wanted in wish["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            known = wanted["oid"] in self.hub.blobs
            objects.append({**wanted, **({} if known else {"actions": action})})
        self.reply({"transfer": "basic", "objects": objects})

    def commit(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        _, base = self.revision(repo, revision)
        files, message = dict(base.files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        pull = "create_pr=1" in self.path
        sha = repo.commit(files, message, "refs/pr/1" if pull else revision)
        url = f"{self.hub.url}/{name}"
        more = {"pullRequestUrl": f"{url}/discussions/1"} if pull else {}
        self.reply({"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "hookOutput": "", **more})

    def branch(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        if branch in repo.refs:
            raise Refused(409, "", "the branch exists")
        repo.refs[branch] = repo.refs["main"]
        self.reply({})


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a Hub on a free port of the loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
