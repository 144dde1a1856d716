"""Names of models on the Hugging Face hub: org/name, org/name@revision, hf://org/name@revision. By spelling alone; nothing is looked up."""

import re
from dataclasses import dataclass

from bam_merge.errors import BamMergeError, CheckpointError
from bam_merge.text import printable

MARK = "hf://"

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(f"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][^\x00-\x20\x7f~^:?*\[\\%#&<>\"'|{}`]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADDRESS = re.compile(r"https?://(?:[^/@]*@)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<rest>[^?#]*)", re.IGNORECASE)
_FILE = re.compile(r"\.(?:safetensors|gguf|bin|pt|pth|zip|tar|gz)$", re.IGNORECASE)
_KINDS = ("datasets", "spaces", "buckets", "kernels")


@dataclass(frozen=True)
class HubId:
    """A model of the hub. `revision`: a branch, a tag or a commit; None for the main branch. `marked`: it was written hf://, so that no
    folder can be meant."""

    repo: str
    revision: str | None = None
    marked: bool = False

    @property
    def commit(self) -> str | None:
        """The revision where it is a whole commit hash, which never means another state of the files."""
        return self.revision if self.revision is not None and _COMMIT.fullmatch(self.revision) else None

    def at(self, commit: str) -> "HubId":
        """The same model as it is at a commit: what documents record."""
        return HubId(self.repo, commit)

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_id(text: str, error: type[BamMergeError] = CheckpointError) -> HubId | None:
    """The model of the hub that `text` may mean; None where it can only be a path. Raises `error` for hf:// and an address that are none.

    org/name can be a folder as well: who has looked and found none may take it for a model of the hub.
    """
    if problem := address_problem(text):
        raise error(problem)
    marked = text.startswith(MARK)
    repo, at, revision = text.removeprefix(MARK).removeprefix("models/" if marked and text.count("/") > 3 else "").partition("@")
    if _is_repository(repo) and (not at or _is_revision(revision)):
        return HubId(repo, revision if at else None, marked)
    return None


def address_problem(text: str) -> str | None:
    """Why `text`, which is an address, names no model, in words that end a message; None where it names one, or is no address.

    An address of the web is not repeated: it can hold a password or a token.
    """
    if text.lower().startswith(("http://", "https://")):
        found = _ADDRESS.match(text)
        parts = found["rest"].strip("/").split("/") if found else []
        repo = "/".join(parts[:2])
        if found is None and (elsewhere := _folder_of_the_web(text)):
            return None if elsewhere == "folder" else elsewhere
        if len(parts) < 2 or parts[0] in _KINDS or not _is_repository(repo):
            return "an address of the web. Download the model and give its folder, or write org/name for a model of the Hugging Face hub."
        revision = f"@{parts[3]}" if len(parts) == 4 and parts[2] in ("tree", "commit") and _is_revision(parts[3]) else ""
        return f"an address of the web; for this model of the hub write {repo}{revision}."
    if not text.startswith(MARK):
        return None
    repo, at, revision = text.removeprefix(MARK).removeprefix("models/" if text.count("/") > 3 else "").partition("@")
    if repo.partition("/")[0] in _KINDS:
        return f"{printable(text)}: {repo.partition('/')[0]} of the hub hold no model that can be merged. Write hf://org/name."
    if not _is_repository(repo):
        return f"{printable(text)}: no name of a model on the hub. Write hf://org/name, or hf://org/name@revision."
    if at and not _is_revision(revision):
        found_revision = printable(repr(revision))
        return f"{printable(text)}: {found_revision} is no revision. Write a branch, a tag or a commit after the @, or leave it out."
    return None


def _folder_of_the_web(text: str) -> str | None:
    """'folder' for what may be the address of one; None for that of a file, and of nothing; else what is wrong with it."""
    place, _, path = text.partition("://")[2].partition("/")
    if "@" in place or "@" in path.partition("?")[0]:
        return (
            "an address of the web with a user or a password in it, which recipes and manifests would pass on. Take it out, and write it "
            "into ~/.netrc. Or download the model and give its folder."
        )
    return "folder" if place and not _FILE.search(path.partition("?")[0]) else None


def _is_repository(text: str) -> bool:
    return bool(_REPOSITORY.fullmatch(text)) and "--" not in text and ".." not in text and not text.endswith(".git")


def _is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text and "//" not in text and not text.endswith(("/", ".lock"))
