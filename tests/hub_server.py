"""A hub on 127.0.0.1 for tests: what huggingface_hub 2.4 and bam_merge ask of one, with faults to order.

GET  /api/models/ORG/NAME/revision/REVISION    {"id", "sha"}              GET /api/models/ORG/NAME/refs, /api/models?author=ORG
GET  /api/models/ORG/NAME/tree/REVISION        [{"type", "path", "size", "oid", "lfs": {"oid", "size", "pointerSize"}}], in pages
HEAD /ORG/NAME/resolve/REVISION/FILE           X-Repo-Commit, ETag; of a large file X-Linked-Etag, X-Linked-Size and a redirect
GET  the same, with Range                      the bytes; of a large file a redirect to the store, another server, as the hub's
POST /api/repos/create, /api/models/ORG/NAME/branch/NAME, .../preupload/REVISION, .../commit/REVISION (lines of JSON), /api/validate-yaml
POST /ORG/NAME.git/info/lfs/objects/batch      where large files go: PUT to the store, nothing for those that it has
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 10_000
"""Bytes from which a file is stored apart from git, as the hub does with binary files."""


COUNTING = threading.Lock()


@dataclass(frozen=True)
class Content:
    """A file's bytes, or those it begins with where it is as large as `size` and the rest is nowhere."""

    data: bytes
    size: int = -1
    xet: bool = False

    @property
    def length(self) -> int:
        return self.size if self.size >= 0 else len(self.data)

    @property
    def apart(self) -> bool:
        return self.length >= LARGE

    @property
    def digest(self) -> str:
        if self.apart:
            return hashlib.sha256(self.data + b"%d" % self.size if self.size >= 0 else self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def span(self, first: int, last: int) -> bytes:
        """Bytes [first, last]; zeros where there are none."""
        data = self.data[first : last + 1]
        return data + bytes(last + 1 - first - len(data))


@dataclass
class Repo:
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes | Content], ref: str = "main") -> str:
        """A new commit of these files, to which `ref` then leads."""
        contents = {name: item if isinstance(item, Content) else Content(item) for name, item in files.items()}
        names = json.dumps([len(self.commits), sorted((name, item.digest) for name, item in contents.items())])
        commit = hashlib.sha1(names.encode()).hexdigest()
        self.commits[commit] = contents
        self.refs[ref] = commit
        return commit


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    span: str | None
    token: str | None
    store: bool
    sent: int


@dataclass
class Fault:
    """What the next `times` requests that match get: another answer, or a body that `spoil` changes, or that ends after `cut` bytes."""

    pattern: str
    times: int = 10**9
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    reset: bool = False
    spoil: Callable[[bytes], bytes] | None = None
    length: int | None = None
    whole: bool = False
    pause: float = 0
    method: str = "GET"


@dataclass
class FakeHub:
    url: str = ""
    store: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    token: str | None = None
    faults: list[Fault] = field(default_factory=list)
    answered: list[Request] = field(default_factory=list)
    busy: int = 0
    page: int = 1000
    links: str = ""
    stored: dict[str, bytes] = field(default_factory=dict)
    writers: frozenset[str] = frozenset({"acme", "me"})
    committed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def requests(self) -> list[Request]:
        """All requests so far, when those that are being answered are: the client may have gone on meanwhile."""
        deadline = time.monotonic() + 5
        while self.busy and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.answered

    def add(self, repo: str, folder: Path, **more: bytes | Content) -> str:
        """A repository of the files of `folder`. Returns its commit."""
        files: dict[str, bytes | Content] = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        return self.repos.setdefault(repo, Repo()).commit({**files, **more})

    def sent(self, pattern: str = "") -> int:
        """Bytes of all bodies so far, of requests that match."""
        return sum(request.sent for request in self.requests if re.search(pattern, request.path))

    def asked(self, pattern: str, method: str = "GET") -> list[Request]:
        return [request for request in self.requests if request.method == method and re.search(pattern, request.path)]

    def fault_of(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**17  # an answer in one piece, for which nobody waits until the other side has seen the first
    hub: FakeHub
    is_store = False

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        with COUNTING:
            self.hub.busy += 1
        try:
            self.answer()
        finally:
            with COUNTING:
                self.hub.busy -= 1

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.body = self.read_body()
        fault = self.hub.fault_of(self.command, self.path)
        if fault and fault.pause:
            time.sleep(fault.pause)
        if fault and fault.reset and self.command in ("POST", "PUT"):
            self.hub.answered.append(Request(self.command, self.path, None, self.headers.get("authorization"), self.is_store, 0))
            self.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
        elif fault and fault.status:
            self.reply(fault.status, b'{"error": "a fault that a test ordered"}', fault.headers, None)
        elif self.is_store and self.command == "PUT":
            self.hub.stored[parts.path.removeprefix("/")] = fault.spoil(self.body) if fault and fault.spoil else self.body
            self.reply(200, b"", {}, None)
        elif self.command == "POST":
            self.upload(unquote(parts.path).strip("/"))
        elif self.is_store:
            name = parts.path.removeprefix("/")
            found = [item for repo in self.hub.repos.values() for files in repo.commits.values() for item in files.values()]
            self.content(next(item for item in found if item.digest == name), {}, fault)
        elif parts.path.startswith("/api/models"):
            self.interface(unquote(parts.path).removeprefix("/api/models").strip("/"), parse_qs(parts.query), fault)
        else:
            found_path = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", parts.path)
            assert found_path, self.path
            self.file(found_path[1], unquote(found_path[2]), unquote(found_path[3]), fault)

    def read_body(self) -> bytes:
        """The body of a request, in one piece or in chunks."""
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # ---- uploads -----------------------------------------------------------------------------------------------------------

    def upload(self, path: str) -> None:
        sent = self.headers.get("authorization")
        if self.hub.token is None or sent != f"Bearer {self.hub.token}":
            self.reply(401, b"{}", {"x-error-message": "Invalid username or password."}, None)
            return
        asked = json.loads(self.body) if self.body.startswith(b"{") and b"\n{" not in self.body else {}
        if path == "api/validate-yaml":
            self.document({"errors": [], "warnings": []}, None)
            return
        if path == "api/repos/create":
            self.create(asked.get("organization") or "me", asked)
            return
        found = re.fullmatch(r"(?:api/models/)?([^/]+/[^/]+?)(?:\.git/info/lfs/objects/(batch)|/(branch|preupload|commit)/(.+))", path)
        assert found, path
        name, revision = found[1], found[4] or "main"
        repo = self.hub.repos.get(name)
        if repo is None or name.partition("/")[0] not in self.hub.writers:
            self.reply(404 if repo is None else 403, b"{}", {"x-error-code": "RepoNotFound"} if repo is None else {}, None)
        elif found[2]:
            self.document({"transfer": "basic", "objects": [self.action(item) for item in asked["objects"]]}, None)
        elif found[3] == "branch":
            self.reply(409 if revision in repo.refs else 200, b"{}", {}, None)
            repo.refs.setdefault(revision, repo.refs["main"])
        elif found[3] == "preupload":
            here = repo.commits[repo.refs[revision]]
            modes = [
                {"path": item["path"], "uploadMode": "lfs" if item["size"] >= LARGE else "regular", "shouldIgnore": False,
                 "oid": here[item["path"]].digest if item["path"] in here else None}
                for item in asked["files"]
            ]  # fmt: skip
            self.document({"files": modes}, None)
        else:
            self.commit(name, repo, revision)

    def create(self, owner: str, asked: dict[str, Any]) -> None:
        name = f"{owner}/{asked['name']}"
        if owner not in self.hub.writers or name in self.hub.repos:
            self.reply(409 if name in self.hub.repos else 403, b"{}", {}, None)
            return
        self.hub.repos[name] = Repo(private=bool(asked.get("private") or asked.get("visibility") == "private"))
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.document({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, None)

    def action(self, item: dict[str, Any]) -> dict[str, Any]:
        """Where one large file goes, if it is not there."""
        there = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self.hub.stored:
            return there
        return {**there, "actions": {"upload": {"href": f"{self.hub.store}/{item['oid']}?X-Signature=secret"}}}

    def commit(self, name: str, repo: Repo, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.refs[revision]):
            self.reply(412, b"{}", {}, None)
            return
        files: dict[str, bytes | Content] = dict(repo.commits[repo.refs[revision]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                del files[value["path"]]
        self.hub.committed.append(header)
        commit = repo.commit(files, revision)
        self.document({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "hookOutput": ""}, None)

    # ---- the interface -----------------------------------------------------------------------------------------------------

    def allowed(self, repo: Repo | None, files: bool = False) -> bool:
        """Whether the request may see the repository; the refusal is sent where it may not."""
        sent = self.headers.get("authorization")
        logged_in = self.hub.token is not None and sent == f"Bearer {self.hub.token}"
        if sent is not None and not logged_in:
            self.reply(401, b"{}", {"x-error-message": "Invalid credentials in Authorization header"}, None)
        elif repo is None or (repo.private and not logged_in):
            self.reply(404 if logged_in else 401, b"{}", {"x-error-code": "RepoNotFound", "x-error-message": "Repository not found"}, None)
        elif files and repo.gated:
            self.reply(403 if logged_in else 401, b"{}", {"x-error-code": "GatedRepo", "x-error-message": "Access is restricted"}, None)
        else:
            return True
        return False

    def commit_of(self, repo: Repo, revision: str) -> str | None:
        commit = repo.refs.get(revision, revision)
        if commit in repo.commits:
            return commit
        self.reply(404, b"{}", {"x-error-code": "RevisionNotFound", "x-error-message": f"Invalid rev id: {revision}"}, None)
        return None

    def interface(self, path: str, query: dict[str, list[str]], fault: Fault | None) -> None:
        if not path:
            owner = query.get("author", [""])[0]
            self.document(
                [{"id": name} for name, repo in self.hub.repos.items() if name.startswith(f"{owner}/") and not repo.private], fault
            )
            return
        org, name, *rest = path.split("/")
        repo = self.hub.repos.get(f"{org}/{name}")
        if not self.allowed(repo):
            return
        assert repo is not None
        if rest[:1] == ["refs"]:
            self.document({"branches": [{"name": ref, "targetCommit": commit} for ref, commit in repo.refs.items()], "tags": []}, fault)
            return
        commit = self.commit_of(repo, "/".join(rest[1:]) if rest else "main")
        if commit is None:
            return
        files = repo.commits[commit]
        if rest[:1] == ["tree"]:
            entries = [self.entry(path, files[path]) for path in sorted(files)]
            first = int(query.get("cursor", ["0"])[0])
            more = {}
            if first + self.hub.page < len(entries):
                more["link"] = (
                    f'<{self.hub.links or self.hub.url}/api/models/{org}/{name}/tree/{commit}?cursor={first + self.hub.page}>; rel="next"'
                )
            self.document(entries[first : first + self.hub.page], fault, more)
        else:
            siblings = [{"rfilename": path} for path in files]
            self.document({"id": f"{org}/{name}", "sha": commit, "private": repo.private, "siblings": siblings}, fault)

    def entry(self, path: str, item: Content) -> dict[str, Any]:
        if "/" in path:
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path.partition("/")[0]}
        record: dict[str, Any] = {"type": "file", "oid": item.digest[:40], "size": item.length, "path": path}
        if item.apart:
            record["lfs"] = {"oid": item.digest, "size": item.length, "pointerSize": 134}
        if item.xet:
            record["xetHash"] = hashlib.sha256(b"xet" + item.data).hexdigest()
        return record

    def document(self, value: Any, fault: Fault | None, headers: dict[str, str] | None = None) -> None:
        self.reply(200, json.dumps(value).encode(), {"content-type": "application/json", **(headers or {})}, fault)

    def file(self, name: str, revision: str, path: str, fault: Fault | None) -> None:
        repo = self.hub.repos.get(name)
        if not self.allowed(repo, files=True):
            return
        assert repo is not None
        commit = self.commit_of(repo, revision)
        if commit is None:
            return
        item = repo.commits[commit].get(path)
        headers = {"x-repo-commit": commit}
        if item is None:
            self.reply(404, b"{}", {**headers, "x-error-code": "EntryNotFound", "x-error-message": "Entry not found"}, None)
        elif item.apart:
            linked = {**headers, "x-linked-etag": f'"{item.digest}"', "x-linked-size": str(item.length)}
            if item.xet:
                linked["x-xet-hash"] = hashlib.sha256(b"xet" + item.data).hexdigest()
                linked["link"] = f'<{self.hub.links or self.hub.url}/api/models/{name}/xet-read-token/{commit}>; rel="xet-auth"'
            self.reply(302, b"", {**linked, "location": f"{self.hub.store}/{item.digest}?X-Signature=secret"}, None)
        else:
            self.content(item, {**headers, "etag": f'"{item.digest}"'}, fault)

    def content(self, item: Content, headers: dict[str, str], fault: Fault | None) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if span is None or (fault and fault.whole):
            self.reply(200, item, headers, fault)
            return
        first, last = int(span[1]), min(int(span[2] or item.length - 1), item.length - 1)
        self.reply(206, Content(item.span(first, last)), {**headers, "content-range": f"bytes {first}-{last}/{item.length}"}, fault)

    def reply(self, status: int, body: bytes | Content, headers: dict[str, str], fault: Fault | None) -> None:
        item = Content(body) if isinstance(body, bytes) else body
        length = item.length
        if fault and fault.spoil:
            item = Content(fault.spoil(item.span(0, length - 1)))
            length = item.length
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("content-length", str(fault.length if fault and fault.length is not None else length))
        self.end_headers()
        sent = 0
        try:
            while self.command != "HEAD" and sent < length:
                piece = item.span(sent, min(sent + 2**16, length) - 1)
                if fault and fault.cut is not None:
                    piece = piece[: fault.cut - sent]
                if not piece:
                    self.close_connection = True
                    if fault and fault.reset:
                        self.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER of no time: the connection is reset
                    break
                self.wfile.write(piece)
                sent += len(piece)
        except OSError:  # the client has had enough
            self.close_connection = True
        finally:
            token = self.headers.get("authorization")
            self.hub.answered.append(Request(self.command, self.path, self.headers.get("range"), token, self.is_store, sent))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    """Of 5, which is the class's own, the kernel drops those that come at once, and they wait for seconds."""

    def handle_error(self, *_: Any) -> None:
        """Of a client that went away, which is no error of the server; others show in what the client gets."""


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub and its store, until the end of the block."""
    hub = FakeHub()
    servers = []
    for is_store in (False, True):
        handler = type("Bound", (Handler,), {"hub": hub, "is_store": is_store})
        server = Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    hub.url, hub.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
