"""The files beside the weights that an output takes from its seed: read from the model's own folder only, and written by allow-lists.

What a loader would run, or would fetch from another place, stays behind: transformers passes every key of tokenizer_config.json and
special_tokens_map.json on to the tokenizer's constructor (5.23, tokenization_utils_base.py, _from_pretrained).
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bam_merge.checkpoints.folder import MAX_JSON, PROCESSOR_FILES, json_object
from bam_merge.checkpoints.header import open_regular
from bam_merge.documents import load_json
from bam_merge.errors import CheckpointError
from bam_merge.sources.companion_keys import ALLOWED, PROCESSOR_SECTIONS
from bam_merge.sources.companion_keys import GENERATION as GENERATION
from bam_merge.system import path_of
from bam_merge.text import printable, some

CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_generate", "custom_pipelines", "code_revision"})
"""Keys by which transformers runs code, of this folder or of any repository: left out at any depth, in any spelling of their letters."""


VOCABULARY: dict[str, tuple[str, ...]] = {"added_tokens.json": (), "vocab.json": (), "tokenizer.json": ("model", "vocab")}
"""Where a file maps tokens to ids: there a key with an id is a token, whatever its text."""


def companion(path: Path) -> bytes:
    """A tokenizer or generation file as the output gets it: byte for byte, but for keys that are not on the list of its name.

    Raises CheckpointError when it leads out of the model's folder, cannot be read, or is ambiguous: a key twice, NaN, not UTF-8.
    """
    return _prepared(path)[0]


def companion_notes(folder: Path, names: Sequence[str], load: Callable[[bytes], Any] = load_json) -> Iterator[str]:
    """What of the files `names` of the seed's `folder` the output does not get. Raises CheckpointError, as companion.

    `load` parses JSON as load_json does: who has parsed a large file already need not do it twice.
    """
    yield from key_notes(folder, names, load)
    try:
        present = sorted(os.listdir(folder))
    except OSError:  # a folder whose files may be read and not listed
        present = []
    yield from left_behind(name for name in present if name != TEMPLATES or (folder / TEMPLATES).is_dir())


def key_notes(folder: Path, names: Sequence[str], load: Callable[[bytes], Any] = load_json) -> Iterator[str]:
    """The keys of these files that the output does not get. Raises CheckpointError, as companion."""
    for name in names:
        dropped = _prepared(folder / name, load)[1]
        if dropped:
            yield f"{name}: {some(dropped, 8)} not copied: only keys that are known to be harmless are."


def left_behind(present: Iterable[str]) -> Iterator[str]:
    """Notes on what of these files and folders beside a model's weights no output gets."""
    present = list(present)
    if TEMPLATES in present:
        yield f"{TEMPLATES}/ is not copied: the output has the default chat template alone."
    others = [name for name in present if re.fullmatch(r"tokenizer\.model\..*|.*\.tiktoken|.*\.spm|spiece\.model|.*\.bpe\.model", name)]
    if others:
        yield f"{some(others)} not copied, and not compared: transformers does not read it for this family."


TEMPLATES = "additional_chat_templates"


def _prepared(path: Path, load: Callable[[bytes], Any] = load_json) -> tuple[bytes, list[str]]:
    """The bytes for the output, and the keys that were left out."""
    data = read_companion(path)
    if path.suffix != ".json":
        if path.suffix in {".txt", ".jinja"}:
            try:
                data.decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{printable(str(path))}: not UTF-8 text (byte {error.start}).") from None
        return data, []
    document = json_object(path, data, load)
    dropped: list[str] = []
    kept = _without_code(document, (), VOCABULARY.get(path.name), dropped) if _has_code(document) else document
    if allowed := ALLOWED.get(path.name):
        sections = PROCESSOR_SECTIONS if path.name in PROCESSOR_FILES else ()
        kept = _allowed(kept, allowed, sections, dropped)
    if not dropped:
        return data, []
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode(), dropped


def _allowed(
    document: dict[str, Any], allowed: Callable[[str, Any], bool], sections: Sequence[str], dropped: list[str], within: str = ""
) -> dict[str, Any]:
    """A document with what is allowed of it, and of its `sections` by the same rule; the names of the rest are added to `dropped`."""
    kept = {}
    for key, value in document.items():
        if key in sections and isinstance(value, dict):
            kept[key] = _allowed(value, allowed, (), dropped, f"{key}.")
        elif allowed(key, value):
            kept[key] = value
        else:
            dropped.append(within + key)
    return kept


def _has_code(document: Any) -> bool:
    """Whether a key at any depth reads like one of CODE_KEYS: a quick look, for a vocabulary has 300,000 entries."""
    boxes = [document]
    while boxes:
        box = boxes.pop()
        if isinstance(box, dict):
            if not CODE_KEYS.isdisjoint(box) or (len(box) < 1000 and any(map(_is_code, box))):
                return True
            box = list(box.values())
        boxes += [item for item in box if isinstance(item, dict | list)]
    return False


def _is_code(key: str) -> bool:
    return key in CODE_KEYS or (len(key) < 40 and key.strip().casefold() in CODE_KEYS)


def _without_code(value: Any, place: tuple[str, ...], vocabulary: tuple[str, ...] | None, dropped: list[str]) -> Any:
    """`value` without CODE_KEYS at any depth, except tokens of that name; the keys that are missing are added to `dropped`."""
    if isinstance(value, list):
        return [_without_code(item, (*place, "[]"), vocabulary, dropped) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        token = place == vocabulary and type(item) is int
        if not token and _is_code(key):
            dropped.append(".".join((*place, key)))
        else:
            kept[key] = _without_code(item, (*place, key), vocabulary, dropped)
    return kept


# ---- where it is read from -------------------------------------------------------------------------------------------------


def read_companion(path: Path, limit: int = MAX_JSON) -> bytes:
    """The bytes of a file of the model's folder. A link may lead within the folder or into its hub cache's blobs, and nowhere else.

    What was opened is judged, not the name: between a look at a name and its opening it may become another file's.
    Raises CheckpointError.
    """
    descriptor = open_regular(str(path))
    with os.fdopen(descriptor, "rb") as stream:
        real = _real_path(descriptor, path)
        if real is None or not _belongs(real, path.parent):
            shown = "a file that could not be found again" if real is None else printable(real)
            raise CheckpointError(
                f"{printable(str(path))}: a link that leads out of the model's folder, to {shown}. What stands there could be "
                "anybody's, and would be copied into the output: put a copy of the file into the folder, or remove the link."
            )
        if os.fstat(descriptor).st_size > limit:
            raise CheckpointError(f"{printable(str(path))}: larger than {limit:,} bytes.")
        return stream.read(limit)


def _real_path(descriptor: int, path: Path) -> str | None:
    """The path, without links, of the file that was opened; None when it cannot be told."""
    real = path_of(descriptor) or os.path.realpath(path)
    try:
        same = os.path.samestat(os.lstat(real), os.fstat(descriptor))
    except OSError:
        return None
    return real if same else None


def _real_folder(folder: Path) -> str:
    """The path of a folder without links, spelled as it is on the disk: on macOS what a user types may differ in case."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return os.path.realpath(folder)
    try:
        return path_of(descriptor) or os.path.realpath(folder)
    finally:
        os.close(descriptor)


def _belongs(real: str, folder: Path) -> bool:
    """Whether the file at `real`, a path without links, is one of the model in `folder`.

    The hub's layout is models--ORG--NAME/{snapshots/REVISION/[FOLDER/]FILE, blobs/DIGEST}; older clients link a file of a local folder
    to such a blob, too. Who makes a link to a blob by its digest knows what is in it.
    """
    home = _real_folder(folder)
    if _inside(real, home):
        return True
    file = Path(real)
    digest = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", file.name) is not None
    if digest and file.parent.name == "blobs" and file.parents[1].name.startswith("models--"):
        return True
    for above in Path(home).parents:
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            if digest and file == Path(_real_folder(above.parents[1])) / "blobs" / file.name[:2] / file.name:
                return True  # of the store that all models of a cache share
            blobs = above.parent / "blobs"  # which may be a link to another disk, or to anybody's folder: there only digests count
            return _inside(real, _real_folder(blobs)) and (digest or not blobs.is_symlink())
    return False


def _inside(real: str, folder: str) -> bool:
    return real.startswith(folder.rstrip("/") + "/")
