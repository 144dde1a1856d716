"""A result goes to the Hugging Face hub, by huggingface_hub: in one commit, so that it is there whole or not at all, private unless asked.

Large files are sent before the commit, and those that the hub has already are not sent again: a push that broke off is gone on with by
pushing again. What is then on the hub is compared with what is here, by digests that the hub lists.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bam_merge._version import __version__
from bam_merge.checkpoints.provenance import MANIFEST
from bam_merge.errors import OutputError
from bam_merge.hub_id import HubId, hub_id
from bam_merge.paths import located
from bam_merge.publishing import hub_words
from bam_merge.publishing.pushable import pushable
from bam_merge.publishing.replacing import SAVED
from bam_merge.sources.hub.client import Hub, hub, library
from bam_merge.sources.hub.words import OFFLINE
from bam_merge.text import human_bytes, printable, some

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
"""Endings of weights: a repository that has such files and no manifest of ours is somebody's model."""


@dataclass(frozen=True)
class Pushed:
    """Where a result is on the hub: the model, the commit, whether it is private, and its files."""

    repo: str
    revision: str
    commit: str
    private: bool
    files: tuple[str, ...]

    @property
    def place(self) -> str:
        """As a recipe names it."""
        return f"{self.repo}@{self.commit}"


def push(
    folder: str | os.PathLike[str],
    repo: str,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    notify: Callable[[str], None] | None = None,
    bars: bool = False,
) -> Pushed:
    """Upload the merged `folder` as the model `repo` ("org/name") of the hub, in one commit on the branch `revision` (default: main).

    Raises VerificationFailed for a folder that verify refuses, VerifyError for one that is no result and of no known kind, OutputError for
    what the hub refuses. A model that is there already must be a result too, and is public only where `public` says so.
    """
    path, of, say = located(folder), _name(repo, revision), notify or _nothing
    found = pushable(path)
    for note in found.notes:
        say(f"{printable(str(path))}: {note}.")
    sizes = {name: (path / name).stat().st_size for name in found.files}
    with _quiet(bars):
        upload = _Upload(of, hub(), say)
        there = upload.prepare(public)
        stale = _stale(of, there.files, found.files)
        say(f"{of}: {human_bytes(sum(sizes.values()))} in {len(sizes)} files go to {upload.hub.shown}.")
        commit = upload.commit(path, found.files, stale, message or f"Upload by bam-merge {__version__}", there.commit)
        upload.compare(path, found.files, commit)
    if stale:
        say(f"{of}: {some(stale)}: of what was there before, removed.")
    if other := sorted(set(there.files) - set(found.files) - set(stale)):
        say(f"{of}: {some(other, 8)}: there before, and not of this folder; kept.")
    return Pushed(of.repo, of.revision or "main", commit, there.private, found.files)


def _nothing(text: str) -> None:
    """What is said where nobody listens."""


def _name(repo: str, revision: str | None) -> HubId:
    """The model that is pushed to. Raises OutputError."""
    found = hub_id(repo, OutputError)
    if found is None:
        raise OutputError(f"{printable(repo)!r} is no name of a model on the hub. Write org/name.")
    if found.revision is not None:
        raise OutputError(f"{printable(repo)!r}: write the branch as --revision {printable(found.revision)}.")
    if revision is None:
        return HubId(found.repo)
    named = hub_id(f"{found.repo}@{revision}")
    if named is None or named.commit is not None or revision.startswith("refs/"):
        raise OutputError(f"--revision {printable(revision)!r} is no name of a branch.")
    return HubId(found.repo, revision)


def _stale(of: HubId, there: Sequence[str], files: Sequence[str]) -> list[str]:
    """Files of an earlier result that this one does not have, and that a loader would take with it. Raises OutputError."""
    if MANIFEST not in there and any(name.endswith(WEIGHTS) for name in there):
        weights = [name for name in there if name.endswith(WEIGHTS)]
        raise OutputError(
            f"{of}: there is a model on the hub that bam-merge did not make ({some(weights)}). Push to another name, or remove it there."
        )
    patterns = [pattern.replace("#", "[0-9]") for pattern in SAVED]
    return [name for name in there if name not in files and any(fnmatchcase(name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class _There:
    """What is on the hub before: the commit that the branch is at, its files, and whether the model is private."""

    commit: str | None
    files: tuple[str, ...]
    private: bool


class _Upload:
    """The requests of one push."""

    def __init__(self, of: HubId, connection: Hub, notify: Callable[[str], None]) -> None:
        if connection.offline():
            raise OutputError(f"{of}: {OFFLINE}.")
        if "authorization" not in connection.headers:
            raise OutputError(hub_words.NOT_LOGGED_IN.format(of))
        self.of, self.hub, self.notify, self.library = of, connection, notify, library()
        token = connection.headers["authorization"].removeprefix("Bearer ")
        self.api = self.library.HfApi(endpoint=connection.endpoint, token=token, library_name="bam-merge", library_version=__version__)

    def prepare(self, public: bool) -> _There:
        """The model on the hub, made where it is not there, and its branch. Raises OutputError."""
        errors, repo, branch = self.library.errors, self.of.repo, self.of.revision
        with self._doing("look for the model"):
            try:
                info = self.api.model_info(repo)
            except errors.RepositoryNotFoundError:
                info = None
        if info is not None and not info.private and not public:
            raise OutputError(f"{self.of}: this model is public on the hub. If that is meant, push with --public; or push to another name.")
        if info is None:
            with self._doing(hub_words.MAKE):
                self.api.create_repo(repo, private=not public)
                info = self.api.model_info(repo)
        elif info.private and public:
            self.notify(f"{self.of}: this model is private on the hub, and stays so: its settings there make it public.")
        if branch not in (None, "main"):
            with self._doing("make the branch"):
                self.api.create_branch(repo, branch=branch, exist_ok=True)
                info = self.api.model_info(repo, revision=branch)
        return _There(info.sha, tuple(item.rfilename for item in info.siblings or ()), bool(info.private))

    def commit(self, folder: Path, files: Sequence[str], stale: Sequence[str], message: str, parent: str | None) -> str:
        """One commit of these files and deletions; the commit's hash. Raises OutputError."""
        with self._doing("upload"):
            operations: list[Any] = [self.library.CommitOperationAdd(name, str(folder / name)) for name in files]
            operations += [self.library.CommitOperationDelete(name) for name in stale]
            done = self.api.create_commit(self.of.repo, operations, commit_message=message, revision=self.of.revision, parent_commit=parent)
        return str(done.oid)

    def compare(self, folder: Path, files: Sequence[str], commit: str) -> None:
        """Raise OutputError unless the hub lists every file, with the digest that it has here."""
        with self._doing("look at what was uploaded"):
            entries = self.api.list_repo_tree(self.of.repo, revision=commit)
            listed = {
                entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in entries if hasattr(entry, "size")
            }
        wrong = [name for name in files if name not in listed or listed[name] != _digest(folder / name, len(listed[name][1]))]
        if wrong:
            raise OutputError(hub_words.unlike(self.of, some(wrong)))

    @contextmanager
    def _doing(self, doing: str) -> Iterator[None]:
        """What the library raises, in words of ours: its own can hold signed addresses."""
        try:
            yield
        except Exception as error:
            responses = (getattr(item, "response", None) for item in _causes(error))
            response = next((item for item in responses if item is not None), None)
            if response is not None:
                code = response.headers.get("x-error-code", "")
                raise OutputError(hub_words.answered(self.of, response.status_code, doing, code)) from None
            local = next((item for item in _causes(error) if isinstance(item, OSError) and item.filename), None)
            if local is not None:
                raise OutputError(f"{printable(str(local.filename))}: {local.strerror}, while it was pushed.") from None
            raise OutputError(hub_words.broke(self.of, doing, self.hub.shown, type(_causes(error)[-1]).__name__)) from None


def _causes(error: BaseException) -> list[BaseException]:
    """An error, and what it came from."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__
    return found


def _digest(path: Path, length: int) -> tuple[int, str]:
    """(bytes, digest) of a file as the hub lists it: SHA-256 where it has 64 digits, or git's of a blob."""
    size = path.stat().st_size
    digest = hashlib.sha256() if length == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return size, digest.hexdigest()


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """The library's own remarks are not shown: they repeat addresses, which can be signed."""
    hf = library()
    logs, was_off = hf.utils.logging, hf.utils.are_progress_bars_disabled()
    level = logs.get_verbosity()
    logs.set_verbosity(logs.CRITICAL)
    if not bars and not was_off:
        hf.utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logs.set_verbosity(level)
        if not bars and not was_off:
            hf.utils.enable_progress_bars()
