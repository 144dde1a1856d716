"""A server of the web on 127.0.0.1 for tests: folders of models, with ranges, etags and If-Match, and faults to order (hub_server.Fault).

GET /FOLDER/FILE, with Range: the bytes; 404 for what is not there; 412 where If-Match names another state; 401 without the password that
`hub.token` asks for; a redirect to another server for folders that `elsewhere` names.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hub_server import COUNTING, Content, FakeHub, Handler, Request, Server


@dataclass
class FakeWeb(FakeHub):
    """Files by path, and the etags that they have other than by their content; `weak` and `dated` say how states are told."""

    files: dict[str, Content] = field(default_factory=dict)
    etags: dict[str, str | None] = field(default_factory=dict)
    forbidden: str = "a^"
    elsewhere: str = "a^"

    def put(self, name: str, folder: Path) -> str:
        """A folder as it is on the disk. Returns its address."""
        for path in sorted(folder.iterdir()):
            self.files[f"{name}/{path.name}"] = Content(path.read_bytes())
        return f"{self.url}/{name}"

    def etag(self, path: str) -> str | None:
        return self.etags[path] if path in self.etags else f'"{self.files[path].digest[:16]}"'


class WebHandler(Handler):
    hub: FakeWeb

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        fault, web = self.hub.fault_of(self.command, self.path), self.hub
        if fault and fault.pause:
            time.sleep(fault.pause)
        if fault and fault.status:
            self.reply(fault.status, b"a fault that a test ordered, of secret-signature", fault.headers, None)
        elif web.token is not None and self.headers.get("authorization") != web.token:
            self.reply(401, b"", {}, None)
        elif re.search(web.elsewhere, path) and not self.is_store:
            self.reply(302, b"", {"location": f"{web.store}/{path}?X-Signature=secret-signature"}, None)
        elif re.search(web.forbidden, path):
            self.reply(403, b"", {}, None)
        elif path not in web.files:
            self.reply(404, b"", {}, None)
        else:
            etag, wanted = web.etag(path), self.headers.get("if-match")
            if wanted is not None and wanted != etag:
                self.reply(412, b"", {}, None)
                return
            self.content(web.files[path], {**({"etag": etag} if etag else {}), **(fault.headers if fault else {})}, fault)


@contextmanager
def serving_web() -> Iterator[FakeWeb]:
    """A server and another one that it may lead to, until the end of the block."""
    web = FakeWeb()
    servers = []
    for is_store in (False, True):
        handler = type("Bound", (WebHandler,), {"hub": web, "is_store": is_store})
        server = Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    web.url, web.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield web
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


__all__ = ["COUNTING", "FakeWeb", "Request", "serving_web"]
