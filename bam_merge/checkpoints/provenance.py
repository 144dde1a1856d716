"""bam_merge.json read back: what each tensor of a merged folder was made of, and what became of each tensor of a source."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from bam_merge.checkpoints.folder import is_plain_name, read_small_file
from bam_merge.checkpoints.format_1 import FORMAT_1, reads_in
from bam_merge.checkpoints.kinds import told, told_of_file
from bam_merge.documents import load_json
from bam_merge.errors import VerifyError
from bam_merge.text import nearest, printable, some

MANIFEST = "bam_merge.json"


MANIFEST_FORMAT = 2
"""Version of the manifest's form, which is raised when what is read of it changes. 2: `reads` of every tensor; 1 has none."""


FORMATS = (FORMAT_1, MANIFEST_FORMAT)
"""Those that can be read."""


REMEDY = "copy the file again from where the merge was published, or merge again"


SEAL = "manifest_digest"
"""The manifest's last key: a digest (XXH3-128) of its own bytes, with zeros where the digest stands."""


REFRESHED = "refreshed"
"""The key that says which version wrote which files anew after the merge: {"version", "files"}."""


class Refreshed(NamedTuple):
    """That a later version wrote some files beside the tensors anew."""

    version: str
    files: tuple[str, ...]


def refreshed(manifest: Mapping[str, Any]) -> Refreshed | None:
    """What a manifest says of a later version's work; None where nothing, or what cannot be."""
    found = manifest.get(REFRESHED)
    if not isinstance(found, dict) or found.keys() != {"version", "files"} or not _has(found, {"version": str, "files": list}):
        return None
    files = found["files"]
    if not files or not all(isinstance(name, str) and name in manifest["files"] for name in files) or len(set(files)) != len(files):
        return None
    return Refreshed(found["version"], tuple(files))


def sealed(document: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest, with a digest of themselves as the last key, so that a flipped bit in it is found too."""
    blank = "0" * 32
    text = json.dumps({**document, SEAL: blank}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    head, _, tail = text.rpartition(blank)
    return f"{head}{xxhash.xxh3_128_hexdigest(text.encode())}{tail}".encode()


def key_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """For every key of a configuration a digest (XXH3-64) of its name and one of its value: what tells later which of them changed.

    Names are digested too, since the manifest travels with the output and a stranger's keys do not.
    """
    values = {key: json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in sorted(config.items())}
    return {name_digest(key): xxhash.xxh3_64_hexdigest(value.encode()) for key, value in values.items()}


def name_digest(key: str) -> str:
    return xxhash.xxh3_64_hexdigest(key.encode())


def companion_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """A digest (XXH3-128) of each of a source's tokenizer and generation files. Raises CheckpointError."""
    return {name: xxhash.xxh3_128_hexdigest(read_small_file(folder / name)) for name in names}


def _is_sealed(document: Mapping[str, Any], data: bytes) -> bool:
    seal = document.get(SEAL)
    if not isinstance(seal, str) or len(seal) != 32:
        return False
    head, found, tail = data.rpartition(seal.encode())
    return bool(found) and xxhash.xxh3_128_hexdigest(head + b"0" * 32 + tail) == seal


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a merged folder. Raises VerifyError when there is none that can be used."""
    path = folder / MANIFEST
    if not os.path.isdir(folder):
        what = told_of_file(folder) if os.path.exists(folder) else None
        is_none = "no such folder" if not os.path.exists(folder) else f"not a folder{f'. It is {what}' if what else ''}"
        raise VerifyError(f"{printable(str(folder))}: {is_none}.")
    if not path.exists():
        what = told(folder)
        raise VerifyError(
            f"{printable(str(folder))}: no {MANIFEST}, so this is not a folder that bam-merge wrote{f': it is {what}' if what else ''}."
        )
    try:
        data = read_small_file(path)
        document = load_json(data)
    except ValueError as error:
        raise VerifyError(f"{printable(str(path))}: {error}. The manifest is damaged: {REMEDY}.") from None
    if not isinstance(document, dict):
        raise VerifyError(f"{printable(str(path))}: {_unreadable(type(document).__name__)}")
    if type(document.get("format")) is not int or document["format"] not in FORMATS:
        raise VerifyError(f"{printable(str(path))}: {_unreadable(document.get('format'))}")
    wrong = list(_damaged(document))
    if wrong:
        raise VerifyError(f"{printable(str(path))}: {some(wrong)} missing or damaged: {REMEDY}.")
    if not _is_sealed(document, data):
        raise VerifyError(f"{printable(str(path))}: not as it was written: its {SEAL} is not that of its own bytes: {REMEDY}.")
    return document


def _unreadable(found: object) -> str:
    """What is said of a format that is not known here."""
    newer = type(found) is int and found > MANIFEST_FORMAT
    way_out = ": it was written by a newer bam-merge, which can read it" if newer else ""
    return f"format {printable(repr(found))}, this version reads {' and '.join(map(str, FORMATS))}{way_out}."


def _damaged(document: dict[str, Any]) -> Iterator[str]:
    """Sections and entries of a manifest that are not what is read of them. A manifest that anyone may have written is read too."""
    entries: dict[str, Callable[[str, Any], bool]] = {
        "recipe": lambda key, value: key != "experts" or recorded_experts({**document["recipe"], "experts": value}) is not None,
        "sources": lambda _, value: _has(value, {"files": dict}) and all(_has(f, SOURCE_FILE) for f in value["files"].values()),
        "files": lambda name, value: is_plain_name(name) and isinstance(value, str),
        "shards": lambda name, value: is_plain_name(name) and _has(value, {"bytes": int, "header": str}),
        "tensors": lambda _, value: _is_tensor(value, document["format"]),
    }
    for section, is_right in entries.items():
        found = document.get(section)
        if isinstance(found, dict):
            yield from (name for name, value in found.items() if not is_right(name, value))
        else:
            yield section
    if "calibration" in document and not _is_calibration(document["calibration"]):
        yield "calibration"


def _is_calibration(value: Any) -> bool:
    """Whether a record of the texts of routers, and of what was measured, has the parts that are read of it."""
    if not _has(value, {"texts": dict, "accuracy": dict}):
        return False
    places = value["texts"].values()
    texts = [text for place in places if _has(place, {"texts": dict}) for text in place["texts"].values()]
    return (
        all(_has(place, {"texts": dict}) for place in places)
        and all(_has(text, {"tokens": int, "further": int, "digest": str, "read": list}) for text in texts)
        and all(_has(router, {"tokens": int | float, "windows": int | float}) for router in value["accuracy"].values())  # type: ignore[dict-item]
    )


def recorded_experts(recipe: Mapping[str, Any]) -> list[str] | None:
    """The source of each expert, of a manifest's recipe: a list, or a count of experts of one source. None: neither."""
    found, sources = recipe.get("experts", []), recipe.get("sources")
    if _has(found, {"count": int, "make": str}):
        source = found.get("from", next(iter(sources), None) if isinstance(sources, dict) else None)
        found = [source] * min(max(found["count"], 0), MOST_EXPERTS)
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None


MOST_EXPERTS = 4096
"""What a recipe may count; a manifest that counts more is no merge's."""


TENSOR = {"expression": str, "file": str, "dtype": str, "shape": list, "digest": str}


def _is_tensor(value: Any, form: int) -> bool:
    reads = [] if form == FORMAT_1 else value.get("reads") if isinstance(value, dict) else None
    return (
        _has(value, TENSOR)
        and isinstance(value.get("nonfinite", 0), int)
        and isinstance(reads, list)
        and all(_has(read, {"source": str, "tensor": str}) for read in reads)
    )


SOURCE_FILE = {"bytes": int, "header": str, "tensors": dict}


def _has(value: object, kinds: Mapping[str, type]) -> bool:
    """Whether `value` is an object with these keys, of these types."""
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())


@dataclass(frozen=True)
class Origin:
    """How one tensor was made: the manifest's expression, and the (source, tensor) pairs that it reads, each once, in order."""

    expression: str
    reads: tuple[tuple[str, str], ...]


def origins(manifest: Mapping[str, Any]) -> dict[str, Origin]:
    """The origin of every tensor in a manifest."""
    sources = _source_tensors(manifest)

    def reads(name: str, record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
        if manifest["format"] == FORMAT_1:
            return reads_in(record["expression"], name, sources)
        return ((read["source"], read["tensor"]) for read in record["reads"])

    return {name: Origin(record["expression"], tuple(dict.fromkeys(reads(name, record)))) for name, record in manifest["tensors"].items()}


def format_note(manifest: Mapping[str, Any]) -> str | None:
    """What a manifest of an older format lacks, in words; None for one of this version's."""
    if manifest["format"] == MANIFEST_FORMAT:
        return None
    lacks = "which records no reads: what each tensor was made of is read from its expression"
    return f"{MANIFEST} is of format {manifest['format']}, {lacks}. A new merge writes format {MANIFEST_FORMAT}"


def fates(manifest: Mapping[str, Any], pattern: str) -> list[dict[str, Any]]:
    """What became of the source tensors that `pattern` names, "SOURCE:GLOB" (a GLOB alone asks all sources).

    One record per tensor: source, tensor, made ({name, expression} of every output that reads it), and why it was not read, if so.
    Raises VerifyError when the pattern names no source, or matches nothing.
    """
    source, colon, glob = pattern.partition(":")
    if not colon:
        source, glob = "*", pattern
    recorded = _source_tensors(manifest)
    if source != "*" and source not in recorded:
        known = ", ".join(map(printable, recorded))
        near = nearest(source, recorded) or "."
        raise VerifyError(f"--where: {printable(source)!r} is no source of this merge{near} Its sources: {known}.")
    made: dict[tuple[str, str], list[dict[str, str]]] = {}
    for name, origin in origins(manifest).items():
        for read in origin.reads:
            made.setdefault(read, []).append({"name": name, "expression": origin.expression})
    unused = _mapping(manifest.get("unused"))
    found = []
    for name, tensors in recorded.items():
        if source in ("*", name):
            dropped = _mapping(unused.get(name))
            for tensor in (*tensors, *(tensor for tensor in dropped if tensor not in tensors)):
                if fnmatchcase(tensor, glob):
                    reason = dropped.get(tensor)
                    found.append({"source": name, "tensor": tensor, "made": made.get((name, tensor), []), "unused": reason})
    if not found:
        raise VerifyError(f"--where: {printable(pattern)!r} matches no tensor of the sources. Quote it: 'math:model.layers.7.*'.")
    return found


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _source_tensors(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """The tensors that were read of every source."""
    files = {name: [_mapping(file) for file in record["files"].values()] for name, record in manifest["sources"].items()}
    return {name: [tensor for file in found for tensor in _mapping(file.get("tensors"))] for name, found in files.items()}
