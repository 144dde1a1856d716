"""Recipe x architectures x headers -> Plan: every output tensor, how it is made, where it goes; and every problem at once.

Nothing here imports torch, or reads tensor data but to compare a tied head with the embeddings (tied_heads.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from bam_merge import expressions
from bam_merge.address import is_address
from bam_merge.architectures.cost import Cost
from bam_merge.architectures.tables import Architecture
from bam_merge.calibrating.corpus import Calibration
from bam_merge.checkpoints.afar import HELD, IN_FLIGHT
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.folder import Checkpoint, Remote
from bam_merge.checkpoints.pieces import Computed
from bam_merge.checkpoints.reading import COPY_BUFFER
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.dense import DenseModel
from bam_merge.sources.tokenizers.alignment import Alignment

NEW = expressions.Init | expressions.Calibrated
"""What makes a tensor that no source has."""


CHUNK_ELEMENTS = 2**17
"""Elements of one operand that a worker holds at a time: few enough for a processor's cache, which halves the time of 2**20."""


BASE_MEMORY = 270_000_000
"""Resident bytes of the process with torch imported, before any tensor (measured, Linux x86-64, torch 2.13 CPU)."""


TOKENIZER_MEMORY = 15
"""Resident bytes that are left of comparing tokenizers, for each byte of the files that the output takes (measured: 10 to 14)."""


BESIDE = "beside"
"""The role of a tensor that is no part of the text model: of a wrapper's tower, copied as it is."""


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor. `offset` counts bytes from the start of `file`, which holds it in `nbytes` bytes."""

    name: str
    role: str
    layer: int | None
    expert: int | None
    dtype: str
    shape: tuple[int, ...]
    expr: expressions.Expr
    by: str
    file: str = ""
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def experts(self) -> "tuple[tuple[int | None, expressions.Expr], ...]":
        """What it holds: each expert's tensor by its number where it holds all of them, else the one that it is."""
        if isinstance(self.expr, expressions.Concat) and self.expr.stacked:
            return tuple(enumerate(self.expr.parts))
        return ((self.expert, self.expr),)

    @property
    def is_experts(self) -> bool:
        """Whether it holds one expert, or all of them."""
        return self.experts[0][0] is not None

    @property
    def reads(self) -> list[dict[str, str]]:
        """The stored tensors that it is made of, in order of appearance, as plans and manifests list them."""
        return [{"source": read.source, "tensor": read.tensor} for read in expressions.reads(self.expr)]

    @property
    def expression(self) -> str:
        """How the tensor is made, as plans and manifests show it."""
        cast = f" as {self.dtype}" if self.expr.dtype != self.dtype and not isinstance(self.expr, NEW) else ""
        return str(self.expr).removesuffix(f": {self.name}") + cast


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, its header (with the 8 length bytes) and its total size in bytes."""

    file: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine does with a result: a recipe's `word` for it, its name, whether it `serves` it, `how` that is known ("tried" with
    merges of this family, "expected", "as its sources", "not") with words on it, and the `reasons` why it does not."""

    word: str
    name: str
    serves: bool
    how: str
    about: str = ""
    reasons: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The engine as people are told."""
        return f"{self.name} (GGUF)" if self.word == "gguf" else self.name

    def document(self) -> dict[str, Any]:
        return {"engine": self.name, "serves": self.serves, "how": self.how, "about": self.about, "reasons": list(self.reasons)}


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do. `unused` maps each source to its tensors that are not read, with the reason; `cost` is the result's;
    `accepted` are warnings, one for each difference between the sources that the recipe accepts.

    `calibration` has the texts of the routers that are made of some.

    `files` says which source gives each tokenizer and generation file, `alignment` which of its rows belong to which token, where sources
    were aligned. `engines` are those that know the layout, each with why it does not compute the result as transformers does; `serves` is
    the same of every engine that a recipe can ask for, with how it is known.
    """

    recipe: Recipe
    layout: Architecture
    models: Mapping[str, DenseModel]
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    unused: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]
    cost: Cost
    fingerprint: str
    files: Mapping[str, str]
    alignment: Alignment | None
    accepted: tuple[str, ...] = ()
    calibration: Calibration | None = None
    engines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    serves: tuple[Served, ...] = ()

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Every folder that is read, by the name that expressions call it: the sources', their bases', their adapters'."""
        return {name: checkpoint for model in self.models.values() for name, checkpoint in model.stores.items()}

    def companions(self, store: str) -> list[str]:
        """The tokenizer and generation files of a folder, and what else the output takes of it, in a fixed order."""
        taken = [file for file, name in self.files.items() if self.models[name].store_name == store]
        return list(dict.fromkeys((*self.checkpoints[store].companions(), *taken)))

    @property
    def remotes(self) -> dict[str, Remote]:
        """The folders of which headers alone are at hand, by name: a merge downloads them and plans again."""
        return {name: checkpoint.remote for name, checkpoint in self.checkpoints.items() if checkpoint.remote is not None}

    @property
    def parameters(self) -> int:
        return sum(prod(step.shape) for step in self.steps)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token's forward multiplies with: all shared ones, and the chosen share of each expert axis."""
        active = self.cost.active
        assert active is not None, "a plan decides the routing"
        return active

    @property
    def bytes_written(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes that the merge reads from the sources, each operand once (methods that survey a tensor first read it again)."""
        return sum(expressions.bytes_read(step.expr) for step in self.steps)

    def peak_memory(self, workers: int = 2) -> int:
        """Estimated peak resident bytes: the interpreter with torch, what compared tokenizers leave, and each worker's chunk of every
        operand and of the result, with what a computed operand is made of."""
        chunks, held = CHUNK_ELEMENTS * 16, 0
        for step in self.steps:
            held = max(held, sum(_held(node) for node in expressions.computed(step.expr)))
            merges = [part for part in expressions.parts(step.expr) if isinstance(part, expressions.Merge)]
            for merge in merges:
                operands = len(merge.operands) + (merge.base is not None)
                row = merge.shape[-1] if merge.method.about.by_rows and merge.shape else 0
                size = max(CHUNK_ELEMENTS, chunk_elements(step.expr, CHUNK_ELEMENTS), row)
                chunks = max(chunks, size * (merge.method.about.operand_bytes * operands + 16))
                held = max(held, merge.method.held(merge.shape))
        merging = workers * (COPY_BUFFER + chunks + held)
        merging += self.reading_afar(workers)
        known = BASE_MEMORY + TOKENIZER_MEMORY * self._companion_bytes()
        return known + max(merging, 0 if self.calibration is None else self.calibration.memory)

    def reading_afar(self, workers: int) -> int:
        """Bytes of blocks that workers hold of files that are read where they are; 0 where there are none of these."""
        checkpoints = self.checkpoints.values()
        ranged = any(of.afar is not None or (of.remote is not None and of.remote.ranged) for of in checkpoints)
        return workers * (HELD + IN_FLIGHT) if ranged else 0

    def _companion_bytes(self) -> int:
        """Bytes of the tokenizer and generation files that the output takes; 0 of those that are still to be downloaded."""
        files = (self.models[source].checkpoint.path / name for name, source in self.files.items())
        return sum(file.stat().st_size for file in files if file.is_file())

    def document(self, workers: int = 2) -> dict[str, Any]:
        """The plan as `plan --json` prints it."""
        return {
            "method": self.recipe.method,
            "layout": self.layout.name,
            "parameters": {"total": self.parameters, "active": self.active_parameters},
            "bytes": {"read": self.bytes_read, "write": self.bytes_written},
            "peak_memory": self.peak_memory(workers),
            "shards": [{"file": shard.file, "bytes": shard.nbytes} for shard in self.shards],
            "tensors": [
                {
                    "name": step.name, "role": step.role, "layer": step.layer, "expert": step.expert, "dtype": step.dtype,
                    "shape": list(step.shape), "expression": step.expression,
                    "reads": step.reads,
                }
                for step in self.steps
            ],
            "config": dict(self.config),
            "unused": {name: dict(tensors) for name, tensors in self.unused.items() if tensors},
            "serves": {item.word: item.document() for item in self.serves},
            "notes": list(self.notes),
            "accepted": list(self.accepted),
            **({} if self.alignment is None else {"tokenizer": self.alignment.document()}),
            **({} if self.calibration is None else {"calibration": self._calibrated(self.calibration)}),
            **self._hub(),
        }  # fmt: skip

    def _calibrated(self, found: Calibration) -> dict[str, Any]:
        """The texts, and what the pass over them takes."""
        return {"tokens": found.tokens, "flops": found.flops, "seconds": float(f"{found.seconds:.2g}"), "texts": found.document()}

    def _hub(self) -> dict[str, Any]:
        """Of each folder that is a model of the hub its name with the commit, and the bytes of it that are yet to be downloaded."""
        places = {name: self.recipe.known.get(store.path) for name, store in self.recipe.stores.items()}
        remotes = self.remotes
        found = {
            name: {"model": place.recorded, "download": remotes[name].missing if name in remotes else 0}
            for name, place in places.items()
            if place is not None and not is_address(place.recorded)
        }
        return {**({"hub": found} if found else {}), **({"elsewhere": self.elsewhere} if self.elsewhere else {})}

    @property
    def elsewhere(self) -> dict[str, dict[str, Any]]:
        """Of each folder elsewhere its address, and the bytes of its weights."""
        places = {name: self.recipe.known.get(store.path) for name, store in self.recipe.stores.items()}
        return {
            name: {"address": place.recorded, "bytes": sum(header.identity.size for header in self.checkpoints[name].files.values())}
            for name, place in places.items()
            if place is not None and is_address(place.recorded)
        }


def _held(node: Computed) -> int:
    """Bytes that a worker holds at most while it makes a chunk's rows of a computed tensor."""
    rows = max(1, CHUNK_ELEMENTS // max(1, prod(node.shape[1:])))
    return node.formula.held([part.shape for part in node.inputs], min(rows, node.shape[0]))


def chunk_elements(expr: expressions.Expr, most: int) -> int:
    """Elements that are made at a time, about `most`: whole rows, where a computed tensor is made by rows, or a method works by them."""
    row = prod(expr.shape[1:])
    by_rows = any(isinstance(part, expressions.Merge) and part.method.about.by_rows for part in expressions.parts(expr))
    if not (by_rows or next(expressions.computed(expr), None) is not None) or not row:
        return most
    return max(1, most // row) * row


def moves_bytes(step: Step) -> bool:
    """Whether the step copies what is stored, and computes nothing."""
    return expressions.is_copy(step.expr) and all(leaf.dtype == step.dtype for leaf in expressions.leaves(step.expr))
