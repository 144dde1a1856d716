"""Addresses of folders elsewhere: s3://bucket/model, gs://..., az://..., https://... By spelling alone; nothing is looked up."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.hub_id import MARK, hub_id
from bam_merge.text import printable

_SCHEME = re.compile(r"[a-z][a-z0-9+]*(?=://)", re.IGNORECASE)
_FILE = re.compile(r"\.(safetensors|gguf|bin|pt|pth|json|zip|tar|gz|onnx)$", re.IGNORECASE)
WEB = ("http", "https")
IN_NAMES = "environment, where keys belong: recipes and manifests are passed on"


@dataclass(frozen=True)
class Address:
    """A folder elsewhere. It holds no password, no query and no fragment, so that it can be shown and recorded as it is."""

    scheme: str
    rest: str

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.rest.rpartition("/")[2]

    @property
    def is_web(self) -> bool:
        return self.scheme in WEB

    def __str__(self) -> str:
        return f"{self.scheme}://{self.rest}"


def is_address(text: str) -> bool:
    """Whether `text` is spelled as an address, and no model of the hub."""
    return _SCHEME.match(text) is not None and not text.startswith(MARK)


def address(text: str, error: type[BamMergeError] = CheckpointError) -> Address | None:
    """The folder elsewhere that `text` means; None where it is no address. Raises `error` for one that can be none; it is not repeated
    where it may hold a password."""
    if not is_address(text):
        return None
    hub_id(text, error)  # of a page of the hub, or with a password: what is said of addresses of the web
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    if problem := _problem(scheme, rest):
        raise error(problem)
    return Address(scheme, rest.rstrip("/") or "/")


def _problem(scheme: str, rest: str) -> str | None:
    """What is wrong with an address, in words that repeat nothing which may be secret."""
    try:
        parts = urlsplit(f"{scheme}://{rest}")
    except ValueError:
        return f"an address of {scheme}:// that cannot be read. Write {scheme}://PLACE/FOLDER."
    if ":" in parts.netloc.rpartition("@")[0]:
        return f"an address of {scheme}:// with a password in it. Take it out, and set it in the {IN_NAMES}."
    if "?" in rest or "#" in rest:
        return (
            f"{scheme}://{printable(parts.netloc)}...: an address with a query or a fragment, which may be a signature. Take it out, "
            f"and set what it is for in the {IN_NAMES}."
        )
    shown = printable(f"{scheme}://{rest}")
    if "::" in rest or not rest.strip("/"):
        return f"{shown}: no address of a folder. Write {scheme}://PLACE/FOLDER."
    if rest.lower().endswith(".gguf"):
        return f"{shown}: a GGUF file, which is never merged. Take the repository of the original model."
    if _FILE.search(rest):
        return f"{shown}: the address of a file. Give that of the folder that holds config.json, or download the file."
    if not (rest.isprintable() and "\\" not in rest) or any(part in (".", "..") for part in rest.split("/")):
        return f"{shown}: no address of a folder. Write {scheme}://PLACE/FOLDER."
    return None
