"""Files of the web: ranged requests, each held to be what was asked for, of the state that was found first. By the client, and the settings
for proxies, of huggingface_hub; keys of a server stand in ~/.netrc."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote

from bam_merge.address import Address
from bam_merge.checkpoints.afar import TIME, changed_afar
from bam_merge.checkpoints.header import FIRST_BYTES, FileIdentity
from bam_merge.errors import CheckpointError
from bam_merge.sources import trying
from bam_merge.sources.afar import words
from bam_merge.sources.afar.state import Absent, Found, Hidden
from bam_merge.sources.hub.client import HubUnreachable, extent, library
from bam_merge.sources.trying import Fleeting, Result, again, wait_of

TIMEOUT = 30.0
"""Seconds without a byte."""


@dataclass
class Web:
    """The folder at an address of the web. It cannot be listed: files are asked for by name."""

    address: Address
    stop: threading.Event = field(default_factory=threading.Event)

    lists = False

    @cached_property
    def headers(self) -> dict[str, str]:
        """What goes with every request; never to another server, where this one leads there."""
        import base64
        import netrc

        from bam_merge._version import __version__

        headers = {"user-agent": f"bam-merge/{__version__}", "accept-encoding": "identity"}
        try:
            known = netrc.netrc().authenticators(self.address.rest.partition("/")[0].partition(":")[0])
        except (OSError, netrc.NetrcParseError):
            known = None
        if known is not None and known[2]:
            pair = f"{known[0]}:{known[2]}".encode()
            headers["authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        return headers

    def name_of(self, file: str) -> str:
        return f"{self.address}/{file}"

    def look(self, file: str) -> Found:
        """The file's state, and its first bytes. Raises Absent, Hidden or another CheckpointError."""
        return self._again(file, lambda: self._first(file))

    def read(self, found: Found, offset: int, length: int) -> bytes:
        """Exactly these bytes of the state that was found. Raises CheckpointError."""
        if not length:
            return b""
        return self._again(found.file, lambda: self._span(found, offset, length))

    # ---- one request -------------------------------------------------------------------------------------------------------

    def _again(self, file: str, call: Callable[[], Result]) -> Result:
        return again(call, trying.WAITS, f"{self.name_of(file)}: the server", self.stop)

    def _first(self, file: str) -> Found:
        with _Response(self, file, (0, FIRST_BYTES - 1)) as response:
            first, size = extent(response)
            if response.status_code == 416 or size == 0:  # an empty file has no range
                return Found(file, 0, _etag(response), b"")
            if size is None:
                raise CheckpointError(words.no_ranges(self.name_of(file)))
            if first != 0:
                raise CheckpointError(words.other_range(self.name_of(file)))
            whole = response.status_code == 200
            data = _body(response, min(size, FIRST_BYTES))
            if len(data) < min(size, FIRST_BYTES):
                raise Fleeting(words.short(self.name_of(file), len(data), min(size, FIRST_BYTES)))
            return Found(file, size, _etag(response), data, ranges=not whole or size <= FIRST_BYTES)

    def _span(self, found: Found, offset: int, length: int) -> bytes:
        shown = self.name_of(found.file)
        match = {"if-match": found.etag} if found.etag.startswith('"') else {}
        with _Response(self, found.file, (offset, offset + length - 1), match) as response:
            first, size = extent(response)
            if response.status_code in (412, 416):
                raise CheckpointError(self._changed(found))
            now = FileIdentity(found.size if size is None else size, 0, 0, _etag(response))
            if now != found.identity:
                raise CheckpointError(changed_afar(shown, now, found.identity))
            if response.status_code == 200 and (offset, length) != (0, found.size):
                raise CheckpointError(words.no_ranges(shown))
            if first != offset:
                raise CheckpointError(words.other_range(shown))
            data = _body(response, length + 1)
        if len(data) != length:
            raise Fleeting(words.short(shown, len(data), length))
        return data

    def _changed(self, found: Found) -> str:
        """What is said where a server refuses another state than the one that is there."""
        try:
            now = self._first(found.file).identity
        except CheckpointError as error:
            return error.problems[0]
        return changed_afar(self.name_of(found.file), now, found.identity)


class _Response:
    """One answered request, to be read inside. Raises Fleeting where another one may succeed, else CheckpointError."""

    def __init__(self, web: Web, file: str, span: tuple[int, int], headers: dict[str, str] | None = None) -> None:
        self.web, self.shown, self.url = web, web.name_of(file), f"{web.address}/{quote(file)}"
        self.headers = {**web.headers, **(headers or {}), "range": f"bytes={span[0]}-{span[1]}"}

    def __enter__(self) -> Any:
        try:
            self.library = library()
        except HubUnreachable:
            raise CheckpointError(words.NO_CLIENT.format(self.shown)) from None
        self.broken: type[Exception] = self.library.errors.HfHubHTTPError.__bases__[0]
        session = self.library.get_session()
        try:
            self.stream = session.stream("GET", self.url, headers=self.headers, timeout=TIMEOUT, follow_redirects=True)
            response = self.stream.__enter__()
        except Exception as error:
            raise self._told(error) from None
        try:
            self._check(response)
        except CheckpointError:
            self.stream.__exit__(None, None, None)
            raise
        return response

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.stream.__exit__(kind, error, trace)
        if error is not None and isinstance(error, self.broken):
            raise self._told(error) from None

    def _told(self, error: BaseException) -> CheckpointError:
        kind = type(error).__name__
        if isinstance(error, self.library.errors.OfflineModeIsEnabled):
            return CheckpointError(f"{self.shown}: nothing of the web is asked for, since HF_HUB_OFFLINE is set.")
        return Fleeting(words.broke(self.shown, kind), reached=not kind.startswith("Connect"))

    def _check(self, response: Any) -> None:
        status = response.status_code
        if status in (401, 407):
            raise CheckpointError(words.refused(self.shown, self.web.address.scheme, status))
        if status == 403:
            raise Hidden(words.refused(self.shown, self.web.address.scheme, status))
        if status in (404, 410):
            raise Absent(words.gone(self.shown))
        if status in (408, 425, 429) or status >= 500:
            wait = wait_of(response.headers)
            raise Fleeting(words.busy(self.shown, status, wait), wait)
        if status not in (200, 206, 412, 416):
            raise CheckpointError(words.other_status(self.shown, status))
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise CheckpointError(words.encoded(self.shown))


def _etag(response: Any) -> str:
    """What tells the state of the file: its etag, or else when it was changed last."""
    time = response.headers.get("last-modified")
    return str(response.headers.get("etag") or (f"{TIME}{time}" if time else ""))


def _body(response: Any, most: int) -> bytes:
    data = bytearray()
    for piece in response.iter_bytes():
        data += piece
        if len(data) >= most:
            break
    return bytes(data[:most])
