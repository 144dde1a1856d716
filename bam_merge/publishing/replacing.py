"""What --force may delete: files that bam-merge or what saves a model wrote, by an exact table, and nothing else."""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bam_merge.checkpoints.folder import INDEX, PROCESSOR_FILES, SINGLE, TOKENIZER_FILES
from bam_merge.checkpoints.provenance import MANIFEST
from bam_merge.documents import load_json
from bam_merge.own_folder import FOLDER, kind, opened_folder, read_file, who
from bam_merge.text import printable, some

SAVED = {
    MANIFEST: "bam-merge",
    "modeling_bam.py": "bam-merge; other Python files may be somebody's work",
    "configuration_bam.py": "bam-merge",
    "README.md": "bam-merge, Trainer: a model card, which begins with metadata; other texts may be somebody's",
    "config.json": "save_pretrained: the model's; one that is of no model may be another program's",
    SINGLE: "save_pretrained",
    "model-#####-of-#####.safetensors": "save_pretrained, in shards",
    INDEX: "save_pretrained, in shards",
    "pytorch_model.bin": "save_pretrained of transformers before 5, or with safe_serialization=False",
    "pytorch_model-#####-of-#####.bin": "the same, in shards",
    "pytorch_model.bin.index.json": "the same, in shards",
    "training_args.bin": "Trainer.save_model",
    **dict.fromkeys(TOKENIZER_FILES, "save_pretrained of a model or a tokenizer"),
    "spiece.model": "save_pretrained of a tokenizer (T5, Albert, ...)",
    "sentencepiece.bpe.model": "save_pretrained of a tokenizer (XLM-R, ...)",
    "spm.model": "save_pretrained of a tokenizer (DeBERTa)",
    "tekken.json": "save_pretrained of Mistral's tokenizers",
    "additional_chat_templates/*.jinja": "save_pretrained of a tokenizer with several templates",
    **dict.fromkeys(PROCESSOR_FILES, "save_pretrained of a processor"),
}
"""Names of regular files that may be deleted, and who writes them; # is a digit. Everything else is foreign: links, other folders,
hidden files, states of training (optimizer.pt, checkpoint-500), weights in other formats."""


_PATTERNS = tuple(pattern.replace("#", "[0-9]") for pattern in SAVED)


_FOLDERS = {pattern.partition("/")[0] for pattern in SAVED if "/" in pattern}


_MODEL_KEYS = {"model_type", "architectures", "hidden_size", "num_hidden_layers", "vocab_size"}


LISTED = 20
"""Foreign entries that a message names."""


Which = tuple[int, int, int, int]
"""A file on this host and its state: device, inode, size in bytes, mtime in ns. What is deleted is what this process looked at."""


def _which(status: os.stat_result) -> Which:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Contents:
    """A folder's entries: what savers wrote (path: which file that is), and the names of all else, a folder's with a slash."""

    saved: Mapping[str, Which]
    foreign: tuple[str, ...]


def contents(folder: int) -> Contents:
    """What is in the folder of that descriptor. Raises OSError."""
    saved, foreign = {}, []
    for where, name, path, status in _entries(folder):
        if _is_saved(where, name, path, status):
            saved[path] = _which(status)
        else:
            foreign.append(path + "/" * stat.S_ISDIR(status.st_mode))
    return Contents(saved, tuple(foreign))


def _entries(folder: int, within: str = "") -> Iterator[tuple[int, str, str, os.stat_result]]:
    """(descriptor of its folder, name, path, status) of every entry; of the folders that savers write, of what is in them."""
    for name in sorted(os.listdir(folder)):
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode) and not within and name in _FOLDERS:
                with opened_folder(name, folder) as inside:
                    yield from _entries(inside, f"{name}/")
            else:
                yield folder, name, within + name, status


def _is_saved(folder: int, name: str, path: str, status: os.stat_result) -> bool:
    if not stat.S_ISREG(status.st_mode) or not any(fnmatchcase(path, pattern) for pattern in _PATTERNS):
        return False
    if path == "README.md":
        return _beginning(name, folder, 3) in (b"---", b"")
    if path == "config.json":
        return _may_be_a_models(_beginning(name, folder, 1_000_000))
    return True


def _beginning(name: str, folder: int, limit: int) -> bytes:
    try:
        return read_file(name, folder, limit)
    except OSError:
        return b"?"


def _may_be_a_models(data: bytes) -> bool:
    """Whether a config.json is a model's, whole or damaged; one that is whole and says nothing of a model is another program's."""
    try:
        document = load_json(data)
    except ValueError:
        return True
    return isinstance(document, dict) and bool(_MODEL_KEYS & document.keys())


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A descriptor of the folder, which is no link."""
    descriptor = os.open(folder, FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def why_kept(target: Path) -> tuple[str | None, Contents]:
    """Why --force must not replace what stands at `target`, if so, in words that follow its name; and what is in it."""
    nothing = Contents({}, ())
    try:
        status = os.lstat(target)
        if not stat.S_ISDIR(status.st_mode):
            return f"is {kind(status)}, and --force replaces nothing but a folder. Remove it yourself, or choose another --output", nothing
        if not os.access(target, os.W_OK | os.X_OK):
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            return f"is not yours to write in (mode {mode}, of {who(status.st_uid)}), so --force will not delete it", nothing
        with opened(target) as descriptor:
            found = contents(descriptor)
    except OSError as error:
        return f"cannot be looked into, so --force will not delete it: {error.strerror}. Choose another --output", nothing
    names = some((name if len(name) <= 60 else f"{name[:60]}..." for name in found.foreign), LISTED)
    if found.foreign:
        what = "" if "config.json" in found.saved else "is not a checkpoint folder, so --force will not delete it. It "
        return (
            f"{what}holds what neither bam-merge nor save_pretrained writes: {names}. --force would delete that with it: move it "
            "elsewhere, or choose another --output",
            found,
        )
    if found.saved and "config.json" not in found.saved:
        return (
            f"is not a checkpoint folder, so --force will not delete it: no config.json, only {some(found.saved)}. Remove it yourself",
            found,
        )
    return None, found


def delete_saved(folder: int, checked: Mapping[str, Which] | None, keep: frozenset[str] = frozenset()) -> tuple[list[str], OSError | None]:
    """Delete from the folder of that descriptor the files `checked`, if they are still the same (None: all that savers write), but `keep`.

    Returns the names of the foreign entries that are left, and why a file could not be deleted.
    """
    foreign: dict[str, None] = {}
    failure = None
    for where, name, path, status in _entries(folder):
        if path in keep:
            continue
        if _is_saved(where, name, path, status) if checked is None else checked.get(path) == _which(status):
            try:
                os.unlink(name, dir_fd=where)
            except OSError as error:
                failure = failure or error
        else:
            foreign[path.partition("/")[0]] = None
    for name in _FOLDERS - foreign.keys():
        with suppress(OSError):
            os.rmdir(name, dir_fd=folder)
    return list(foreign), failure


def refusal(target: Path) -> str | None:
    """`why_kept` as one message."""
    why, _ = why_kept(target)
    return None if why is None else f"{printable(str(target))} exists and {why}."
