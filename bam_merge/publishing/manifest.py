"""bam_merge.json: the recipe as resolved, how every tensor was made, and digests (XXH3-128) of everything read and written."""

import os
from collections.abc import Mapping
from typing import Any

import xxhash

from bam_merge import expressions
from bam_merge._version import __version__
from bam_merge.address import is_address
from bam_merge.checkpoints.afar import TIME
from bam_merge.checkpoints.pieces import Read
from bam_merge.checkpoints.provenance import MANIFEST_FORMAT, companion_digests, key_digests
from bam_merge.checkpoints.reading import digest_tensor
from bam_merge.errors import CheckpointError
from bam_merge.merging.tensor import Finished
from bam_merge.paths import relative
from bam_merge.planning.plan import Plan
from bam_merge.sources.licenses import License


def manifest(plan: Plan, finished: dict[str, Finished], files: dict[str, str], licenses: Mapping[str, License]) -> dict[str, Any]:
    """What was made from what, with digests (XXH3-128), and the sources' licenses. Same inputs, recipe and version: same bytes."""
    tensors: dict[str, dict[str, Any]] = {}
    for step in plan.steps:
        record: dict[str, Any] = {
            "expression": step.expression, "reads": step.reads, "file": step.file, "dtype": step.dtype, "shape": list(step.shape),
            "digest": finished[step.name].digest,
        }  # fmt: skip
        if finished[step.name].nonfinite:
            record["nonfinite"] = finished[step.name].nonfinite
        tensors[step.name] = record
    return {
        "format": MANIFEST_FORMAT,
        "tool": "bam-merge",
        "version": __version__,
        "recipe": plan.recipe.resolved(),
        "recipe_folder": recipe_folder(plan),
        **({"accepted": list(plan.accepted)} if plan.accepted else {}),
        "sources": _source_records(plan, finished, licenses),
        "parameters": {"total": plan.parameters, "active": plan.active_parameters},
        "files": dict(sorted(files.items())),
        "shards": {shard.file: {"bytes": shard.nbytes, "header": xxhash.xxh3_128_hexdigest(shard.header)} for shard in plan.shards},
        "tensors": tensors,
        "unused": {name: dict(sorted(reasons.items())) for name, reasons in plan.unused.items() if reasons},
    }


def recipe_folder(plan: Plan) -> str:
    """The way from the recipe's output path to the folder of the recipe, from which its sources are named."""
    folder = os.path.abspath(plan.recipe.folder)
    return os.path.relpath(folder, os.path.join(folder, relative(plan.recipe.output.path, plan.recipe.folder)))


def _source_records(plan: Plan, finished: dict[str, Finished], licenses: Mapping[str, License]) -> dict[str, Any]:
    """For each folder that was read its path and, for each file read, a digest; for weights their size, and digests of header and tensors.

    A file's `digest` is the XXH3-128 of the header's digest and the digests of the tensors read, in file order.
    """
    known: dict[str, str] = {}
    for name, result in finished.items():
        for key, digest in result.reads.items():
            if known.setdefault(key, digest) != digest:
                raise CheckpointError(
                    f"{key} changed while it was being merged (read again for {name}). Run again when nothing writes to it."
                )
    used: dict[str, dict[str, Read]] = {name: {} for name in plan.checkpoints}
    for step in plan.steps:
        for read in expressions.reads(step.expr):
            used[read.source][read.tensor] = read
    records = {}
    for source, checkpoint in plan.checkpoints.items():
        files = {}
        for file, header in checkpoint.files.items():
            entries = [entry for entry in header.tensors if entry.name in used[source]]
            digests = {}
            for entry in entries:
                key = str(used[source][entry.name])
                digests[entry.name] = known.get(key) or digest_tensor(checkpoint, entry)
            if entries:
                whole = xxhash.xxh3_128_hexdigest("".join([header.digest, *digests.values()]).encode())
                etag = _etag(plan, source, header.identity.etag)
                files[file] = {"bytes": header.identity.size, "header": header.digest, **etag, "digest": whole, "tensors": digests}
        records[source] = {
            "path": plan.recipe.relative(plan.recipe.stores[source].path),
            "config": checkpoint.config_digest,
            "config_keys": key_digests(checkpoint.config),
            "companions": companion_digests(checkpoint.path, plan.companions(source)),
            **(licenses[source].entries() if source in licenses else {}),
            "files": files,
        }
    return records


def _etag(plan: Plan, source: str, etag: str) -> dict[str, str]:
    """What pins a file of a folder elsewhere; of a model of the hub its commit does, and a time is no property of the file."""
    return {"etag": etag} if etag and not etag.startswith(TIME) and is_address(plan.recipe.stores[source].path) else {}
