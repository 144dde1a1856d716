"""Does the manifest say what is true? Every entry that follows from the plan, the sources, the package or the folder is worked out anew.

Who can write the folder can write a matching manifest: a digest proves damage, never origin. So nothing that can be derived is believed.
"""

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import xxhash

from bam_merge import expressions
from bam_merge.address import is_address
from bam_merge.checkpoints.dtypes import DTYPES
from bam_merge.checkpoints.folder import INDEX, Checkpoint, read_small_file
from bam_merge.checkpoints.format_1 import FORMAT_1
from bam_merge.checkpoints.header import TensorEntry
from bam_merge.checkpoints.provenance import REFRESHED, SEAL, refreshed
from bam_merge.checkpoints.reading import blocks
from bam_merge.documents import load_json
from bam_merge.planning.plan import Plan
from bam_merge.recipe.schema import Recipe
from bam_merge.text import printable, some
from bam_merge.values.tensors import STORED_DTYPES, buffer

KEYS = {
    "format", "tool", "version", "recipe", "recipe_folder", "sources", "parameters", "files", "shards", "tensors", "unused", "accepted",
    "calibration", REFRESHED, SEAL,
}  # fmt: skip


SOURCE_KEYS = {"path", "config", "config_keys", "companions", "license", "license_name", "license_link", "files"}


FILE_KEYS = {"bytes", "header", "digest", "tensors"}
"""What a manifest of this format holds, a source's record, and that of one of its files; of a file elsewhere also its etag."""


MOST_PROBLEMS = 8
"""Wrong entries of a manifest that are named."""


COUNT_BYTES = 2**24
"""Bytes of a tensor that are looked at together for NaN and infinity."""


def first_problems(problems: Sequence[str]) -> str:
    """The first problems, and how many more there are."""
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    return "; ".join([*problems[:MOST_PROBLEMS], *more])


# ---- what needs the folder alone ---------------------------------------------------------------------------------------------


def contradictions(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> list[str]:
    """Where the manifest contradicts itself, the headers of the folder, or the index."""
    recipe, sources = manifest["recipe"], manifest["sources"]
    problems = []
    if REFRESHED in manifest and refreshed(manifest) is None:
        problems.append(f"{REFRESHED} is {_shown(manifest[REFRESHED])}, expected a version and files of this folder")
    if manifest.get("tool") != "bam-merge" or not isinstance(manifest.get("version"), str):
        problems.append(f"tool and version are {_shown(manifest.get('tool'))} and {_shown(manifest.get('version'))}")
    if unknown := sorted(manifest.keys() - KEYS):
        problems.append(f"{some(unknown)}: no manifest has such entries")
    places = recipe.get("sources")
    if isinstance(places, dict):
        places = dict(_places(places))
    recorded = {name: record.get("path") for name, record in sources.items()}
    if places != recorded:
        problems.append(f"sources are {_shown(recorded)}, but in the manifest's own recipe {_shown(places)}")
    problems += _source_contradictions(sources)
    problems += _tensor_contradictions(manifest)
    if not _leads_back(recipe, manifest.get("recipe_folder")):
        problems.append(f"recipe_folder {_shown(manifest.get('recipe_folder'))} is not the way back from its output path")
    total = sum(prod(entry.shape) for entry in checkpoint.tensors.values())
    parameters = manifest.get("parameters")
    if not isinstance(parameters, dict) or parameters.keys() != {"total", "active"} or parameters["total"] != total:
        problems.append(f"parameters are {_shown(parameters)}, the folder holds {total}")
    return problems + _index_problems(checkpoint)


def _places(sources: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, path) of every folder that a recipe's sources are read from: models, bases that are no sources, adapters."""
    for name, source in sources.items():
        if not isinstance(source, dict) or "adapter" not in source:
            yield name, source.get("path") if isinstance(source, dict) else _folder(source)
            continue
        if source.get("base") not in sources:
            yield f"{name}.base", _folder(str(source.get("base")).removeprefix("./"))
        if isinstance(source["adapter"], list):
            for index, item in enumerate(source["adapter"]):
                yield f"{name}.adapter[{index}]", item.get("path") if isinstance(item, dict) else item
        else:
            yield name, source["adapter"]


def _folder(text: Any) -> Any:
    """The folder of a source that may be one expert of it, FOLDER#experts.NAME."""
    found = re.fullmatch(r"(.+)#experts\.([^/\\]+)", text, re.DOTALL) if isinstance(text, str) else None
    return found[1] if found else text


def _source_contradictions(sources: Mapping[str, Any]) -> Iterator[str]:
    for name, record in sources.items():
        if unknown := sorted(record.keys() - SOURCE_KEYS):
            yield f"sources.{printable(name)}: {some(unknown)}: no manifest has such entries"
        elsewhere = is_address(str(record.get("path")))
        for file, known in record["files"].items():
            beside = known.keys() - FILE_KEYS
            pinned = not beside or (beside == {"etag"} and elsewhere and isinstance(known["etag"], str))
            whole = "".join([known["header"], *map(str, known["tensors"].values())])
            if not known.keys() >= FILE_KEYS or not pinned or known["digest"] != xxhash.xxh3_128_hexdigest(whole.encode()):
                yield f"sources.{printable(name)}: the digest of {printable(file)} is not that of its header and tensors"


def _tensor_contradictions(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Copies have the digest of what they copy, and nothing was read of which no source's record has a digest."""
    digests = {
        f"{name}:{tensor}": digest
        for name, record in manifest["sources"].items()
        for file in record["files"].values()
        for tensor, digest in file["tensors"].items()
    }
    for name, record in manifest["tensors"].items():
        source = record["expression"]
        if source in digests and digests[source] != record["digest"]:
            yield f"{printable(name)} is a copy of {printable(source)}, but their digests differ"
        if manifest["format"] == FORMAT_1:
            continue
        reads = [f"{read['source']}:{read['tensor']}" for read in record["reads"]]
        if unknown := [read for read in reads if read not in digests]:
            yield f"{printable(name)} reads {some(unknown)}, of which no source's record has a digest"
        elif source in digests and reads != [source]:
            yield f"{printable(name)} is a copy of {printable(source)}, but reads {some(reads)}"


def _leads_back(recipe: Mapping[str, Any], back: object) -> bool:
    """Whether `back` can be the way from the recipe's output to the recipe: as many steps up as the way there goes down, and so on."""
    output = recipe.get("output")
    there = output.get("path") if isinstance(output, dict) else None
    if not isinstance(there, str) or not isinstance(back, str):
        return False
    ups = [part == ".." for part in posixpath.normpath(there).split("/") if part != "."]
    steps = [part for part in posixpath.normpath(back).split("/") if part != "."]
    down = len(ups) - sum(ups)
    return steps[:down] == [".."] * down and ".." not in steps[down:] and len(steps) - down == sum(ups)


def _index_problems(checkpoint: Checkpoint) -> list[str]:
    """The index says what the headers say, and nothing else. (That every tensor is where it says is checked when a folder is opened.)"""
    if not (checkpoint.path / INDEX).is_file():
        return []
    entries = checkpoint.tensors.values()
    metadata = {"total_parameters": sum(prod(entry.shape) for entry in entries), "total_size": sum(entry.nbytes for entry in entries)}
    found = load_json(read_small_file(checkpoint.path / INDEX))
    if found.keys() == {"metadata", "weight_map"} and found["metadata"] == metadata:
        return []
    return [f"{INDEX}: expected metadata {metadata} and weight_map, found {_shown({**found, 'weight_map': '...'})}"]


def nonfinite_problems(checkpoint: Checkpoint, manifest: Mapping[str, Any]) -> tuple[list[str], bool]:
    """What is wrong in the manifest's counts of NaN and infinity, and whether any such value is where it says."""
    problems, there = [], False
    for name, record in manifest["tensors"].items():
        if (claimed := record.get("nonfinite", 0)) and name in checkpoint.tensors:
            found = _count_nonfinite(checkpoint, checkpoint.tensors[name])
            there = there or found > 0
            if found != claimed:
                problems.append(f"{printable(name)} has {found} values that are NaN or infinite, the manifest says {claimed}")
    return problems, there


def _count_nonfinite(checkpoint: Checkpoint, entry: TensorEntry) -> int:
    """By torch's values, on purpose: the merge counted bit patterns (values/nonfinite.py)."""
    dtype = STORED_DTYPES.get(entry.dtype)
    if dtype is None or DTYPES[entry.dtype].special == "none":  # every pattern is a finite number
        return 0
    bytes_B, view = buffer(min(COUNT_BYTES, entry.nbytes))
    count = 0
    for block in blocks(checkpoint, entry, view):
        values = bytes_B[: len(block)].view(dtype)
        count += int((~torch.isfinite(values.float() if dtype.itemsize == 1 else values)).sum())
    return count


# ---- what needs the plan -----------------------------------------------------------------------------------------------------


def record_problems(plan: Plan, manifest: Mapping[str, Any]) -> list[str]:
    """Where the manifest says anything else of the merge than the plan of its recipe over its sources."""
    problems = [f"recipe: {text}" for text in recipe_differences(plan.recipe, manifest) if not _is_place(text)]
    parameters = manifest.get("parameters")
    active = parameters.get("active") if isinstance(parameters, dict) else None
    if active != plan.active_parameters:
        problems.append(f"{_shown(active)} active parameters, the plan has {plan.active_parameters}")
    steps = {step.name: step for step in plan.steps}
    problems += _names("tensors", manifest["tensors"], steps)
    for name in manifest["tensors"].keys() & steps.keys():
        step, record = steps[name], manifest["tensors"][name]
        known = {"expression": step.expression, "file": step.file, "dtype": step.dtype, "shape": list(step.shape)}
        known |= {} if manifest["format"] == FORMAT_1 else {"reads": step.reads}
        found = {key: value for key, value in record.items() if key not in ("digest", "nonfinite")}
        for key in sorted(known.keys() | found.keys()):
            if _canonical(known.get(key)) != _canonical(found.get(key)):
                problems.append(f"{printable(name)}: {printable(key)} is {_shown(found.get(key))}, the plan gives {_shown(known.get(key))}")
    shards = {shard.file: {"bytes": shard.nbytes, "header": xxhash.xxh3_128_hexdigest(shard.header)} for shard in plan.shards}
    if manifest["shards"] != shards:
        wrong = sorted(name for name in {*shards, *manifest["shards"]} if shards.get(name) != manifest["shards"].get(name))
        problems.append(f"{some(wrong)}: not the size and header that the plan gives")
    if manifest.get("accepted", []) != list(plan.accepted):
        problems.append(f"accepted is {_shown(manifest.get('accepted'))}, the plan gives {_shown(list(plan.accepted))}")
    if ("calibration" in manifest) is not (plan.calibration is not None):
        problems.append(f"calibration is {'there' if 'calibration' in manifest else 'missing'}, unlike in the plan")
    unused = {name: dict(reasons) for name, reasons in plan.unused.items() if reasons}
    if manifest.get("unused") != unused:
        problems.append(f"unused is {_shown(manifest.get('unused'))}, the plan gives {_shown(unused)}")
    return problems + list(_source_problems(plan, manifest))


def _source_problems(plan: Plan, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Sources, and the tensors of each that the manifest says were read, against those that the plan's steps read."""
    checkpoints = plan.checkpoints
    reads: dict[str, set[str]] = {name: set() for name in checkpoints}
    for step in plan.steps:
        for read in expressions.reads(step.expr):
            reads[read.source].add(read.tensor)
    yield from _names("sources", manifest["sources"], reads)
    for name in manifest["sources"].keys() & reads.keys():
        recorded = {tensor: file for file, known in manifest["sources"][name]["files"].items() for tensor in known["tensors"]}
        yield from _names(f"sources.{printable(name)}: tensors read", recorded, dict.fromkeys(reads[name]))
        entries = checkpoints[name].tensors
        moved = sorted(tensor for tensor, file in recorded.items() if tensor in entries and entries[tensor].file != file)
        if moved:
            yield f"sources.{printable(name)}: {some(moved)} recorded in {some({recorded[tensor] for tensor in moved})}, stored elsewhere"


def _names(what: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    if extra := sorted(found.keys() - expected.keys()):
        yield f"{what}: {some(extra)} not in the plan"
    if missing := sorted(expected.keys() - found.keys()):
        yield f"{what}: {some(missing)} of the plan missing"


def recipe_differences(recipe: Recipe, manifest: Mapping[str, Any]) -> list[str]:
    """'KEY is X, expected Y' for every value of the manifest's recipe that is not that of `recipe` with every default written out."""
    found, expected = dict(_leaves(manifest["recipe"])), dict(_leaves(recipe.resolved()))
    return [
        f"{printable(key)} is {found.get(key, 'missing')}, expected {expected.get(key, 'none')}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]


def _is_place(difference: str) -> bool:
    return difference.startswith(("sources.", "output.path "))


def places(recipe: Recipe, manifest: Mapping[str, Any]) -> list[str]:
    """Where the manifest's recipe finds a source or puts its output elsewhere than `recipe`: it was moved, or says what is not true."""
    return [text for text in recipe_differences(recipe, manifest) if _is_place(text)]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, value in JSON) of everything in a document that holds nothing itself; keys with dots are quoted."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, _shown(value)


def _canonical(value: object) -> str:
    """A value as text in which true, 1 and 1.0 differ."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _shown(value: object) -> str:
    return printable(_canonical(value), 160)
