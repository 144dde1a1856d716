"""`bam-merge export gguf OUT FILE`: a mixture as one file for llama.cpp, which its converter writes and we read back."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_merge.architectures.config import facts_of
from bam_merge.architectures.opening import open_folder
from bam_merge.architectures.tables import Architecture, find_by_model_type
from bam_merge.checkpoints.folder import VOCABULARIES, Checkpoint
from bam_merge.errors import CheckpointError, OutputError
from bam_merge.exporting.converter import convert, find_converter, missing_packages
from bam_merge.files import mode_of_new_files
from bam_merge.planning.fill import engine_faults
from bam_merge.system import name_new, sync
from bam_merge.text import human_bytes, printable
from bam_merge.verifying.engines import engines

ENGINE = "llama.cpp"


KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""What the converter calls the dtypes."""


WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Exported:
    """A GGUF file that was made: its size, and what was compared with the folder."""

    file: Path
    nbytes: int
    dtype: str
    tensors: int
    keys: int
    notes: tuple[str, ...] = ()


def export_gguf(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    dtype: str = "source",
    converter: str | None = None,
    force: bool = False,
    notify: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write the mixture in `folder` as the GGUF file `file`, whole or not at all, and return what was made.

    dtype     of the matrices: float32, float16, bfloat16, or source, that of most of the folder's tensors. Vectors are in float32.
    converter llama.cpp's convert_hf_to_gguf.py, or the folder that has it; else it is looked for on the PATH.

    Raises CheckpointError where llama.cpp would not compute the model as transformers does, or cannot be given it; OutputError where the
    file cannot be written, or is not what the folder says.
    """
    from bam_merge.exporting.read_back import compare

    target = Path(file)
    problems = [*_target_problems(target, force), *missing_packages()]
    script, reason = find_converter(converter)
    problems += [] if script else [reason]
    try:
        checkpoint = open_folder(folder)
    except CheckpointError as error:
        raise CheckpointError(*problems, *error.problems) from error
    layout = find_by_model_type(checkpoint.config.get("model_type"), checkpoint.config)
    facts = _facts(checkpoint, layout, problems)
    wanted = _dtype(checkpoint) if dtype == "source" else dtype
    problems += _lack_of_space(checkpoint, wanted, target)
    if problems or script is None or layout is None:
        raise CheckpointError(*problems)
    notes = _notes(layout)
    for note in notes:
        notify(note)
    with _scratch(target) as scratch:
        made = Path(scratch) / "model.gguf"
        convert(script, checkpoint.path, made, KINDS[wanted])
        tensors, keys = compare(made, checkpoint, layout, facts, wanted)
        _publish(made, target, force)
    return Exported(target, target.stat().st_size, wanted, tensors, keys, tuple(notes))


def _target_problems(target: Path, force: bool) -> list[str]:
    shown = printable(str(target))
    if not target.parent.is_dir():
        return [f"{shown}: there is no folder {printable(str(target.parent))}."]
    if target.is_dir():
        return [f"{shown}: is a folder, expected the name of a file."]
    if target.exists() and not target.is_file():
        return [f"{shown}: is a device, pipe or socket, which no file takes the place of. Name a file."]
    if target.exists() and not force:
        return [f"{shown}: exists. Choose another name, or replace it with --force."]
    return []


def _lack_of_space(checkpoint: Checkpoint, dtype: str, target: Path) -> list[str]:
    """That the file system has no room for the tensors, which are most of the file."""
    if not target.parent.is_dir():
        return []
    nbytes = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values()) * WIDTHS[dtype]
    free = shutil.disk_usage(target.parent).free
    if nbytes <= free:
        return []
    where = printable(str(target.parent))
    return [f"{where}: {human_bytes(free)} free, the file takes {human_bytes(nbytes)}. Free some space, or choose another FILE or --dtype."]


def _scratch(target: Path) -> "tempfile.TemporaryDirectory[str]":
    """A folder beside the file. Raises OutputError."""
    try:
        return tempfile.TemporaryDirectory(dir=target.parent, prefix=".bam-merge.")
    except OSError as error:
        raise OutputError(
            f"{printable(str(target.parent))}: {error.strerror}, so no file can be made there. Choose another FILE."
        ) from error


def _facts(checkpoint: Checkpoint, layout: Architecture | None, problems: list[str]) -> dict[str, Any]:
    """What config.json says; problems get why llama.cpp cannot be given the model, or would compute something else of it."""
    shown = printable(str(checkpoint.path))
    if layout is None or layout.kind != "mixture":
        kind = printable(repr(checkpoint.config.get("model_type")), 60)
        problems.append(f"{shown}: model_type {kind} is no layout of mixtures that is known here. llama.cpp's converter alone may know it.")
        return {}
    engine = next((engine for engine in layout.engines if engine.name == ENGINE), None)
    if engine is not None and engine.runs and engine.architecture is None:
        problems.append(
            f"{shown}: layout {layout.name}: {ENGINE} is expected to run it ({engine.how}), but what its tensors are called in a GGUF "
            f"file is not known here, so that nothing could be read back. Use {ENGINE}'s own converter, and compare a few replies with "
            "transformers'."
        )
        return {}
    if engine is None or not engine.runs or engine.architecture is None:
        why = f"{engine.how} ({engine.version})" if engine and not engine.runs else "it has no such architecture that is known here"
        problems.append(
            f"{shown}: layout {layout.name}: {ENGINE}: {why}. `bam-merge plan` names the layouts that it serves: output.serves."
        )
        return {}
    said: list[str] = []
    facts = facts_of(layout, checkpoint.config, said)
    problems += [f"{shown}: {text}" for text in said]
    if facts:
        facts = {**facts, "rope_type": facts["rope_parameters"]["rope_type"]}
        problems += [f"{shown}: {text}" for text in engine_faults(layout, facts)[ENGINE]]
        problems += [f"{shown}: {check.detail}." for check in engines(checkpoint) if not check.ok]
    if VOCABULARIES.isdisjoint(checkpoint.companions()):
        problems.append(f"{shown}: no tokenizer.json or tokenizer.model: a GGUF file holds the tokenizer. Put the model's into the folder.")
    return facts


def _notes(layout: Architecture) -> list[str]:
    (engine,) = [engine for engine in layout.engines if engine.name == ENGINE]
    return [] if engine.tried else [f"layout {layout.name} was not tried in {ENGINE}: {engine.how}."]


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most bytes of the folder have."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return STORED.get(max(sizes, key=lambda dtype: sizes[dtype]), "float32")


def _publish(made: Path, target: Path, force: bool) -> None:
    """Give the finished file its name, in one step, with its bytes on the disk."""
    try:
        with open(made, "rb+") as stream:
            os.fchmod(stream.fileno(), mode_of_new_files())
            sync(stream.fileno())
        if force:
            os.replace(made, target)
        else:
            name_new(str(made), target)
    except OSError as error:
        raise OutputError(f"{printable(str(target))}: {error.strerror}.") from error
