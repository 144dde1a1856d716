"""`bam-merge convert`: a folder of pickled weights (.bin, .pt, .pth) to one of safetensors, with its config and tokenizer files.

Tensors keep their names, dtypes and values. Nothing is unpickled here: child.py reads each file in a process of its own, first to say
what is in it, then to write the tensors' bytes where they belong. The result appears complete or not at all, as a merge's does.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bam_merge.architectures.opening import open_folder
from bam_merge.architectures.tables import find_by_model_type, head_names
from bam_merge.checkpoints.adapter_folder import ADAPTER_WEIGHTS, open_adapter
from bam_merge.checkpoints.folder import INDEX, TOKENIZER_FILES, read_small_file
from bam_merge.checkpoints.header import FileIdentity, open_regular
from bam_merge.checkpoints.pieces import Read
from bam_merge.converting.child import Found, Limits, read_pickle
from bam_merge.converting.source import PICKLED_INDEX, Source, find_source
from bam_merge.errors import CheckpointError, DurabilityUncertain, OutputError
from bam_merge.files import begun_anew, write_file, writing
from bam_merge.hub_id import hub_id
from bam_merge.merging.outputs import prepare
from bam_merge.paths import located
from bam_merge.planning.plan import Shard, Step
from bam_merge.planning.steps import place
from bam_merge.publishing.destination import lack_of_space, occupied, overlap
from bam_merge.publishing.durable import sync_descriptor
from bam_merge.publishing.publish import put_in_place
from bam_merge.publishing.staging import Staging
from bam_merge.recipe.rules import parse_size
from bam_merge.sources.companions import companion, companion_notes
from bam_merge.system import sync
from bam_merge.text import count, human_bytes, printable, some

SAFE_TORCH = (2, 6)
"""Older ones can be made to run code by a file, weights_only or not (CVE-2025-32434)."""


@dataclass(frozen=True)
class Converted:
    """What was written where. `notes` say what was left out, and why."""

    path: Path
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    force: bool = False,
    notify: Callable[[str], None] = lambda text: None,
    limits: Limits | None = None,
    max_shard_size: str = "5GB",
) -> Converted:
    """Write the model in `folder` (or one file of pickled weights) as safetensors files into the new folder `output`.

    Raises CheckpointError for what cannot be read, or asks for more than to be read, OutputError where nothing can be written; nothing
    is left behind then. `force` replaces a folder that holds a saved model and nothing else, as that of a merge does.
    """
    _check_torch()
    try:
        most = parse_size(max_shard_size)
    except ValueError as error:
        raise OutputError(f"--max-shard-size: {error}") from None
    source = find_source(_here(folder))
    target = Path(os.path.abspath(located(output, error=OutputError)))
    _check_target(source, target, force)
    companions = [name for name in TOKENIZER_FILES if (source.folder / name).is_file()]
    beside = {name: companion(source.folder / name) for name in companions}  # by the rule of a merge: no links to anywhere, no code's names
    with _opened(source):
        dropped = _look_inside(source, limits)
        steps = _steps(source, dropped)
        placed, shards = place(steps, 2**62 if source.is_adapter else most)
        if source.is_adapter:  # whose one file has a name of its own
            placed = tuple(replace(step, file=ADAPTER_WEIGHTS) for step in placed)
            shards = tuple(replace(shard, file=ADAPTER_WEIGHTS) for shard in shards)
        nbytes = sum(shard.nbytes for shard in shards)
        if lack := lack_of_space(nbytes, target, "the model takes"):
            raise OutputError(lack)
        _publish(source, target, force, notify, lambda staging: _write(source, placed, shards, beside, staging, limits))
    notes = [
        *_left_out(source, dropped),
        *(note.removesuffix(".") for note in companion_notes(source.folder, companions)),
        *(f"{printable(name)} equals the embeddings, which config.json ties it to: left out" for name in dropped),
    ]
    return Converted(target, len(placed), nbytes, tuple(shard.file for shard in shards), tuple(notes))


@begun_anew()
def _publish(source: Source, target: Path, force: bool, notify: Callable[[str], None], write: Callable[[Staging], None]) -> None:
    """Have everything written beside the target, and put it in its place when it is whole."""
    staging = Staging.open(target, notify)
    try:
        staging.begin_afresh()
        write(staging)
        _check_unchanged(source)
        if not staging.is_ours():
            raise OutputError(f"{printable(str(staging.folder))} was deleted while it was written. Nothing was published; run again.")
        (open_adapter if source.is_adapter else open_folder)(staging.output)  # what appears can be opened
        put_in_place(staging, target, force)
    except DurabilityUncertain:  # it is published
        raise
    except BaseException:
        staging.remove()
        raise
    finally:
        staging.close()


def _here(folder: str | os.PathLike[str]) -> Path:
    """The folder or file on this machine. Raises CheckpointError for a model of the hub, of which pickled weights are never downloaded."""
    wanted = hub_id(os.fsdecode(folder))
    if wanted is not None and (wanted.marked or not os.path.lexists(located(folder))):
        raise CheckpointError(
            f"{printable(os.fsdecode(folder))}: no such folder, and of models of the hub pickled weights are never downloaded here. "
            f"Download it (hf download {wanted.repo} --local-dir FOLDER), and convert FOLDER."
        )
    return located(folder)


def _check_torch() -> None:
    installed = version("torch")  # it is not imported here
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) < SAFE_TORCH:
        raise CheckpointError(
            f"torch {installed} cannot read pickled weights safely (CVE-2025-32434): 2.6 or later does. Update torch, or convert "
            "on another machine."
        )


def _check_target(source: Source, target: Path, force: bool) -> None:
    problems = [text.replace("another --output", "another OUTPUT") for text in occupied(target, force)]
    if how := overlap(target, source.folder.resolve()):
        problems = [f"{printable(str(target))} {how} {printable(str(source.folder))}, which is converted. Choose another folder."]
    if problems:
        raise OutputError(*problems)


@contextmanager
def _opened(source: Source) -> Iterator[None]:
    """Every file is opened once, so that what is looked at is what is written."""
    with ExitStack() as stack:
        for name in source.names:
            descriptor = open_regular(str(source.folder / name))
            stack.callback(os.close, descriptor)
            source.open[name] = descriptor
            source.identities[name] = FileIdentity.of(os.fstat(descriptor))
        yield


def _check_unchanged(source: Source) -> None:
    for name, descriptor in source.open.items():
        if FileIdentity.of(os.fstat(descriptor)) != source.identities[name]:
            raise CheckpointError(f"{source.where(name)} changed while it was converted. Run again when nothing writes to it.")


# ---- what is in it ---------------------------------------------------------------------------------------------------------


def _look_inside(source: Source, limits: Limits | None) -> tuple[str, ...]:
    """Fill `source.contents`. Returns the names of heads that are the embeddings over again. Raises CheckpointError."""
    heads, embeddings = ((), ()) if source.is_adapter else _tied(source.config)
    for name, descriptor in source.open.items():
        source.contents[name] = read_pickle(source.folder / name, descriptor, (*heads, *embeddings) if heads else (), limits=limits)
    places: dict[str, str] = {}
    problems = []
    for file, contents in source.contents.items():
        for tensor in contents.tensors:
            if tensor in places:
                problems.append(f"{source.where(file)}: {printable(tensor)} is in {places[tensor]} too. Keep one.")
            places[tensor] = file
    if source.listed is not None:
        absent = [name for name in source.listed if name not in places]
        unlisted = [name for name in places if name not in source.listed]
        if absent:
            problems.append(f"{source.where(PICKLED_INDEX)}: lists {some(absent)}, which no file holds. Is the download complete?")
        if unlisted:
            problems.append(f"{source.where(PICKLED_INDEX)}: does not list {some(unlisted)}, which the files hold.")
    if problems:
        raise CheckpointError(*problems)
    tensors = _tensors(source)
    kept = [tensors[name] for name in embeddings if name in tensors]
    return tuple(name for name in heads if name in tensors and any(_same(tensors[name], other) for other in kept))


def _tied(config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a head that config.json says is the embeddings, and of the embeddings; nothing where it says otherwise.

    transformers stores no such head (PreTrainedModel.save_pretrained drops tied weights); in pickled files it stood beside them.
    """
    table = find_by_model_type(config.get("model_type"), config)
    tied = config.get("tie_word_embeddings", table.defaults.get("tie_word_embeddings") if table else None)
    if tied is not True:
        return (), ()
    if table is None:
        return ("lm_head.weight",), ("model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight")
    return head_names(table), tuple(name for row in table.rows if row.roles == ("embed",) for name in row.names)


def _same(a: Found, b: Found) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.digest is not None and a.digest == b.digest


def _tensors(source: Source) -> dict[str, Found]:
    return {name: found for contents in source.contents.values() for name, found in contents.tensors.items()}


def _left_out(source: Source, dropped: tuple[str, ...]) -> Iterator[str]:
    """What is to be said of what stands beside the tensors, and of tensors that are one in the file."""
    if source.config.get("auto_map"):
        yield "config.json names Python code of the model (auto_map), which is not copied"
    for file, contents in source.contents.items():
        if contents.left_out:
            named = [f"{name} ({what})" for name, what in contents.left_out.items()]
            yield f"{printable(file)} also holds {some(named, 6)}, which is no tensor of the model: left out"
    memories: dict[tuple[str, int], list[str]] = {}
    for file, contents in source.contents.items():
        for name, found in contents.tensors.items():
            if found.memory and name not in dropped:
                memories.setdefault((file, found.memory), []).append(name)
    shared = [" and ".join(map(printable, names)) for names in memories.values() if len(names) > 1]
    if shared:
        yield f"{some(shared)} share their memory: each is written for itself"


# ---- writing ---------------------------------------------------------------------------------------------------------------


def _steps(source: Source, dropped: tuple[str, ...]) -> list[Step]:
    steps = []
    for file, contents in source.contents.items():
        for name, found in contents.tensors.items():
            if name not in dropped:
                steps.append(Step(name, "", None, None, found.dtype, found.shape, Read(file, name, found.dtype, found.shape), "convert"))
    return steps


def _write(
    source: Source,
    steps: tuple[Step, ...],
    shards: tuple[Shard, ...],
    beside: Mapping[str, bytes],
    staging: Staging,
    limits: Limits | None,
) -> None:
    """The tensors, then the files beside them, all synced."""
    with ExitStack() as stack:
        outputs: dict[str, int] = {}
        for shard in shards:
            outputs[shard.file] = prepare(staging.output / shard.file, shard.header, shard.nbytes, staging.files)
            stack.callback(os.close, outputs[shard.file])
        for file, descriptor in source.open.items():
            wanted = {
                step.name: (outputs[step.file], step.offset) for step in steps if isinstance(step.expr, Read) and step.expr.source == file
            }
            again = read_pickle(source.folder / file, descriptor, write=wanted, limits=limits)
            if {n: (f.dtype, f.shape) for n, f in again.tensors.items()} != {
                n: (f.dtype, f.shape) for n, f in source.contents[file].tensors.items()
            }:
                raise CheckpointError(f"{source.where(file)} changed while it was converted. Run again when nothing writes to it.")
        for file, descriptor in outputs.items():
            with writing(staging.output / file):
                if os.fstat(descriptor).st_size != next(shard.nbytes for shard in shards if shard.file == file):
                    raise OutputError(f"{printable(file)} has another size than it was made with. Nothing was published.")
                sync(descriptor)
    documents = {source.config_name: read_small_file(source.folder / source.config_name)}
    if len(shards) > 1:
        weight_map = {step.name: step.file for step in sorted(steps, key=lambda step: step.name)}
        index = {"metadata": {"total_size": sum(step.nbytes for step in steps)}, "weight_map": weight_map}
        documents[INDEX] = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
    for name, data in {**documents, **beside}.items():
        write_file(staging.output / name, data, staging.files)
    sync_descriptor(staging.files, staging.output)


def summary(result: Converted) -> str:
    """The line that a finished conversion prints."""
    return (
        f"{printable(str(result.path), 1000)}: {count(result.tensors, 'tensor')}, {human_bytes(result.nbytes)} in "
        f"{count(len(result.files), 'file')}"
    )
