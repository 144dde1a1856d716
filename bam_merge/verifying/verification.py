"""Verification: the result proves itself, from its bytes to what it computes, against its own sources by other code than made it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bam_merge.checkpoints.folder import read_small_file
from bam_merge.checkpoints.provenance import read_manifest
from bam_merge.documents import load_json
from bam_merge.errors import BamMergeError, CheckpointError, VerifyError
from bam_merge.model.loading import open_model
from bam_merge.model.tokens import encode, open_tokenizer
from bam_merge.paths import located
from bam_merge.planning.make import make_plan
from bam_merge.planning.plan import Plan
from bam_merge.recipe.load import parse_recipe
from bam_merge.recipe.schema import Recipe
from bam_merge.text import printable, some
from bam_merge.verifying.computed import against_dense, as_it_is, open_all
from bam_merge.verifying.config import same_function, same_head
from bam_merge.verifying.engines import engines
from bam_merge.verifying.perplexity import perplexities, read_texts
from bam_merge.verifying.report import Check, Report
from bam_merge.verifying.stored import against_sources, digests, not_computed, structure

SAMPLE = """The quick brown fox jumps over the lazy dog. def add(a, b): return a + b. This licence is granted to any person who obtains a \
copy of the software. Let x be a real number such that x * x = 2; then x is not rational."""


SAMPLE_TOKENS = 48
"""Tokens of the sample, in two sequences."""


MOST_KEYS = 8
"""Wrong keys of config.json that are named."""


def verify(folder: str | os.PathLike[str], plan: Plan | None = None, texts: Sequence[str | os.PathLike[str]] = ()) -> Report:
    """Verify the merged folder; with `texts`, also measure perplexities.

    The sources are those of `plan`, or are found from the manifest; without them only digests and the model itself are checked, and
    the report says so. Raises VerifyError when the folder has no manifest, CheckpointError for a text that cannot be read.
    """
    path = located(folder, error=VerifyError)
    manifest = read_manifest(path)
    ids = read_texts(path, texts)
    report = Report(experts=tuple(map(printable, manifest["recipe"].get("experts", ()))))
    report.add(structure(path, manifest))
    if not any(check.name == "layout" for check in report.checks):  # the headers cannot be read: nothing more can be
        return report
    report.add(engines(path))
    report.add(digests(path, manifest))
    if plan is None:
        plan = _plan_of(path, manifest, report)
    if plan is not None:
        report.add([_config_check(path, plan)])
        report.add(against_sources(path, plan, manifest))
    if (reason := not_computed(manifest)) is not None:
        report.add([Check("model", None, reason)])
        return report
    try:
        report.add(_function(path, plan, report))
    except CheckpointError as error:
        report.add([Check("model", False, "; ".join(error.problems))])
        return report
    report.perplexity = perplexities(path, plan, ids) if ids else []
    return report


def _plan_of(folder: Path, manifest: dict[str, Any], report: Report) -> Plan | None:
    """The plan of the manifest's recipe over the sources where they were, if they are still what was merged."""
    try:
        plan = make_plan(_recipe_of(folder, manifest))
    except BamMergeError as error:
        report.add([Check("sources", None, f"not at hand, so digests only: {error.problems[0]} (--recipe names them)")])
        return None
    changed = changed_sources(plan, manifest)
    if changed:
        report.add([Check("sources", None, f"changed since the merge, so digests only: {some(changed)}")])
        return None
    report.add([Check("sources", True, f"{len(plan.models)} folders, as they were merged")])
    return plan


def _recipe_of(folder: Path, manifest: dict[str, Any]) -> Recipe:
    """The manifest's recipe, standing where its output path leads back from `folder`."""
    home = os.path.normpath(folder.absolute() / str(manifest.get("recipe_folder", ".")))
    return parse_recipe(manifest["recipe"], Path(home), str(folder / "bam_merge.json"))


def changed_sources(plan: Plan, manifest: dict[str, Any]) -> list[str]:
    """Source files whose header or size is not what the manifest recorded."""
    changed = []
    for name, record in manifest["sources"].items():
        files = plan.models[name].checkpoint.files if name in plan.models else {}
        for file, known in record["files"].items():
            if file not in files or (files[file].digest, files[file].identity.size) != (known["header"], known["bytes"]):
                changed.append(f"{name}/{file}")
    return changed


def _config_check(folder: Path, plan: Plan) -> Check:
    """config.json against the one that the sources and the recipe lead to, key by key."""
    try:
        found = load_json(read_small_file(folder / "config.json"))
    except (ValueError, BamMergeError) as error:
        return Check("config", False, printable(str(error)))
    wrong = [
        f"{key} is {_shown(found, key)}, the sources and the recipe give {_shown(plan.config, key)}"
        for key in sorted({*found, *plan.config})
        if key not in found or key not in plan.config or found[key] != plan.config[key]
    ]
    more = [f"and {len(wrong) - MOST_KEYS} more keys"] if len(wrong) > MOST_KEYS else []
    detail = "; ".join([*wrong[:MOST_KEYS], *more])
    return Check("config", not wrong, detail or f"{len(found)} keys follow from the sources and the recipe")


def _shown(config: Mapping[str, Any], key: str) -> str:
    return printable(repr(config[key]), 60) if key in config else "missing"


def _function(folder: Path, plan: Plan | None, report: Report) -> Iterator[Check]:
    mixture = open_model(folder)
    ids_BT, sample = sample_tokens(folder, mixture.config.vocab_size)
    if plan is not None:
        _, dense = open_all(folder, plan)
        yield from same_function(mixture, dense)
        yield from same_head(mixture, dense, ids_BT)
    if plan is not None and plan.layout.kind == "mixture":
        yield from against_dense(mixture, dense, plan, ids_BT)
    yield from as_it_is(mixture, ids_BT, report, sample)


def sample_tokens(folder: Path, vocabulary: int) -> tuple[Tensor, str]:
    """Two sequences of token ids [2, SAMPLE_TOKENS / 2], and what they are: a text, or pseudo-random ids where none can be read."""
    try:
        ids = encode(open_tokenizer(folder), SAMPLE)
    except CheckpointError as error:
        why = str(error)
    else:
        if len(ids) >= SAMPLE_TOKENS and max(ids) < vocabulary:
            return torch.tensor(ids[:SAMPLE_TOKENS]).view(2, -1), "a sample text"
        why = f"tokenizer.json gives {len(ids)} ids up to {max(ids, default=0)}, the vocabulary has {vocabulary}"
    return torch.randint(vocabulary, (2, SAMPLE_TOKENS // 2), generator=torch.Generator().manual_seed(0)), f"random tokens ({why})"
