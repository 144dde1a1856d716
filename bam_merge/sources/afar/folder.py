"""A model's folder elsewhere: its small files are brought here while the process runs; of its weights headers are read, and pieces."""

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from bam_merge.address import Address
from bam_merge.architectures.opening import tied_heads
from bam_merge.checkpoints.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder
from bam_merge.checkpoints.afar import BLOCK, changed_afar
from bam_merge.checkpoints.file_afar import FileAfar
from bam_merge.checkpoints.folder import (
    CONFIG,
    INDEX,
    MAX_JSON,
    PROCESSOR_FILES,
    SINGLE,
    TOKENIZER_FILES,
    Checkpoint,
    Remote,
    assembled,
    read_config,
    read_index,
)  # fmt: skip
from bam_merge.checkpoints.header import Header, header_of
from bam_merge.checkpoints.provenance import MANIFEST
from bam_merge.errors import CheckpointError
from bam_merge.sources.afar import words
from bam_merge.sources.afar.state import Absent, Found, Hidden
from bam_merge.sources.afar.stores import Store
from bam_merge.sources.afar.web import Web
from bam_merge.sources.licenses import CARD, FILES
from bam_merge.text import count, printable, some

SMALL_FILES = (CONFIG, INDEX, *TOKENIZER_FILES, *PROCESSOR_FILES, MANIFEST, CARD, *FILES)
"""Files beside the weights that are read of a folder where it has them."""


MOST_SMALL = 2**18
"""Bytes of the largest file beside config.json and the index that is read with the headers. Most tokenizers take 2 to 20 MB."""


AT_ONCE = 8
"""Files that are asked for at the same time."""


@dataclass(frozen=True)
class Elsewhere:
    """A folder elsewhere as it was found. `files` are those of it that are known, by name: all of them where it can be listed. `hidden` are
    names of which it cannot be said whether they are there. `folder` is on this machine and holds what was brought here of it."""

    address: Address
    store: Store | Web
    files: Mapping[str, Found]
    folders: tuple[str, ...] = ()
    adapter: bool = False
    hidden: tuple[str, ...] = ()
    folder: Path = field(default_factory=Path)

    def __str__(self) -> str:
        return str(self.address)

    def is_here(self, name: str) -> bool:
        """Whether the whole file was brought here."""
        return (self.folder / name).is_file()

    def small_files(self) -> list[str]:
        """Every file beside the weights that may be read."""
        return [name for name in ((ADAPTER_CONFIG, CARD, *FILES) if self.adapter else SMALL_FILES) if name in self.files]

    @property
    def config(self) -> str:
        """The file that says what it is."""
        return ADAPTER_CONFIG if self.adapter else CONFIG

    def notes(self) -> list[str]:
        """What a plan has to say of it."""
        found = []
        if self.hidden:
            found.append(f"{self}: access to {some(self.hidden)} is refused (403), so that they are taken not to be there.")
        if any(not file.etag for file in self.files.values()):
            found.append(words.NO_VERSION.format(self))
        return found


@dataclass(frozen=True)
class WeightsAfar:
    """A file of weights, read where it is."""

    store: Store | Web
    found: Found

    @property
    def name(self) -> str:
        return self.store.name_of(self.found.file)

    @property
    def size_found(self) -> int:
        return self.found.size

    def size(self) -> int:
        return self._now().size

    def etag(self) -> str:
        return self._now().etag

    def read(self, offset: int, length: int) -> bytes:
        return self.store.read(self.found, offset, length)

    def _now(self) -> Found:
        return self.store.look(self.found.file)


# ---- finding it --------------------------------------------------------------------------------------------------------------


def resolve(address: Address, adapter: bool = False) -> Elsewhere:
    """The folder at an address, as it is now. Raises CheckpointError."""
    store = (Web if address.is_web else Store)(address)
    config = ADAPTER_CONFIG if adapter else CONFIG
    if isinstance(store, Store):
        files, folders = store.list()
        found = Elsewhere(address, store, files, folders, adapter)
    else:
        names = [config, CONFIG, ADAPTER_WEIGHTS, CARD, *FILES] if adapter else [*SMALL_FILES, SINGLE, ADAPTER_CONFIG]
        files, hidden = _looked(store, names, config)
        found = Elsewhere(address, store, files, (), adapter, hidden)
    if config not in found.files:
        raise CheckpointError(f"{address}: {config} is missing there: {_instead(found)}")
    if large := [name for name in found.small_files() if found.files[name].size > MAX_JSON]:
        raise CheckpointError(f"{address}: {some(large)}: larger than {MAX_JSON:,} bytes.")
    found = replace(found, folder=_folder_for(found))
    _bring(found, [name for name in (config, INDEX) if name in found.files and (not adapter or name == config)])
    if isinstance(store, Web) and not adapter and INDEX in found.files:
        with _by_address(found):
            listed = _weights(found)
        more, unseen = _looked(store, [name for name in listed if name not in found.files], "")
        if unseen:
            raise CheckpointError(words.refused(f"{address}: {some(unseen)}", address.scheme, 403))
        found = replace(found, files={**found.files, **more})
    return found


def _looked(store: Web, names: Iterable[str], needed: str) -> tuple[dict[str, Found], tuple[str, ...]]:
    """What a folder that cannot be listed has of `names`, and of which of them that cannot be said. Raises CheckpointError."""

    def look(name: str) -> Found | CheckpointError:
        try:
            return store.look(name)
        except CheckpointError as error:
            return error

    if needed:
        first = look(needed)  # where this fails, nothing else need be asked
        if isinstance(first, CheckpointError) and not isinstance(first, Absent):
            raise first
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {name: pool.submit(copy_context().run, look, name) for name in names if name != needed}
    results = {**({needed: first} if needed else {}), **{name: job.result() for name, job in jobs.items()}}
    for result in results.values():
        if isinstance(result, CheckpointError) and not isinstance(result, Absent | Hidden):
            raise result
    hidden = tuple(name for name, result in results.items() if isinstance(result, Hidden))
    return {name: result for name, result in results.items() if isinstance(result, Found)}, hidden


def _weights(found: Elsewhere) -> list[str]:
    """The files of tensors, by the index where there is one, which was brought here. Raises CheckpointError for none."""
    if found.adapter:
        if ADAPTER_WEIGHTS in found.files:
            return [ADAPTER_WEIGHTS]
        raise CheckpointError(f"{found}: {ADAPTER_WEIGHTS} is missing there. {_pickled(found)}")
    if INDEX in found.files:
        names = sorted(set(read_index(found.folder)[0].values()))
        if SINGLE in found.files and SINGLE not in names:
            raise CheckpointError(f"{found}: both {SINGLE} and {INDEX} are there, and the index does not name the file: one is stale.")
        return names
    if SINGLE in found.files:
        return [SINGLE]
    raise CheckpointError(f"{found}: no weights there; expected {SINGLE} or {INDEX}. {_pickled(found)}")


def _pickled(found: Elsewhere) -> str:
    names = sorted(name for name in found.files if name.endswith((".bin", ".pt", ".pth")))
    if names:
        return (
            f"Of {some(names)} nothing is read: pickled weights are never loaded, since loading them runs code. Copy the folder here, and "
            "convert it: bam-merge convert FOLDER NEW_FOLDER."
        )
    if other := sorted(name for name in found.files if name.endswith((".gguf", ".onnx", ".safetensors", ".npz", ".h5"))):
        return f"There is {some(other)}. Give the folder of the original model."
    return "Is everything copied there?"


def _instead(found: Elsewhere) -> str:
    """What a folder without the file that says what it is seems to be, and what to write for it."""
    if not found.adapter and ADAPTER_CONFIG in found.files:
        return f"this is an adapter ({ADAPTER_CONFIG}). Write {{base: MODEL, adapter: {found}}} for a source."
    if found.adapter and CONFIG in found.files:
        return f"this is a model of its own ({CONFIG}), to be written as a plain source."
    if any(name.endswith(".gguf") for name in found.files):
        return "there are GGUF files, which are never merged. Take the repository of the original model."
    inside = f" There are folders in it: {some(found.folders)}." if found.folders else ""
    return f"give the address of the folder that holds it.{inside}"


# ---- what is brought here ----------------------------------------------------------------------------------------------------


class _Home:
    """Where small files are while this process runs."""

    lock = threading.Lock()
    path: Path | None = None

    @classmethod
    def get(cls) -> Path:
        with cls.lock:
            if cls.path is None:
                cls.path = Path(os.path.realpath(tempfile.mkdtemp(prefix="bam-merge-")))
                atexit.register(shutil.rmtree, cls.path, ignore_errors=True)
            return cls.path


def _folder_for(found: Elsewhere) -> Path:
    """The folder of what is brought here of this state of it; it ends as the address does, for people look at names."""
    states = [str(found), found.adapter, *sorted((file.file, file.size, file.etag) for file in found.files.values())]
    name = found.address.name if found.address.name.isprintable() and found.address.name not in ("", ".", "..") else "model"
    folder = _Home.get() / xxhash.xxh3_128_hexdigest(repr(states).encode()) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _bring(found: Elsewhere, names: Iterable[str]) -> None:
    """Bring whole files here that are not yet. Raises CheckpointError."""

    def bring(name: str) -> None:
        file = found.files[name]
        new = found.folder / f"{name}.{os.getpid()}.{id(found)}.new"
        with open(new, "wb") as stream:
            start = file.first if len(file.first) <= file.size else b""
            stream.write(start)
            for offset in range(len(start), file.size, BLOCK):
                stream.write(found.store.read(file, offset, min(BLOCK, file.size - offset)))
        if isinstance(found.store, Store) and (now := found.store.look(name)) != file:  # which it is asked by no request for its bytes
            raise CheckpointError(changed_afar(found.store.name_of(name), now.identity, file.identity))
        os.replace(new, found.folder / name)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(copy_context().run, bring, name) for name in names if not found.is_here(name)]
    for job in jobs:
        try:
            job.result()
        except OSError as error:
            raise CheckpointError(
                f"{printable(str(found.folder))}, where small files of {found} are kept: {error.strerror}. Set TMPDIR to a folder with "
                "room."
            ) from None


def bring_small(found: Elsewhere) -> None:
    """Bring all files beside the weights here that are read, and an adapter's weights. Raises CheckpointError."""
    _bring(found, [*found.small_files(), *(_weights(found) if found.adapter else ())])


# ---- opening it --------------------------------------------------------------------------------------------------------------


def open_elsewhere(found: Elsewhere, tokenizers: bool = False, readable: bool = False) -> Checkpoint:
    """The checkpoint of a folder elsewhere, by its headers; with `tokenizers`, with every file beside the weights. `readable`: so that its
    tensors can be read. Raises CheckpointError with every problem found."""
    with _by_address(found):
        return _opened(found, tokenizers or readable, readable)


@contextmanager
def _by_address(found: Elsewhere) -> Iterator[None]:
    """Messages name the address, and not where small files of it happen to be."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(*(problem.replace(str(found.folder), str(found)) for problem in error.problems)) from None


def _opened(found: Elsewhere, whole: bool, readable: bool) -> Checkpoint:
    small = [name for name in found.small_files() if name != MANIFEST or readable]
    if readable:
        bring_small(found)
    else:
        _bring(found, [name for name in small if whole or found.files[name].size <= MOST_SMALL])
    problems: list[str] = []
    config = read_config(found.folder, problems, found.config)
    names = _weights(found)
    if missing := [name for name in names if name not in found.files]:
        of = f"{len(missing)} of {count(len(names), 'file')} that {INDEX} names are"
        raise CheckpointError(*problems, f"{found}: {of} missing there: {some(missing)}. Is everything copied there?")
    headers, wrong = _headers(found, names)
    problems += wrong
    index = read_index(found.folder) if INDEX in found.files and not found.adapter and not wrong else (None, None)
    checkpoint = assembled(found.folder, config, headers, index, tied_heads, problems)
    kind = AdapterFolder if found.adapter else Checkpoint
    if readable:
        afar: dict[str, FileAfar] = {name: WeightsAfar(found.store, found.files[name]) for name in names}
        return kind(**{**vars(checkpoint), "afar": afar})
    rest = [name for name in found.small_files() if not found.is_here(name)]
    unread = {
        name: f"{found}: {found.files[name].etag}" for name in rest if name in (*TOKENIZER_FILES, *PROCESSOR_FILES)
    }  # equal to no other one's
    nbytes, left = (sum(found.files[name].size for name in which) for which in ((*found.small_files(), *names), rest))
    return kind(**{**vars(checkpoint), "remote": Remote(str(found), nbytes, left, unread, ranged=True)})


def _headers(found: Elsewhere, names: Iterable[str]) -> tuple[dict[str, Header], list[str]]:
    """The header of each file of weights, by name, and all problems of all of them."""

    def header(name: str) -> Header | CheckpointError:
        file = found.files[name]

        def read(first: int, length: int) -> bytes:
            if first + length <= len(file.first):
                return file.first[first : first + length]
            return found.store.read(file, first, length)

        try:
            if not file.ranges:
                raise CheckpointError(words.no_ranges(found.store.name_of(name)))
            return header_of(found.store.name_of(name), name, file.size, read, file.etag)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {name: pool.submit(copy_context().run, header, name) for name in names}
    results = {name: job.result() for name, job in jobs.items()}
    wrong = dict.fromkeys(problem for result in results.values() if isinstance(result, CheckpointError) for problem in result.problems)
    return {name: result for name, result in results.items() if isinstance(result, Header)}, list(wrong)
