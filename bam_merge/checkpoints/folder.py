"""A Hugging Face checkpoint folder, known by its config.json and its safetensors headers. No tensor data is read."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from bam_merge.checkpoints.file_afar import FileAfar
from bam_merge.checkpoints.header import FileIdentity, Header, TensorEntry, lookalike, open_regular, read_header, reason
from bam_merge.checkpoints.kinds import other_kind, pointers, told_of_file
from bam_merge.checkpoints.look import pickled
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.paths import located
from bam_merge.text import printable, some

CONFIG = "config.json"


INDEX = "model.safetensors.index.json"


SINGLE = "model.safetensors"


MAX_JSON = 100_000_000


DAMAGED = "The file is damaged: download or write it again"


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "tekken.json", "tiktoken.model",
)  # fmt: skip


VOCABULARIES = frozenset({"tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt"})
"""Those of them that name tokens and their ids: any one of them is a tokenizer."""


PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""What turns images and videos into what a wrapper's towers take."""


@dataclass(frozen=True)
class Remote:
    """Of a model whose headers alone are at hand: its `name` where the rest is, the bytes of all files that are read of it and of those yet
    to be downloaded, and the digests of those beside the weights that were not, by file: SHA-256, or git's of a blob. `ranged`: its
    weights are never downloaded, but read by ranges when they are needed."""

    name: str
    nbytes: int
    missing: int
    unread: Mapping[str, str]
    ranged: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """One folder: `config` as written, every file's header, and every tensor by name. `notes` are harmless oddities. Where it is `remote`,
    no tensor can be read yet. Its weights are `afar` where they are no files of `path`, and read by ranges."""

    path: Path
    config: dict[str, Any]
    config_digest: str
    files: dict[str, Header]
    tensors: dict[str, TensorEntry]
    notes: tuple[str, ...] = field(default=())
    remote: Remote | None = None
    afar: Mapping[str, FileAfar] | None = field(default=None, compare=False, repr=False)

    @property
    def identities(self) -> dict[str, FileIdentity]:
        return {name: header.identity for name, header in self.files.items()}

    def companions(self) -> list[str]:
        """Tokenizer and generation files of this folder, in a fixed order."""
        return self._there(TOKENIZER_FILES)

    def processors(self) -> list[str]:
        """Its files for images and videos, in a fixed order."""
        return self._there(PROCESSOR_FILES)

    def _there(self, names: Sequence[str]) -> list[str]:
        unread = self.remote.unread if self.remote is not None else {}
        return [name for name in names if name in unread or (self.path / name).is_file()]


def open_checkpoint(path: str | os.PathLike[str], unneeded: Callable[[Mapping[str, Any]], set[str]] = lambda config: set()) -> Checkpoint:
    """Open the Hugging Face folder at `path`. Raises CheckpointError with every problem found in it.

    `unneeded` says of a config.json which tensors its index may list although no file holds them.
    """
    folder = located(path)
    if not _is_there(folder):
        raise CheckpointError(f"{printable(str(folder))}: no such folder.")
    if not folder.is_dir():
        what = told_of_file(folder)
        way_out = f"It is {what}." if what else "Give the folder that holds config.json."
        raise CheckpointError(f"{printable(str(folder))}: not a folder. {way_out}")
    problems: list[str] = []
    config, digest = read_config(folder, problems)
    files: dict[str, Header] = {}
    try:
        names, weight_map, total = _weight_files(folder)
    except CheckpointError as error:
        problems += error.problems
        names, weight_map, total = [], None, None
    unfetched = pointers(folder, names) if len(names) > 1 else []
    if len(unfetched) > 1:
        of = f"{some(unfetched)}: {len(unfetched)} of {len(names)} files"
        problems.append(f"{printable(str(folder))}: {of} are git-lfs pointers, not the weights themselves: run `git lfs pull` there.")
    for name in names:
        if len(unfetched) > 1 and name in unfetched:
            continue
        try:
            files[name] = read_header(str(folder / name), name)
        except CheckpointError as error:
            problems += error.problems
    index = (weight_map, total) if len(files) == len(names) else (None, None)
    return assembled(folder, (config, digest), files, index, unneeded, problems)


def assembled(
    folder: Path,
    config_digest: tuple[dict[str, Any], str],
    files: dict[str, Header],
    index: tuple[dict[str, str] | None, int | None],
    unneeded: Callable[[Mapping[str, Any]], set[str]],
    problems: list[str],
) -> Checkpoint:
    """The checkpoint of a config.json with its digest, the headers of its files, and weight_map and total_size of its index, if it has one.

    Raises CheckpointError with `problems` and those of the parts with each other.
    """
    (config, digest), (weight_map, total) = config_digest, index
    tensors, notes = _all_tensors(folder, files, problems), list[str]()
    if weight_map is not None:
        problems += _index_problems(folder, weight_map, tensors, unneeded(config))
        left_out = sorted(name for name in weight_map.keys() - tensors.keys() if _is_one_of(name, unneeded(config)))
        if left_out:
            notes.append(f"{INDEX} lists {some(left_out)}, which no shard holds: the head is tied, so nothing is missing.")
        size = sum(entry.nbytes for entry in tensors.values())
        if total is not None and total != size:
            notes.append(f"{INDEX} says total_size {total:,}, the tensors take {size:,} bytes; the headers are believed.")
    if problems:
        other = other_kind(folder)
        raise CheckpointError(*([other] if other else problems))
    return Checkpoint(folder, config, digest, files, tensors, tuple(notes))


def _all_tensors(folder: Path, files: Mapping[str, Header], problems: list[str]) -> dict[str, TensorEntry]:
    """Every tensor by its name; a name in two files is a problem."""
    tensors: dict[str, TensorEntry] = {}
    for name, header in files.items():
        twice: dict[str, list[str]] = {}
        for entry in header.tensors:
            if entry.name in tensors:
                twice.setdefault(tensors[entry.name].file, []).append(entry.name)
            tensors[entry.name] = entry
        problems += [f"{printable(str(folder))}: {some(both)} in {other} and in {name}. Keep one." for other, both in twice.items()]
    return tensors


def open_file(path: str | os.PathLike[str]) -> Checkpoint:
    """One safetensors file as a checkpoint without a config.json; `path` is its folder. Raises CheckpointError."""
    file = located(path)
    if not file.name.endswith(".safetensors") and file.is_file() and (what := told_of_file(file)):
        raise CheckpointError(f"{printable(str(file))}: this is {what}.")
    header = read_header(str(file), file.name)
    return Checkpoint(file.parent, {}, "", {file.name: header}, {entry.name: entry for entry in header.tensors})


def read_small_file(path: Path, limit: int = MAX_JSON) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. Raises CheckpointError."""
    descriptor = open_regular(str(path))
    with os.fdopen(descriptor, "rb") as stream:
        if os.fstat(descriptor).st_size > limit:
            raise CheckpointError(f"{printable(str(path))}: larger than {limit:,} bytes.")
        return stream.read(limit)


def _is_there(path: Path) -> bool:
    """Whether something stands at `path`. Raises CheckpointError when the system will not say, or it is a symlink to nothing."""
    try:
        os.stat(path)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise CheckpointError(f"{printable(str(path), 1000)}: {reason(path, error)}.") from None
        return False
    except NotADirectoryError:
        return False
    except OSError as error:
        raise CheckpointError(f"{printable(str(path), 1000)}: {reason(path, error)}.") from None
    return True


def json_object(path: Path, data: bytes, load: Callable[[bytes], Any] = load_json, way_out: str = "") -> dict[str, Any]:
    """The JSON object that the file at `path` is, by its bytes. Raises CheckpointError, with the way out, when it is none."""
    try:
        document = load(data)
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        what = lookalike(data)
        raise CheckpointError(f"{printable(str(path))}: {f'this is {what}' if what else f'{error}{way_out}'}.") from None
    return document


def _read_json_object(path: Path) -> tuple[dict[str, Any], bytes]:
    data = read_small_file(path)
    return json_object(path, data, way_out=f". {DAMAGED}"), data


def read_config(folder: Path, problems: list[str], name: str = CONFIG) -> tuple[dict[str, Any], str]:
    """A folder's config.json and its digest, or its problems and nothing."""
    try:
        if not _is_there(folder / name):
            raise CheckpointError(f"{printable(str(folder))}: {name} is missing. Is this a Hugging Face folder?")
        config, data = _read_json_object(folder / name)
    except CheckpointError as error:
        problems += error.problems
        return {}, ""
    return config, xxhash.xxh3_128_hexdigest(data)


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None, int | None]:
    """Names of the folder's safetensors files; with an index also its weight_map and total_size."""
    where = printable(str(folder))
    single, index = os.path.lexists(folder / SINGLE), os.path.lexists(folder / INDEX)
    if index:
        weight_map, total = read_index(folder)
        names = sorted(set(weight_map.values()))
        if single and SINGLE not in names:
            raise CheckpointError(f"{where}: both {SINGLE} and {INDEX} are present. Remove the stale one.")
        missing = [name for name in names if not _is_there(folder / name)]
        if missing:
            if len(missing) == len(names) > 1:
                raise CheckpointError(
                    f"{where}: {INDEX} is there, but none of the {len(names)} files that it names ({some(missing)}): the weights were not "
                    "downloaded. Download them, into this folder."
                )
            raise CheckpointError(
                f"{where}: {len(missing)} of {len(names)} files that {INDEX} names are missing: {some(missing)}. Is the download complete?"
            )
        return names, weight_map, total
    if single:
        return [SINGLE], None, None
    try:
        there = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{where}: {reason(folder, error)}.") from None
    present = [name for name in there if name.endswith(".safetensors")]
    if present:
        raise CheckpointError(f"{where}: {INDEX} is missing, and there is no {SINGLE} (found {some(present)}).")
    if unsafe := pickled(there):
        raise CheckpointError(
            f"{where}: only {some(unsafe)} present. Pickled weights are never loaded, since loading them runs code. Convert "
            f"them once: bam-merge convert {where} NEW_FOLDER."
        )
    raise CheckpointError(f"{where}: no weights found; expected {SINGLE} or {INDEX}.")


def read_index(folder: Path) -> tuple[dict[str, str], int | None]:
    """weight_map and total_size of a folder's index. Raises CheckpointError."""
    where = printable(str(folder))
    document, _ = _read_json_object(folder / INDEX)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{where}/{INDEX}: weight_map must be an object that maps tensor names to file names. {DAMAGED}.")
    unsafe = [name for name in sorted(set(weight_map.values())) if not is_plain_name(name)]
    if unsafe:
        wrong = f"weight_map names {some(unsafe)}, which is no plain file in this folder"
        raise CheckpointError(f"{where}/{INDEX}: {wrong}. Correct the index.")
    metadata = document.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, total if isinstance(total, int) else None


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file in the folder where it is read: no path, drive, URL, NUL or control character."""
    plain = name.isprintable() and name == os.path.basename(name) and name not in {"", ".", ".."} and not set(name) & set("\\:")
    try:
        return plain and bool(os.fsencode(name))
    except UnicodeEncodeError:  # under a locale without UTF-8
        return False


def _is_one_of(name: str, names: set[str]) -> bool:
    """Whether a tensor is one of `names`, with or without a prefix."""
    return name in names or any(name.endswith(f".{known}") for known in names)


def _index_problems(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorEntry], unneeded: set[str]) -> list[str]:
    where = f"{printable(str(folder))}/{INDEX}"
    problems = []
    absent = sorted(name for name in weight_map if name not in tensors and not _is_one_of(name, unneeded))
    if absent:
        problems.append(f"{where}: lists {some(absent)}, which no shard holds. Is the download complete?")
    unlisted = sorted(name for name in tensors if name not in weight_map)
    if unlisted:
        problems.append(f"{where}: does not list {some(unlisted)}, which the shards hold. {DAMAGED}.")
    moved = sorted(name for name, file in weight_map.items() if name in tensors and tensors[name].file != file)
    if moved:
        problems.append(f"{where}: places {some(moved)} in the wrong shard. {DAMAGED}.")
    return problems
