"""A dense checkpoint read through its family's table: what it computes (facts) and where each role's tensor is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_merge.architectures.config import COMMON_FUNCTION, IGNORED, NEUTRAL, ROPE_KEYS, describe, is_quantised
from bam_merge.architectures.opening import open_folder
from bam_merge.architectures.spellings import conflicts, settled_keys
from bam_merge.architectures.tables import Architecture, Row, dense_families, evaluate, find_by_model_type
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Read, Slice
from bam_merge.errors import CheckpointError
from bam_merge.expressions import Expr
from bam_merge.sources.harmless import is_harmless, refusals
from bam_merge.text import printable, some

Site = tuple[str, int | None]
"""A role, and its layer where it has one."""


@dataclass(frozen=True)
class DenseModel:
    """One source. `facts` is its configuration in one vocabulary for all families; `tensors` says where each role is.

    `dropped` names the tensors that are known and not used, with the reason; `unknown_keys` the config keys that no table knows.
    """

    name: str
    checkpoint: Checkpoint
    family: Architecture
    facts: Mapping[str, Any]
    tensors: Mapping[Site, Expr]
    dropped: Mapping[str, str]
    unknown_keys: Mapping[str, Any]


def read_dense(name: str, path: Path) -> DenseModel:
    """Open the source called `name` at `path`. Raises CheckpointError with all its problems, each prefixed with its name."""
    try:
        checkpoint = open_folder(path)
    except CheckpointError as error:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in error.problems)) from None
    family = find_by_model_type(checkpoint.config.get("model_type"))
    if family is None or family.kind != "dense":
        known = ", ".join(a.name for a in dense_families())
        found = checkpoint.config.get("model_type")
        what = "a mixture already" if family else "not a dense family known here"
        raise CheckpointError(f"sources.{name}: model_type {printable(repr(found))} is {what}. Known dense families: {known}.")
    problems: list[str] = []
    if is_quantised(checkpoint.config):
        problems.append("config.json has a quantization_config; quantised weights cannot be merged. Use the full-precision model.")
    facts = describe(family, checkpoint.config, problems)
    problems += refusals(checkpoint.config)
    problems += conflicts(family, checkpoint.config)
    locator = _Locator(name, family, facts, checkpoint, problems)
    if facts:
        locator.run()
    if problems:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in problems))
    known_keys = {*COMMON_FUNCTION, *ROPE_KEYS, *NEUTRAL, *IGNORED, *family.function, *family.neutral, *settled_keys(family)}
    unknown = {k: v for k, v in checkpoint.config.items() if k not in known_keys and not k.startswith("_") and not is_harmless(k, v)}
    return DenseModel(name, checkpoint, family, facts, locator.found, locator.dropped, unknown)


# ---- the tensors ---------------------------------------------------------------------------------------------------------


@dataclass
class _Locator:
    """Walks a family's table over one checkpoint, collecting where each role is, what is dropped, and what is wrong."""

    source: str
    family: Architecture
    facts: Mapping[str, Any]
    checkpoint: Checkpoint
    problems: list[str]
    found: dict[Site, Expr] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        layers = range(self.facts["num_hidden_layers"])
        used: set[str] = set()
        missing: list[str] = []
        for row in self.family.rows:
            wanted = row.when is None or bool(self.facts[row.when])
            for layer in layers if row.per_layer else (None,):
                spellings = [row.name(layer, spelling=s) for s in range(len(row.names))]
                present = [name for name in spellings if name in self.checkpoint.tensors]
                used.update(present)
                if wanted and not present:
                    missing.append(spellings[0])
                elif len(present) > 1:
                    self.problems.append(f"{' and '.join(present)} are two spellings of one tensor. Keep one.")
                elif present:
                    (self.cut if wanted else self.refuse)(row, layer, present[0])
        if missing:
            self.report_missing(missing)
        for name in (template.replace("{layer}", str(layer)) for template in self.family.dropped for layer in layers):
            if name in self.checkpoint.tensors:
                self.dropped[name] = "a buffer that loading recomputes"
        extra = [name for name in self.checkpoint.tensors if name not in used and name not in self.dropped]
        if extra:
            self.problems.append(
                f"{some(extra)}: {len(extra)} tensor(s) that {self.family.name} with {len(layers)} layers does not have. "
                "Nothing is dropped silently: remove them, or correct config.json."
            )

    def refuse(self, row: Row, layer: int | None, name: str) -> None:
        if row.roles == ("head",):
            self.dropped[name] = "config.json ties the head to the embeddings"  # settle_heads sees whether this copy equals them
        else:
            self.problems.append(
                f"{name} is present, but config.json has {row.when}=false, so that transformers would ignore it. "
                "Correct config.json or remove the tensor."
            )

    def cut(self, row: Row, layer: int | None, name: str) -> None:
        entry = self.checkpoint.tensors[name]
        shape = tuple(evaluate(size, self.facts) for size in row.shape)
        if entry.shape != shape:
            sizes = ", ".join(row.shape)
            self.problems.append(f"{name} is {printable(str(list(entry.shape)))}, config.json implies {list(shape)} ({sizes}).")
            return
        read = Read(self.source, name, entry.dtype, shape)
        if len(row.roles) == 1:
            self.found[row.roles[0], layer] = read
            return
        groups, start = evaluate(row.groups, self.facts), 0
        for role, part in zip(row.roles, row.parts, strict=True):
            rows = evaluate(part, self.facts)
            self.found[role, layer] = Slice(read, groups, start, rows, (groups * rows, *shape[1:]))
            start += rows

    def report_missing(self, missing: list[str]) -> None:
        heads = {name for row in self.family.rows if row.roles == ("head",) for name in row.names}
        untied = " (config.json has tie_word_embeddings=false, so the head must be there)" if heads & set(missing) else ""
        self.problems.append(f"{some(missing)} missing: {len(missing)} tensor(s){untied}. Is the download complete?")
