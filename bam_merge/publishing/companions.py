"""The files beside the tensors: configuration, index, tokenizer, model code, card and manifest."""

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import xxhash

from bam_merge.checkpoints.folder import INDEX
from bam_merge.checkpoints.header import FileIdentity
from bam_merge.checkpoints.provenance import MANIFEST, sealed
from bam_merge.files import write_file
from bam_merge.merging.tensor import Finished
from bam_merge.planning.card import Beside, has_chat_template, model_card
from bam_merge.planning.plan import Plan
from bam_merge.publishing.manifest import manifest
from bam_merge.sources.companions import companion
from bam_merge.sources.licenses import source_licenses
from bam_merge.sources.tokenizers.writing import companion_documents

CompanionFile = tuple[str, Path, FileIdentity | None]
"""A file of a source, and its state; None: it is not there."""


# ---- the files beside the tensors ------------------------------------------------------------------------------------------


def companion_files(plan: Plan) -> set[CompanionFile]:
    """The files that the output's tokenizer and generation files are made of, as they are now: (source, path, identity)."""
    readers = {plan.recipe.seed_name, *plan.files.values(), *(plan.models if plan.alignment is not None else ())}
    names = {(source, name) for name, source in plan.files.items()}
    names.update((source, name) for source in readers for name in plan.models[source].checkpoint.companions())
    paths = ((source, plan.models[source].checkpoint.path / name) for source, name in names)
    return {(source, path, _identity(path)) for source, path in paths}


def _identity(path: Path) -> FileIdentity | None:
    try:
        return FileIdentity.of(os.stat(path))
    except FileNotFoundError:
        return None


def write_companions(
    plan: Plan, folder: Path, finished: dict[str, Finished], descriptor: int, calibration: Mapping[str, Any] | None = None
) -> None:
    """config.json, index, tokenizer files, model code, model card and, last, the manifest, with what it says of a `calibration`."""
    documents = {"config.json": _json(plan.config)}
    if len(plan.shards) > 1:
        weight_map = {step.name: step.file for step in sorted(plan.steps, key=lambda step: step.name)}
        total = sum(step.nbytes for step in plan.steps)
        documents[INDEX] = _json({"metadata": {"total_parameters": plan.parameters, "total_size": total}, "weight_map": weight_map})
    folders = {name: model.checkpoint.path for name, model in plan.models.items()}
    documents.update(companion_documents(plan.files, folders, plan.alignment, companion))
    documents.update(model_code(plan.config))
    licenses = source_licenses(plan.recipe)
    documents["README.md"] = model_card(plan, Beside(licenses, has_chat_template(documents))).encode()
    digests = {name: xxhash.xxh3_128_hexdigest(data) for name, data in documents.items()}
    made = manifest(plan, finished, digests, licenses)
    documents[MANIFEST] = sealed({**made, **({"calibration": calibration} if calibration else {})})
    for name, data in documents.items():
        write_file(folder / name, data, descriptor)


def model_code(config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of `bam_merge.exported` that the config's auto_map names, as they are; none for a public layout."""
    modules = {reference.partition(".")[0] for reference in config.get("auto_map", {}).values()}
    return {f"{name}.py": (resources.files("bam_merge.exported") / f"{name}.py").read_bytes() for name in sorted(modules)}


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
