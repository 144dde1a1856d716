"""As much of S3 on 127.0.0.1 as s3fs asks for to read folders: listings, heads, and objects by ranges. Nothing is signed or checked but
that there is a signature by the key that is known."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from hub_server import Server

KEY = "AKIAPLANTED"


class FakeS3:
    """Objects by bucket/key; `faults` are statuses of the next answers to requests for objects."""

    def __init__(self) -> None:
        self.url = ""
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.faults: list[int] = []
        self.spans: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**17
    s3: FakeS3

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path).strip("/"), parse_qs(parts.query)
        if f"Credential={KEY}/" not in (self.headers.get("authorization") or ""):
            self.reply(403, b"<Error><Code>InvalidAccessKeyId</Code><Message>no</Message></Error>")
        elif "/" not in path:
            self.list(path, query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
        elif path not in self.s3.objects:
            self.reply(404, b"<Error><Code>NoSuchKey</Code><Message>no</Message></Error>")
        elif self.command == "GET" and self.s3.faults:
            status = self.s3.faults.pop()
            code = {503: "SlowDown", 500: "InternalError"}.get(status, "ExpiredToken")
            self.reply(status, f"<Error><Code>{code}</Code><Message>secret-signature</Message></Error>".encode())
        else:
            self.object(path)

    do_HEAD = do_GET

    def object(self, path: str) -> None:
        data = self.s3.objects[path]
        headers = {"ETag": f'"{self.s3.etags.get(path, "one")}"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if self.command == "GET":
            self.s3.spans.append((path, self.headers.get("range")))
        if span is None:
            self.reply(200, data, headers)
            return
        first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
        self.reply(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def list(self, bucket: str, prefix: str, delimiter: str) -> None:
        keys = sorted(name.partition("/")[2] for name in self.s3.objects if name.startswith(f"{bucket}/"))
        keys = [key for key in keys if key.startswith(prefix)]
        folders = sorted({prefix + key[len(prefix) :].partition("/")[0] + "/" for key in keys if delimiter and "/" in key[len(prefix) :]})
        files = [key for key in keys if not delimiter or "/" not in key[len(prefix) :]]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2015-10-21T07:28:00.000Z</LastModified>"
            f"<ETag>&quot;{self.s3.etags.get(f'{bucket}/{key}', 'one')}&quot;</ETag><Size>{len(self.s3.objects[f'{bucket}/{key}'])}</Size></Contents>"
            for key in files
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        head = f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(files)}</KeyCount><IsTruncated>false</IsTruncated>"
        self.reply(200, f"<ListBucketResult>{head}{contents}{common}</ListBucketResult>".encode())

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving_s3() -> Iterator[FakeS3]:
    """A server until the end of the block."""
    s3 = FakeS3()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"s3": s3}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    s3.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield s3
    finally:
        server.shutdown()
        server.server_close()
