"""The cache of huggingface_hub, where models of the hub are on this machine: which commit a revision is, and which files of it are there.

Its layout is documented by the library (manage-cache): models--ORG--NAME/{refs/REVISION, snapshots/COMMIT/FILE -> blobs/DIGEST}. A digest
is a file's SHA-256 where it is stored apart from git, and else git's own of a blob.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bam_merge.checkpoints.folder import CONFIG, INDEX, PROCESSOR_FILES, SINGLE, TOKENIZER_FILES, is_plain_name
from bam_merge.checkpoints.provenance import MANIFEST
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.hub_id import HubId
from bam_merge.sources.hub import words as hub_words
from bam_merge.sources.hub.client import HubUnreachable, hub, library
from bam_merge.text import printable, some

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


SMALL_FILES = (CONFIG, INDEX, *TOKENIZER_FILES, *PROCESSOR_FILES, MANIFEST)
"""Files beside the weights that are ever read of a model: data, and never code."""


MOST_PAGES = 50
"""Pages of a listing, 1,000 files each, that are looked at."""


class NotInCache(HubUnreachable):
    """The hub cannot be asked for a model of which the cache has too little."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `digest` is its name among the cache's blobs; `xet`: it can be had in chunks, which other files share."""

    name: str
    size: int
    digest: str
    xet: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A model of the hub at a commit, or an `adapter`, of which other files are read. `files` and `folders` are those of its top folder,
    `files` None where the hub could not be asked; `folder` is in the cache and holds what is there; `note` says why the hub was not asked.
    """

    id: HubId
    asked: HubId
    folder: Path
    files: Mapping[str, HubFile] | None
    folders: tuple[str, ...] = ()
    adapter: bool = False
    note: str = ""

    def has(self, name: str) -> bool:
        """Whether the repository has such a file; where the hub could not be asked, whether it is in the cache."""
        return name in self.files if self.files is not None else (self.folder / name).is_file()

    def is_here(self, name: str) -> bool:
        """Whether the whole file is in the cache."""
        try:
            size = (self.folder / name).stat().st_size
        except OSError:
            return False
        return self.files is None or (name in self.files and size == self.files[name].size)

    def weights(self) -> list[str]:
        """The files of tensors, by the index where there is one, which must be in the cache. Raises CheckpointError for none."""
        if self.adapter:
            return self._adapter_weights()
        if self.has(INDEX):
            path = self.folder / INDEX
            try:
                weight_map = load_json(path.read_bytes())["weight_map"]
                names = sorted(set(weight_map.values()))
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                raise CheckpointError(f"{self.id}: {INDEX} has no weight_map. The model is damaged on the hub.") from None
            wrong = [str(name) for name in names if not isinstance(name, str) or not is_plain_name(name)]
            missing = [name for name in names if self.files is not None and name not in self.files]
            if wrong or missing or not names:
                raise CheckpointError(f"{self.id}: {INDEX} names {some(wrong or missing)}, which the hub does not have.")
            if self.has(SINGLE) and SINGLE not in names:
                raise CheckpointError(
                    f"{self.id}: both {SINGLE} and {INDEX} are on the hub, and the index does not name the file: one is stale."
                )
            return names
        if self.has(SINGLE):
            return [SINGLE]
        raise CheckpointError(f"{self.id}: {_no_weights(self, f'{SINGLE} or {INDEX}')}")

    def _adapter_weights(self) -> list[str]:
        if self.has(ADAPTER[1]):
            return [ADAPTER[1]]
        raise CheckpointError(f"{self.id}: {_no_weights(self, ADAPTER[1])}")

    @property
    def config(self) -> str:
        """The file that says what it is."""
        return ADAPTER[0] if self.adapter else CONFIG

    def small_files(self) -> list[str]:
        """Every file beside the weights that is read of this model."""
        return [name for name in (ADAPTER[:1] if self.adapter else SMALL_FILES) if self.has(name)]

    def wanted(self) -> list[str]:
        """Every file that is read of this model, weights last. Raises as `weights`."""
        return [*self.small_files(), *self.weights()]

    @property
    def can_be_ranged(self) -> bool:
        """Whether its weights can be read on the hub: the hub was asked. An adapter, and what is in the cache whole, is read there."""
        return self.files is not None and not self.adapter and not self.complete

    @property
    def complete(self) -> bool:
        """Whether all that is read of this model is in the cache."""
        if not self.adapter and self.has(INDEX) and not self.is_here(INDEX):
            return False
        try:
            return all(map(self.is_here, self.wanted()))
        except CheckpointError:
            return False


def _no_weights(snapshot: Snapshot, expected: str) -> str:
    there = sorted(snapshot.files) if snapshot.files is not None else _names(snapshot.folder)
    if pickled := [name for name in there if name.endswith((".bin", ".pt", ".pth"))]:
        return (
            f"only {some(pickled)} on the hub. Pickled weights are never downloaded, since loading them runs code. Look for a revision "
            "with safetensors (the hub makes some: refs/pr/1, say), or for the same model in another repository; or download it yourself "
            f"(hf download {snapshot.id.repo} --local-dir FOLDER) and convert it: bam-merge convert FOLDER NEW_FOLDER."
        )
    if other := [name for name in there if name.endswith((".gguf", ".onnx", ".safetensors", ".npz", ".h5"))]:
        return f"no {expected} on the hub, but {some(other)}. Take the repository of the original model."
    return f"no weights on the hub; expected {expected}."


# ---- which commit, which files -----------------------------------------------------------------------------------------------


def resolve(asked: HubId, adapter: bool = False) -> Snapshot:
    """The model, or adapter, as it is now, by the hub; by the cache alone where the hub cannot be asked. Raises CheckpointError."""
    home = repository_folder(asked)
    commit = asked.commit
    try:
        if commit is None:
            commit = _commit(asked)
        of = asked.at(commit)
        return Snapshot(of, asked, home / "snapshots" / commit, *_listing(of), adapter)
    except CheckpointError as error:
        if commit is None and isinstance(error, HubUnreachable):
            commit = _reference(home, asked.revision or "main")
        if commit is None or not (asked.commit or isinstance(error, HubUnreachable)):
            raise
        why = error.problems[0].partition(". ")[0].rstrip(".")
        found = Snapshot(asked.at(commit), asked, home / "snapshots" / commit, None, (), adapter, why)
        if missing := _missing(found):
            if not isinstance(error, HubUnreachable):
                raise
            why = error.problems[0].rstrip(".")
            raise NotInCache(f"{found.id}: the cache ({printable(str(cache_folder()))}) lacks {missing} of it, and {why}.") from None
        return found


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it downloads: HF_HUB_CACHE, HF_HOME."""
    return Path(os.path.abspath(os.path.expanduser(library().constants.HF_HUB_CACHE)))


def repository_folder(of: HubId) -> Path:
    return cache_folder() / f"models--{of.repo.replace('/', '--')}"


def _commit(asked: HubId) -> str:
    document, _ = hub().document(f"models/{asked.repo}/revision/{quote(asked.revision or 'main', safe='')}", asked)
    commit = document.get("sha") if isinstance(document, dict) else None
    if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
        raise HubUnreachable(f"{asked}: {hub_words.NO_HUB.format(hub().shown)}")
    return commit


_LISTINGS: dict[tuple[str, HubId], tuple[dict[str, HubFile], tuple[str, ...]]] = {}
"""Listings that this process has seen: of a commit they never change."""


def _listing(of: HubId) -> tuple[dict[str, HubFile], tuple[str, ...]]:
    """The files and folders in the top folder at a commit."""
    now = hub()
    if (known := _LISTINGS.get((now.endpoint, of))) is not None:
        return known
    entries: list[Any] = []
    page: str | None = f"models/{of.repo}/tree/{of.revision}"
    for _ in range(MOST_PAGES):
        if page is not None:
            found, page = now.document(page, of)
            entries += found if isinstance(found, list) else [None]
    try:
        files = [_file(entry) for entry in entries if entry["type"] == "file" and is_plain_name(entry["path"])]
        folders = tuple(entry["path"] for entry in entries if entry["type"] != "file" and is_plain_name(entry["path"]))
    except (KeyError, TypeError, ValueError):
        raise HubUnreachable(f"{of}: {hub_words.NO_HUB.format(now.shown)}") from None
    listing = _LISTINGS[now.endpoint, of] = {file.name: file for file in files}, folders
    return listing


def _file(entry: Mapping[str, Any]) -> HubFile:
    lfs = entry.get("lfs")
    size, digest = (lfs["size"], lfs["oid"]) if lfs else (entry["size"], entry["oid"])
    if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}" if lfs else "[0-9a-f]{40}", digest):
        raise ValueError(entry)
    return HubFile(entry["path"], size, digest, bool(entry.get("xetHash")))


def _reference(home: Path, revision: str) -> str | None:
    """The commit that a revision was when something of it was downloaded last."""
    try:
        text = (home / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{40}", text) else None


def _missing(found: Snapshot) -> str:
    """What the cache lacks of a model that the hub cannot be asked for; '' when nothing."""
    if not (found.folder / found.config).is_file():
        return found.config
    try:
        weights = found.weights()
    except CheckpointError:
        return "the weights"
    lacking = [name for name in (*weights, *_known(found.id)) if not found.is_here(name)]
    return some(dict.fromkeys(lacking))


def _known(of: HubId) -> Iterable[str]:
    """The files that are read, by a listing that huggingface_hub kept; none where it kept none."""
    hf = library()
    try:
        names = {entry.path for entry in hf.get_cached_repo_tree(of.repo, revision=of.revision)}
    except Exception:  # none kept, or a version of the library that keeps none
        return []
    return [name for name in SMALL_FILES if name in names]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
