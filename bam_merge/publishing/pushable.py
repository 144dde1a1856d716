"""Which files of a folder may be pushed: those of a merge that its own manifest proves, or of a saved model of a kind that is known."""

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from bam_merge.architectures.opening import open_folder
from bam_merge.architectures.tables import find_by_model_type
from bam_merge.checkpoints.folder import CONFIG, INDEX, PROCESSOR_FILES, TOKENIZER_FILES, Checkpoint, read_small_file
from bam_merge.checkpoints.provenance import MANIFEST, read_manifest
from bam_merge.checkpoints.reading import blocks
from bam_merge.errors import OutputError, VerificationFailed, VerifyError
from bam_merge.text import printable, some

CODE = ("configuration_bam.py", "modeling_bam.py")


class Pushable(NamedTuple):
    """The files that are pushed, and what is to be said of the folder."""

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def pushable(folder: Path) -> Pushable:
    """The files of `folder` that may be pushed.

    Raises VerificationFailed where a check of verify fails that needs the folder alone, VerifyError for what is neither a result nor a
    model of a known kind, OutputError for values that are NaN or infinite in a folder without a manifest.
    """
    if (folder / MANIFEST).exists() or not (folder / CONFIG).is_file():
        return _merged(folder)
    return _saved(folder)


def _merged(folder: Path) -> Pushable:
    from bam_merge.verifying.alone import folder_checks  # which needs torch

    manifest = read_manifest(folder)
    checks = list(folder_checks(folder, manifest))
    if failures := [f"{check.name}: {check.detail}" for check in checks if check.ok is False]:
        raise VerificationFailed(*failures, f"{printable(str(folder))} was not pushed: bam-merge verify refuses it.")
    notes = tuple(f"{check.name}: {check.detail}" for check in checks if check.ok is None)
    return Pushable((*sorted(manifest["files"]), *sorted(manifest["shards"]), MANIFEST), notes)


def _saved(folder: Path) -> Pushable:
    """A model that a trainer saved, say: nothing proves how it was made, but what it is, is known."""
    checkpoint = open_folder(folder)
    kind, shown = checkpoint.config.get("model_type"), printable(str(folder))
    if find_by_model_type(kind) is None:
        raise VerifyError(
            f"{shown}: no {MANIFEST}, and model_type {printable(repr(kind))} is of no family or layout that is known here, so nothing "
            "can be said of it. Push it with hf upload."
        )
    here = sorted(path.name for path in folder.iterdir())
    code = [name for name in here if name.endswith(".py")]
    wrong = [name for name in code if name not in CODE or _bytes(folder, name) != _package(name)]
    if wrong:
        raise VerifyError(
            f"{shown}: no {MANIFEST}, and {some(wrong)} is not model code of this bam-merge. Put its own there, or push by hf upload."
        )
    if nonfinite := sorted(_nonfinite(checkpoint)):
        raise OutputError(f"{shown}: {some(nonfinite)}: NaN or infinite values. A model with such values is not pushed.")
    known = {CONFIG, INDEX, "README.md", *TOKENIZER_FILES, *PROCESSOR_FILES, *code, *checkpoint.files}
    files = tuple(name for name in here if name in known and not (folder / name).is_symlink())
    left = [name for name in here if name not in files]
    notes = [f"no {MANIFEST}: nothing proves how this model was made; its headers and values were looked at"]
    return Pushable(files, (*notes, *([f"not pushed: {some(left, 8)}"] if left else [])))


def _bytes(folder: Path, name: str) -> bytes:
    return read_small_file(folder / name)


def _package(name: str) -> bytes:
    return (resources.files("bam_merge.exported") / name).read_bytes()


def _nonfinite(checkpoint: Checkpoint) -> list[str]:
    """The tensors with values that are NaN or infinite."""
    import torch

    from bam_merge.values.tensors import STORED_DTYPES, buffer

    found = []
    for name, entry in checkpoint.tensors.items():
        dtype = STORED_DTYPES.get(entry.dtype)
        if dtype is None or not dtype.is_floating_point:
            continue
        bytes_B, view = buffer(min(2**24, entry.nbytes))
        for block in blocks(checkpoint, entry, view):
            values = bytes_B[: len(block)].view(dtype)
            if not torch.isfinite(values.float() if dtype.itemsize == 1 else values).all():
                found.append(name)
                break
    return found
