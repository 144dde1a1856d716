"""Files of stores that fsspec knows: S3, Google Cloud, Azure and others. Each has a package of its own, with its own keys and retries."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bam_merge.address import Address
from bam_merge.checkpoints.afar import TIME, changed_afar
from bam_merge.errors import CheckpointError
from bam_merge.sources import trying
from bam_merge.sources.afar import words
from bam_merge.sources.afar.state import Absent, Found
from bam_merge.sources.trying import Fleeting, Result, again, wait_of
from bam_merge.text import nearest

STATES = ("generation", "ETag", "etag", "e_tag", "md5Hash", "content_md5")
"""What stores call that which tells a file's states apart, surest first."""

TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
"""What they call the time of its last change."""

NO_KEYS = (
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", "UnauthorizedSSOTokenError",
    "SSOTokenLoadError", "ProfileNotFound", "ClientAuthenticationError", "CredentialUnavailableError", "DefaultCredentialsError",
    "RefreshError", "AuthenticationException",
)  # fmt: skip
"""Names of errors of the stores' packages that mean that there are no keys, or ones that do not count any more."""


BROKEN = ("Timeout", "Connect", "Disconnected", "Payload", "Incomplete", "Endpoint", "Retries")
"""What stands in the names of errors of a connection."""


@dataclass
class Store:
    """The folder at an address that fsspec opens."""

    address: Address
    stop: threading.Event = field(default_factory=threading.Event)

    lists = True

    @cached_property
    def opened(self) -> tuple[Any, str]:
        """fsspec's file system and the folder's path in it. Raises CheckpointError."""
        shown, scheme = str(self.address), self.address.scheme
        try:
            from fsspec.core import url_to_fs
            from fsspec.registry import known_implementations, registry
        except ImportError:
            raise CheckpointError(words.NO_FSSPEC.format(shown, scheme)) from None
        known = {*known_implementations, *registry}
        if scheme not in known:
            raise CheckpointError(words.no_scheme(shown, nearest(scheme, known)))
        try:
            system, path = url_to_fs(str(self.address))
        except ImportError:
            raise CheckpointError(words.no_package(shown, scheme)) from None
        except Exception as error:  # ValueError of adlfs without an account, among others
            raise self._told(error, shown, opening=True) from None
        return system, path.rstrip("/")

    def name_of(self, file: str) -> str:
        return f"{self.address}/{file}"

    def list(self) -> tuple[dict[str, Found], tuple[str, ...]]:
        """The files in the folder, and the folders in it. Raises CheckpointError."""
        system, path = self.opened

        def get() -> Any:
            system.invalidate_cache()
            return system.ls(path, detail=True)

        try:
            entries = self._again(str(self.address), get)
        except Absent:
            raise CheckpointError(words.no_folder(str(self.address), self._near())) from None
        names = [(str(entry["name"]).rstrip("/").rpartition("/")[2], entry) for entry in entries]
        files = {name: _found(name, entry) for name, entry in names if name and entry.get("type") == "file"}
        if not entries or (list(files) == [self.address.name] and str(entries[0]["name"]).strip("/") == path.strip("/")):
            raise CheckpointError(words.no_folder(str(self.address), self._near()))
        return files, tuple(name for name, entry in names if name and entry.get("type") == "directory")

    def look(self, file: str) -> Found:
        """The file's state. Raises Absent or another CheckpointError."""
        system, path = self.opened

        def get() -> Found:
            system.invalidate_cache()
            return _found(file, system.info(f"{path}/{file}"))

        return self._again(self.name_of(file), get)

    def read(self, found: Found, offset: int, length: int) -> bytes:
        """Exactly these bytes. Raises CheckpointError. (Whether it is still the file that was found is asked by `look`.)"""
        system, path = self.opened
        shown = self.name_of(found.file)

        def get() -> bytes:
            data = bytes(system.cat_file(f"{path}/{found.file}", start=offset, end=offset + length))
            if len(data) > length:
                raise CheckpointError(words.no_ranges(shown))
            if len(data) < length:
                raise Fleeting(words.short(shown, len(data), length))
            return data

        if not length:
            return b""
        try:
            return self._again(shown, get)
        except Absent:
            raise
        except CheckpointError as error:
            raise self._shortened(found, error) from None

    def _shortened(self, found: Found, error: CheckpointError) -> CheckpointError:
        """What is wrong with a file that did not give what it had: it may be another one by now."""
        try:
            now = self.look(found.file).identity
        except CheckpointError:
            return error
        return error if now == found.identity else CheckpointError(changed_afar(self.name_of(found.file), now, found.identity))

    def _near(self) -> str:
        """'; did you mean X?' of the folders beside this one."""
        system, path = self.opened
        try:
            beside = [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in system.ls(path.rpartition("/")[0], detail=True)]
        except Exception:  # it may not be listed
            return ""
        return nearest(path.rpartition("/")[2], beside)

    # ---- what goes wrong ---------------------------------------------------------------------------------------------------

    def _again(self, shown: str, call: Callable[[], Result]) -> Result:
        def told() -> Result:
            try:
                return call()
            except CheckpointError:
                raise
            except Exception as error:  # of the store's package: there is no common class
                raise self._told(error, shown) from None

        return again(told, trying.WAITS, f"{shown}: the store", self.stop)

    def _told(self, error: Exception, shown: str, opening: bool = False) -> CheckpointError:
        """An error of a store's package in words of ours."""
        kind, scheme = type(error).__name__, self.address.scheme
        status, headers = _answer(error)
        if isinstance(error, ImportError):
            return CheckpointError(words.no_package(shown, scheme))
        if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, 410):
            return Absent(words.gone(shown))
        if isinstance(error, PermissionError) or kind in NO_KEYS or status in (401, 403) or (opening and isinstance(error, ValueError)):
            return CheckpointError(words.refused(shown, scheme, status))
        if status is not None and (status in (408, 425, 429) or status >= 500):
            wait = wait_of(headers)
            return Fleeting(words.busy(shown, status, wait), wait)
        if isinstance(error, OSError | EOFError) or any(word in kind for word in BROKEN):
            return Fleeting(words.broke(shown, kind), reached=not kind.startswith("Connect"))
        return CheckpointError(words.failed(shown, kind))


def _answer(error: Exception) -> tuple[int | None, Mapping[str, str]]:
    """The status of an answer that an error tells of, and its headers in small letters, by the ways that the stores' packages have."""
    meta = getattr(error, "response", None)
    meta = meta.get("ResponseMetadata", {}) if isinstance(meta, dict) else {}
    found = [meta.get("HTTPStatusCode"), *(getattr(error, name, None) for name in ("status", "status_code", "code"))]
    status = next((int(str(value)) for value in found if str(value).isdigit() and 100 <= int(str(value)) < 600), None)
    headers = meta.get("HTTPHeaders") or getattr(error, "headers", None) or {}
    try:
        return status, {str(key).lower(): str(value) for key, value in headers.items()}
    except AttributeError:
        return status, {}


def _found(file: str, entry: Mapping[str, Any]) -> Found:
    state = next((str(entry[key]).strip('"') for key in STATES if entry.get(key)), "")
    time = next((f"{TIME}{entry[key]}" for key in TIMES if entry.get(key)), "")
    return Found(file, int(entry.get("size") or 0), state or time)
