"""Is the folder what its manifest says, and does it hold nothing else? Needs neither sources nor recipe.

Loaders run and read more than the weights: transformers takes custom_generate/generate.py, additional_chat_templates/ and every file
that an auto_map names. So what is not of the merge is a finding, whatever it is, and so is a file of the merge that is a link elsewhere.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import xxhash

from bam_merge._version import __version__
from bam_merge.architectures.tables import find_by_model_type
from bam_merge.checkpoints.folder import CONFIG, INDEX, PROCESSOR_FILES, SINGLE, TOKENIZER_FILES, Checkpoint, read_small_file
from bam_merge.checkpoints.header import read_header
from bam_merge.checkpoints.provenance import MANIFEST, REMEDY, refreshed
from bam_merge.documents import load_json
from bam_merge.errors import BamMergeError
from bam_merge.sources.hub.cache import Snapshot
from bam_merge.text import printable, some
from bam_merge.verifying.report import Check

KINDS = (
    ({"py", "pyc", "pyo", "pyw", "pyx", "so", "pyd", "dll", "dylib", "sh", "exe", "ipynb"}, "code, which a loader may run"),
    ({"bin", "pt", "pth", "pkl", "pickle", "ckpt", "npy", "npz", "joblib"}, "a pickle, which runs code when it is loaded"),
    ({"safetensors", "gguf", "h5", "msgpack", "onnx"}, "weights, which a loader may take instead"),
    ({"json", "jinja", "jinja2", "model", "yaml", "yml", "txt"}, "what a loader may read"),
)
"""What a foreign file is, by the parts of its name after a dot, in small letters."""


TOOLS = {".git": "git's own folder, whose hooks and settings can run code; verify a copy without it", "__pycache__": "compiled code"}
"""Folders that tools make, and that are findings all the same. They are not looked into."""


HARMLESS = {".gitattributes": "git's, as the hub adds it", ".DS_Store": "the macOS Finder's"}
"""Files that tools add to a folder and that no loader reads: said, and no failure."""


HUB_NOTES = re.compile(r"\.cache/huggingface/(?:\.gitignore|CACHEDIR\.TAG|download/[^\x00]*\.(?:metadata|lock))")
"""What `hf download --local-dir` leaves beside what it downloaded."""


MOST_ENTRIES = 10_000
"""Foreign entries that are looked at; nobody needs more to know that a folder is not a merge's."""


RUNS_CODE = ("auto_map", "trust_remote_code")
"""Keys by which transformers runs code of the folder, or of any repository."""


CHOOSES_CODE = ("quantization_config", "custom_generate", "_attn_implementation", "attn_implementation", "experts_implementation")
"""How further keys of config.json begin that decide which code a loader runs."""


VOCABULARIES = {"tokenizer.json": ("model", "vocab"), "vocab.json": (), "added_tokens.json": ()}
"""Where the keys of a file are tokens, which may have any name: their values are then numbers."""


@dataclass(frozen=True)
class OnHub:
    """Of a folder that is a model of the hub's: the files and folders there that were not downloaded, since only data is."""

    model: str
    files: frozenset[str]
    folders: frozenset[str]


def not_downloaded(manifest: Mapping[str, Any], snapshot: Snapshot | None) -> OnHub | None:
    """What of a model of the hub is not here; None for a folder."""
    if snapshot is None:
        return None
    known = snapshot.files if snapshot.files is not None else manifest["files"]
    return OnHub(str(snapshot.id), frozenset(name for name in known if not snapshot.is_here(name)), frozenset(snapshot.folders))


def file_checks(folder: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint | None, on_hub: OnHub | None = None) -> Iterator[Check]:
    """The files of the manifest are there, as they were written and of this folder, and nothing else is; code is the package's.

    What `checkpoint` holds, the folder as it was opened, is not read again. It is None where the folder could not be opened.
    """
    left = on_hub.files if on_hub is not None else frozenset[str]()
    problems, harmless = [*_written_problems(folder, manifest, checkpoint, left), *_unwritten(manifest)], dict[str, str]()
    problems += _foreign(folder, {*manifest["files"], *manifest["shards"], MANIFEST}, harmless, on_hub)
    yield Check("files", not problems, "; ".join(problems))
    if on_hub is not None and (unseen := sorted(left & manifest["files"].keys())):
        what = (
            f"{some(unseen, 8)}: on the hub, and not downloaded, for only data is: not compared. Verify a copy of {on_hub.model} to do so"
        )
        yield Check("not downloaded", None, what)
    if harmless:
        named = ", ".join(f"{printable(name)} ({why})" for name, why in harmless.items())
        yield Check("other files", None, f"{named}: not of this merge, and read by no loader; not looked into")
    yield code_check(folder, manifest, checkpoint, left)


# ---- what the manifest names -----------------------------------------------------------------------------------------------


def _written_problems(folder: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint | None, left: Collection[str]) -> Iterator[str]:
    for name in (*manifest["files"], *manifest["shards"], MANIFEST):
        if (link := _leads_away(folder, name)) is not None:
            yield f"{printable(name)} is a link to {printable(link)}, which is not of this folder: put the file itself here"
    for name, digest in manifest["files"].items():
        if name in left:
            continue
        try:
            known = checkpoint.config_digest if checkpoint is not None and name == CONFIG else None
            found = known or xxhash.xxh3_128_hexdigest(read_small_file(folder / name))
        except BamMergeError as error:
            yield from error.problems
            continue
        if found != digest:
            yield f"{name} is not as it was written: {REMEDY}"
    for name, shard in manifest["shards"].items():
        try:
            header = (checkpoint and checkpoint.files.get(name)) or read_header(str(folder / name))
        except BamMergeError as error:
            yield from error.problems
            continue
        if (header.digest, header.identity.size) != (shard["header"], shard["bytes"]):
            yield f"{name} has not the header that was written: {REMEDY}"


def _leads_away(folder: Path, name: str) -> str | None:
    """Where a link leads; None for a file of its own, and for a link to the blobs of the hub cache that the folder is a snapshot in."""
    path = folder / name
    if not path.is_symlink():
        return None
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if home.parent.name == "snapshots" and (target.parent == home.parent.parent / "blobs" or _is_shared(target, home.parents[2])):
        return None
    return os.readlink(path)


def _is_shared(target: Path, cache: Path) -> bool:
    """Whether a file is in the store that all models of a hub cache share: blobs/XX/DIGEST."""
    digest = target.name
    return re.fullmatch("[0-9a-f]{64}", digest) is not None and target == cache / "blobs" / digest[:2] / digest


def _unwritten(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Names in the manifest that no merge writes: a forger lists what he adds."""
    shards = len(manifest["shards"])
    weights = [SINGLE] if shards == 1 else [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    small = {"config.json", "README.md", *TOKENIZER_FILES, *PROCESSOR_FILES, *_package_code(), *([INDEX] if shards > 1 else [])}
    wrong = [*sorted(manifest["shards"].keys() - set(weights)), *sorted(manifest["files"].keys() - small)]
    if wrong:
        yield f"{some(wrong, 8)}: in the manifest, but no file that bam-merge {__version__} writes: remove it and merge again"
    if missing := sorted({"config.json", "README.md"} - manifest["files"].keys()):
        yield f"{some(missing)}: not in the manifest, though every merge writes it: {REMEDY}"


def _package_code() -> dict[str, bytes]:
    """The model code that this version puts into folders of layout bam."""
    names = ("configuration_bam.py", "modeling_bam.py")
    return {name: (resources.files("bam_merge.exported") / name).read_bytes() for name in names}


# ---- what it does not name -------------------------------------------------------------------------------------------------


def _foreign(folder: Path, expected: set[str], harmless: dict[str, str], on_hub: OnHub | None) -> Iterator[str]:
    """A message per kind of entry that is not of the merge. `harmless` is given what no loader reads, with whose it is."""
    spellings = {_plain(name): name for name in expected}
    kinds: dict[str, list[str]] = {}
    hub = False
    unseen = [(name, stat.S_IFREG) for name in sorted(on_hub.files - expected)] if on_hub is not None else []
    unseen += [(f"{name}/", stat.S_IFREG) for name in sorted(on_hub.folders)] if on_hub is not None else []
    for name, mode in (*_entries(folder, expected), *unseen):
        if name in HARMLESS and stat.S_ISREG(mode):
            harmless[name] = HARMLESS[name]
        elif HUB_NOTES.fullmatch(name) and stat.S_ISREG(mode):
            hub = True
        else:
            kinds.setdefault(_kind(name, mode, spellings), []).append(name)
    if hub:
        harmless[".cache/huggingface"] = "the hub downloader's notes"
    for kind, names in kinds.items():
        yield f"{some(names, 8)}: not of this merge: remove it{f' ({kind})' if kind else ''}"


def _entries(folder: Path, expected: set[str]) -> Iterator[tuple[str, int]]:
    """(path below `folder`, mode) of every entry that is not expected: files and links, and folders that are empty or not looked into."""
    waiting, count = [""], 0
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(folder / below) as listing:
                inside = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            yield f"{below}/", stat.S_IFDIR
            continue
        if below and not inside:
            yield f"{below}/", stat.S_IFDIR
        for entry in inside:
            name = f"{below}/{entry.name}" if below else entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and entry.name not in TOOLS:
                waiting.append(name)
            elif name not in expected:
                yield name, mode
                count += 1
            if count >= MOST_ENTRIES:
                return


def _kind(name: str, mode: int, spellings: Mapping[str, str]) -> str:
    base = name.rstrip("/").rpartition("/")[2]
    if base in TOOLS and stat.S_ISDIR(mode):
        return TOOLS[base]
    if stat.S_ISLNK(mode):
        return "a link, which a loader follows"
    if stat.S_ISDIR(mode):
        return "a folder that is empty or cannot be read"
    if not stat.S_ISREG(mode):
        return "neither a file nor a folder; reading it can hang"
    if _plain(name) in spellings:
        return f"some file systems take it for {spellings[_plain(name)]}"
    endings = set(base.lower().split(".")[1:])
    return next((words for kind, words in KINDS if endings & kind), "")


def _plain(name: str) -> str:
    """A name as a file system sees it that knows neither capitals nor spellings of one character."""
    return unicodedata.normalize("NFKC", name).casefold()


# ---- what would run --------------------------------------------------------------------------------------------------------


def code_check(folder: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint | None, left: Collection[str] = ()) -> Check:
    """The folder's model code is the installed package's, and no key of its small files names any other."""
    problems: list[str] = []
    documents = dict(_documents(folder, manifest, checkpoint, problems))
    config = documents.pop(CONFIG, None)
    for name, document in documents.items():
        keys = sorted(key for key in _keys(document, VOCABULARIES.get(name)) if key in RUNS_CODE)
        if keys:
            problems.append(f"{name} has {some(keys)}, by which transformers runs code, and which no merge writes there: remove it")
    config = config if isinstance(config, dict) else {}
    layout = find_by_model_type(config.get("model_type"), config)
    ours = layout.config.get("auto_map") if layout is not None else None
    if config.get("auto_map") != ours:
        found = printable(repr(config.get("auto_map", "missing")), 300)
        problems.append(f"config.json: auto_map is {found}, bam-merge writes {printable(repr(ours), 300) if ours else 'none'}: merge again")
    named = _keys({key: value for key, value in config.items() if key != "auto_map"})
    others = sorted(key for key in named if key in RUNS_CODE or key.startswith(CHOOSES_CODE))
    if others:
        problems.append(f"config.json has {some(others)}, which decides what code a loader runs, and which no merge writes: remove it")
    names = sorted({str(reference).partition(".")[0] + ".py" for reference in (ours or {}).values()})
    unseen = [name for name in names if name in left]
    again = refreshed(manifest)
    writer = again.version if again is not None and set(names) & set(again.files) else manifest.get("version")
    other = _other_code(folder, [name for name in names if name not in left], problems, same_version=writer == __version__)
    if unseen and not problems:
        return Check("code", None, f"{some(unseen)}: on the hub, and not downloaded: code never is. What would run was not compared")
    if problems or not other:
        held = f"{' and '.join(names)} are those of bam-merge {__version__}" if names else "none, and nothing names any"
        return Check("code", not problems, "; ".join(problems) or held)
    written = printable(str(writer))
    return Check(
        "code", None, f"{some(other)} written by bam-merge {written}, this is {__version__}: verify with that version to compare it"
    )


def _other_code(folder: Path, names: Iterable[str], problems: list[str], same_version: bool) -> list[str]:
    """The files of model code that are not this version's; they are a problem where this version wrote the folder."""
    package, other = _package_code(), []
    for name in names:
        try:
            found = read_small_file(folder / name)
        except BamMergeError as error:
            problems += error.problems
            continue
        if found != package[name]:
            other.append(name)
            if same_version:
                problems.append(f"{name} is not the model code of bam-merge {__version__}, which the manifest names: {REMEDY}")
    return other


def _documents(folder: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint | None, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Every JSON document of the manifest, parsed: a key may be spelled with escapes, so bytes are not searched."""
    for name in sorted(manifest["files"]):
        if checkpoint is not None and name == CONFIG:
            yield name, checkpoint.config
        elif name.lower().endswith(".json") and name != INDEX:
            try:
                yield name, load_json(read_small_file(folder / name))
            except BamMergeError as error:
                problems += error.problems
            except ValueError as error:
                problems.append(f"{name}: {printable(str(error))}, so its keys cannot be told: {REMEDY}")


def _keys(document: Any, vocabulary: tuple[str, ...] | None = None) -> set[str]:
    """Every key of a document, at any depth. At `vocabulary` (a path) the keys are tokens, and not given, where a number says so."""
    found: set[str] = set()
    waiting: list[tuple[Any, tuple[str, ...]]] = [(document, ())]
    while waiting:
        value, path = waiting.pop()
        if isinstance(value, dict):
            found |= {key for key, item in value.items() if not (path == vocabulary and type(item) is int)}
            waiting += ((item, (*path, key)) for key, item in value.items() if isinstance(item, dict | list))
        elif isinstance(value, list):
            waiting += ((item, path) for item in value if isinstance(item, dict | list))
    return found
