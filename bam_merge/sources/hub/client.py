"""Requests to the Hugging Face hub, by the session, the settings and the token of huggingface_hub, which is imported when it is needed.

A request is made again a few times where that can help: the connection breaks, the hub is busy or down. What it answers becomes words of
ours (words.py); words of the server or of a library are never repeated, since they can hold a token or a signed address.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from urllib.parse import quote, urlsplit

from bam_merge._version import __version__
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.hub_id import HubId
from bam_merge.sources.hub import words as hub_words
from bam_merge.sources.trying import WAITS, Fleeting, Result, again, wait_of

MOST_DOCUMENT = 20_000_000
"""Bytes of a document that are read; a page of a listing has some 300 kB."""


class HubUnreachable(Fleeting):
    """The hub gave no answer, or one that may be another later: what is in the cache can be used."""


def library() -> ModuleType:
    """huggingface_hub. Raises HubUnreachable when it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise HubUnreachable(hub_words.NOT_INSTALLED) from None
    return huggingface_hub


@dataclass(frozen=True)
class Answer:
    """A response whose body can be read. `length`: bytes of the whole file, where the headers say; `first`: where in it the body begins."""

    response: Any
    first: int
    length: int | None
    pieces: Callable[[], Iterator[bytes]]

    @property
    def digest(self) -> str:
        """The file's digest, as the hub names it before it leads elsewhere; "" where it names none."""
        steps = (*self.response.history, self.response)
        found = next((step.headers["x-linked-etag"] for step in steps if "x-linked-etag" in step.headers), steps[0].headers.get("etag", ""))
        return str(found).removeprefix("W/").strip('"')

    def body(self, most: int) -> bytes:
        """At most so many bytes of the body."""
        data = bytearray()
        for piece in self.pieces():
            data += piece
            if len(data) >= most:
                break
        return bytes(data[:most])


@dataclass
class Hub:
    """The hub as this process is set up to reach it."""

    endpoint: str
    headers: Mapping[str, str] = field(repr=False)
    timeout: float
    offline: Callable[[], bool]
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def shown(self) -> str:
        """Its address, for messages."""
        return hub_words.shown_endpoint(self.endpoint)

    # ---- what is asked for -------------------------------------------------------------------------------------------------

    def document(self, path: str, of: HubId) -> tuple[Any, str | None]:
        """The JSON document at `path` of the interface, and the path of the next page, if there is one. Raises CheckpointError."""

        def get() -> tuple[Any, str | None]:
            with self.get(f"{self.endpoint}/api/{path}", of) as answer:
                data = answer.body(MOST_DOCUMENT)
                link = answer.response.links.get("next", {}).get("url")
            more = urlsplit(link).query if link else ""  # asked of the same hub, wherever the link leads: the token goes with it
            try:
                return load_json(data), f"{path.partition('?')[0]}?{more}" if more else None
            except ValueError:
                raise HubUnreachable(f"{of}: {hub_words.NO_HUB.format(self.shown)}") from None

        return self.again(get, of)

    def file(self, of: HubId, name: str) -> str:
        """The address of a file at a commit."""
        return f"{self.endpoint}/{of.repo}/resolve/{quote(of.revision or 'main', safe='')}/{quote(name)}"

    def span(self, of: HubId, name: str, first: int, count: int, size: int, digest: str = "") -> bytes:
        """`count` bytes of a file from byte `first` on, and nothing else of it. Raises CheckpointError, also where the server says of the
        file that it has another `digest`."""

        def get() -> bytes:
            with self.get(self.file(of, name), of, name, (first, first + count - 1)) as answer:
                if answer.length is not None and answer.length != size:
                    raise CheckpointError(hub_words.other_length(of, name, size, answer.length))
                if first < answer.first or (answer.first == 0 < first and count + first > 2 * 1024 * 1024):
                    raise CheckpointError(hub_words.no_ranges(of, name))
                if digest and answer.digest and len(answer.digest) == len(digest) and answer.digest != digest:
                    raise CheckpointError(hub_words.other_etag(of, name, answer.digest, digest))
                data = answer.body(first - answer.first + count)[first - answer.first :]
            if len(data) != count:
                raise HubUnreachable(hub_words.broken(of, name, "Ended", self.shown))
            return data

        return self.again(get, of)

    @contextmanager
    def get(self, url: str, of: HubId, name: str = "", span: tuple[int, int | None] | None = None) -> Iterator[Answer]:
        """One request, whose body is read inside. Raises HubUnreachable where another one may succeed, else CheckpointError."""
        if self.offline():
            raise HubUnreachable(hub_words.OFFLINE)
        hf = library()
        errors = hf.errors
        broken: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of the library that makes the requests
        headers = {**self.headers, "accept-encoding": "identity"}
        if span is not None:
            headers["range"] = f"bytes={span[0]}-{'' if span[1] is None else span[1]}"
        try:
            with hf.get_session().stream("GET", url, headers=headers, timeout=self.timeout, follow_redirects=True) as response:
                if response.status_code >= 400:
                    raise self.refused(response, of, name)
                first, length = extent(response)
                yield Answer(response, first, length, response.iter_bytes)  # as they come: a size would hold back the last ones
        except errors.OfflineModeIsEnabled:
            raise HubUnreachable(hub_words.OFFLINE) from None
        except broken as error:
            kind = type(error).__name__
            raise HubUnreachable(hub_words.broken(of, name, kind, self.shown), reached=not kind.startswith("Connect")) from None

    # ---- what goes wrong ---------------------------------------------------------------------------------------------------

    def refused(self, response: Any, of: HubId, name: str) -> CheckpointError:
        """What an answer from 400 on means."""
        status, code = response.status_code, response.headers.get("x-error-code", "")
        bad_token = "invalid credentials" in response.headers.get("x-error-message", "").lower()
        logged_in = "authorization" in self.headers
        if status in (408, 425, 429) or status >= 500:
            wait = wait_of(response.headers)
            return HubUnreachable(hub_words.busy(of, status, wait), wait)
        nearest = ""
        if status == 404 and code == "RevisionNotFound":
            nearest = self._nearest_revision(of)
        elif status in (401, 404) and code not in ("EntryNotFound", "GatedRepo") and not name and not bad_token:
            nearest = self._nearest_repo(of)
        return CheckpointError(hub_words.refused(of, name, status, code, logged_in, bad_token, nearest))

    def again(self, call: Callable[[], Result], of: HubId, got: Callable[[], int] = lambda: 0) -> Result:
        """What `call` gives, tried again while it may help: as often as there is more in `got` than before. Raises CheckpointError."""
        return again(call, WAITS, f"{of}: the hub", self.stop, got, self.offline)

    def _nearest_revision(self, of: HubId) -> str:
        with suppress(CheckpointError, AttributeError, TypeError, KeyError):
            with self.get(f"{self.endpoint}/api/models/{of.repo}/refs", of) as answer:
                refs = _json(answer.body(10**6))
            return hub_words.nearest_of(of.revision or "", [ref["name"] for kind in ("branches", "tags") for ref in refs.get(kind, ())])
        return ""

    def _nearest_repo(self, of: HubId) -> str:
        with suppress(CheckpointError, AttributeError, TypeError, KeyError):
            with self.get(f"{self.endpoint}/api/models?author={of.repo.partition('/')[0]}&limit=100", of, "a list") as answer:
                found = _json(answer.body(10**6))
            return hub_words.nearest_of(of.repo, [str(item.get("id") or item.get("modelId")) for item in found])
        return ""


def hub() -> Hub:
    """The hub, as the environment says. Raises HubUnreachable when huggingface_hub is not installed, CheckpointError where its address or
    the token can be none."""
    hf = library()
    constants = hf.constants
    headers = {"user-agent": f"bam-merge/{__version__}; hf_hub/{hf.__version__}"}
    try:
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else hf.get_token()
    except Exception:  # whatever a login service answers; it is not repeated
        raise CheckpointError(hub_words.NO_TOKEN) from None
    if token is not None:
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise CheckpointError(hub_words.BAD_TOKEN)
        headers["authorization"] = f"Bearer {token}"
    try:
        hf.get_session().build_request("GET", constants.ENDPOINT, headers=headers)
    except Exception:  # which one depends on the library that makes the requests
        raise CheckpointError(hub_words.BAD_ENDPOINT) from None
    return Hub(constants.ENDPOINT, headers, constants.HF_HUB_DOWNLOAD_TIMEOUT, lambda: bool(constants.is_offline_mode()))


# ---- headers ---------------------------------------------------------------------------------------------------------------


def extent(response: Any) -> tuple[int, int | None]:
    """(where the body begins in the file, how long the file is), as far as the headers say."""
    if response.status_code == 206:
        span, _, total = response.headers.get("content-range", "").removeprefix("bytes ").partition("/")
        first = span.partition("-")[0]
        return int(first) if first.isdigit() else -1, int(total) if total.isdigit() else None
    length = response.headers.get("content-length", "")
    return 0, int(length) if length.isdigit() else None


def _json(data: bytes) -> Any:
    try:
        return load_json(data)
    except ValueError:
        return {}
