"""A dense checkpoint read through its family's table: what it computes (facts) and where each role's tensor is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bam_merge.architectures.config import COMMON_FUNCTION, IGNORED, NEUTRAL, ROPE_KEYS, describe, is_quantised
from bam_merge.architectures.layer_sizes import BY_LAYER, under_own_keys
from bam_merge.architectures.locate import Cell, applies, cells, cut, gathered, locate, of_its_kind, piece_shape, shape_of
from bam_merge.architectures.naming import Naming, adapter_problem, find_naming, ties_of
from bam_merge.architectures.opening import open_folder
from bam_merge.architectures.quantisation import quantised_refusal
from bam_merge.architectures.spellings import conflicts, settled_keys
from bam_merge.architectures.tables import Architecture, at_layer, dense_families, find_by_model_type, why_left_out
from bam_merge.architectures.wrappers import Wrapper, beside_text, unwrap, wrapper_note
from bam_merge.checkpoints.adapter_folder import AdapterFolder
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.kinds import staged
from bam_merge.checkpoints.pieces import Read
from bam_merge.errors import CheckpointError
from bam_merge.expressions import Concat, Expr
from bam_merge.sources.harmless import is_harmless, refusals
from bam_merge.text import printable, some

Site = tuple[str, int | None]
"""A role, and its layer where it has one: a place of a dense model, before a recipe decides whether experts share it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter of a source: what plans call its folder, what its updates are multiplied with, and which of its tensors are known and
    not used, with the reason."""

    store: str
    folder: AdapterFolder
    weight: float
    dropped: Mapping[str, str]


@dataclass(frozen=True)
class DenseModel:
    """One source. `config` is that of its text model, in the family's own keys; `facts` what it says, in one vocabulary for all families;
    `tensors` says where each role is.

    `dropped` names the tensors that are known and not used, with the reason; `unknown_keys` the config keys that no table knows;
    `copies` the heads that are stored although the configuration ties them; `naming` says what its tensors are called in the files,
    `notes` what is unlike a plain folder of the family, and `warnings` what the recipe accepts of it.
    One with `adapters` is a base with these; `checkpoint`, `config` and the rest are the base's, which plans call `store`. Of one that is
    an `expert` of a mixture, by its number, `checkpoint` is the mixture, and `config` is written for it.
    """

    name: str
    checkpoint: Checkpoint
    family: Architecture
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    tensors: Mapping[Site, Expr]
    dropped: Mapping[str, str]
    unknown_keys: Mapping[str, Any]
    store: str = ""
    adapters: tuple[Adapter, ...] = ()
    copies: tuple[str, ...] = ()
    naming: Naming = field(default_factory=lambda: Naming({}))
    wrapper: Wrapper | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    expert: int | None = None

    @property
    def store_name(self) -> str:
        """What plans call the folder of `checkpoint`."""
        return self.store or self.name

    @property
    def stores(self) -> dict[str, Checkpoint]:
        """Every folder that its tensors are read from, by the name that plans call it."""
        return {self.store_name: self.checkpoint, **{adapter.store: adapter.folder for adapter in self.adapters}}

    @property
    def unread(self) -> dict[str, Mapping[str, str]]:
        """The tensors of each of these folders that are known and not used, with the reason."""
        return {self.store_name: self.dropped, **{adapter.store: adapter.dropped for adapter in self.adapters}}


def read_dense(name: str, path: Path, checkpoint: Checkpoint | None = None) -> DenseModel:
    """Open the source called `name` at `path`, unless it is open already. Raises CheckpointError with all its problems, each prefixed with
    its name."""
    if unfinished := staged(path):
        raise CheckpointError(f"sources.{name}: {printable(str(path), 1000)}: this is {unfinished}.")
    try:
        checkpoint = checkpoint or open_folder(path)
    except CheckpointError as error:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in error.problems)) from None
    unwrapped = unwrap(checkpoint.config)
    if unwrapped.problems:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in unwrapped.problems))
    family = find_by_model_type(unwrapped.config.get("model_type"))
    if family is None or family.kind != "dense":
        known = ", ".join(a.name for a in dense_families())
        found = checkpoint.config.get("model_type")
        what = "a mixture already" if family else f"not a dense family known here{why_left_out(found)}"
        out = f"Known dense families: {known}."
        if family is not None and family.kind == "mixture":
            out = "One of its experts can be a source: write #experts.0, or another number, behind its place."
        raise CheckpointError(f"sources.{name}: model_type {printable(repr(found))} is {what}. {out}")
    problems: list[str] = []
    quantised = is_quantised(checkpoint.config) or is_quantised(unwrapped.config)
    if quantised:
        stated = checkpoint.config if is_quantised(checkpoint.config) else unwrapped.config
        problems.append(quantised_refusal(name, replace(checkpoint, config=dict(stated))))
    naming = find_naming(checkpoint.tensors, family, unwrapped.wrapper)
    config = {**unwrapped.config, **ties_of(unwrapped, family, naming)}
    facts = describe(family, config, problems)
    if BY_LAYER in config and facts and family.sizes:  # of other families it is refused, as what transformers then computes
        config = under_own_keys(family, config, facts)
        facts = describe(family, config, problems)
    problems += refusals(config)
    problems += conflicts(family, config)
    tensors = _Tensors(name, family, facts, checkpoint, naming, problems)
    if facts and not quantised:  # whose tensors are others
        tensors.settle()
    if problems:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in problems))
    known_keys = {
        *COMMON_FUNCTION,
        *ROPE_KEYS,
        *NEUTRAL,
        *IGNORED,
        *family.function,
        *family.neutral,
        *family.quirks.only,
        *settled_keys(family),
    }
    unknown = {k: v for k, v in config.items() if k not in known_keys and not k.startswith("_") and not is_harmless(k, v)}
    notes = [naming.note] if naming.note else []
    dropped = tensors.dropped
    if unwrapped.wrapper is not None:
        notes.append(wrapper_note(unwrapped.wrapper, naming.beside))
        dropped = {**dropped, **{tensor: beside_text(unwrapped.wrapper, what) for tensor, what in naming.beside.items()}}
    return DenseModel(
        name, checkpoint, family, config, facts, tensors.taken, dropped, unknown, copies=tuple(tensors.copies), naming=naming,
        wrapper=unwrapped.wrapper, notes=tuple(notes),
    )  # fmt: skip


# ---- the tensors ---------------------------------------------------------------------------------------------------------


@dataclass
class _Tensors:
    """What a merge takes of a source, what it drops aloud, and what it refuses."""

    source: str
    family: Architecture
    facts: Mapping[str, Any]
    checkpoint: Checkpoint
    naming: Naming
    problems: list[str]
    taken: dict[Site, Expr] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Every cell of the family's table is taken, dropped with a reason, or a problem."""
        if self.naming.problem is not None:
            self.problems.append(self.naming.problem)
            return
        layers = self.facts["num_hidden_layers"]
        known = gathered(self.naming.names, self.family, layers, lambda layer: at_layer(self.facts, layer))
        stored = known.names
        found = locate(stored, cells(self.family, layers), lambda cell: applies(cell, self.facts))
        for cell, own, wanted in found.met:
            names = [stored[name] for name in own]
            if not cell.row.roles:
                self.dropped[names[0]] = "a buffer that loading recomputes"
            elif len(names) > 1:
                self.problems.append(f"{' and '.join(names)} are two spellings of one tensor. Keep one.")
            elif wanted and cell.row.pieces:
                self.join(cell, known.parts[names[0]])
            else:
                (self.take if wanted else self.refuse)(cell, names[0])
        if found.missing or known.lacking:
            self.report_missing(found.missing, known.lacking)
        extra = [*(stored[name] for name in found.extra), *self.naming.others]
        if extra:
            self.problems.append(
                adapter_problem(extra)
                or f"{some(extra)}: {len(extra)} tensor(s) that {self.family.name} with {layers} layers does not have. "
                "Nothing is dropped silently: remove them, or correct config.json."
            )

    def refuse(self, cell: Cell, name: str) -> None:
        if cell.row.roles == ("head",):
            self.copies.append(name)
            self.dropped[name] = "config.json ties the head to the embeddings"  # settle_copies sees whether this copy equals them
        else:
            when = cell.row.when
            if not of_its_kind(cell, self.facts):
                denied = f"{self.facts['layer_types'][cell.layer]} in layer {cell.layer}"
            else:
                assert when is not None  # what has no condition is wanted
                denied = f"{when.removeprefix('not ')}=true" if when.startswith("not ") else f"{when}=false"
            self.problems.append(
                f"{name} is present, but config.json has {denied}, so that transformers would ignore it. "
                "Correct config.json or remove the tensor."
            )

    def take(self, cell: Cell, name: str) -> None:
        facts = at_layer(self.facts, cell.layer)
        entry, shape = self.checkpoint.tensors[name], shape_of(cell.row, facts)
        if entry.shape != shape:
            sizes = ", ".join(cell.row.shape)
            self.problems.append(f"{name} is {printable(str(list(entry.shape)))}, config.json implies {list(shape)} ({sizes}).")
            return
        pieces = cut(cell.row, Read(self.source, name, entry.dtype, shape), facts)
        assert pieces is not None, f"{self.family.name}: the parts of {name} are not the rows of its shape"
        self.taken.update(((role, cell.layer), leaf) for role, leaf in pieces.items())

    def join(self, cell: Cell, names: Sequence[str]) -> None:
        """Take what several tensors hold of one role."""
        facts = at_layer(self.facts, cell.layer)
        entries, shape = [self.checkpoint.tensors[name] for name in names], piece_shape(cell.row, facts)
        odd = next((entry for entry in entries if entry.shape != shape or entry.dtype != entries[0].dtype), None)
        if odd is not None:
            self.problems.append(
                f"{odd.name} is {odd.dtype} {printable(str(list(odd.shape)))}, expected {entries[0].dtype} {list(shape)}: config.json "
                f"implies {len(names)} of that shape, which are of one dtype."
            )
            return
        reads = tuple(Read(self.source, entry.name, entry.dtype, shape) for entry in entries)
        self.taken[cell.row.roles[0], cell.layer] = Concat(reads, 1, reads[0].dtype, shape_of(cell.row, facts))

    def report_missing(self, missing: Sequence[Cell], lacking: Sequence[str]) -> None:
        headless = any(cell.row.roles == ("head",) for cell in missing)
        untied = " (config.json has tie_word_embeddings=false, so the head must be there)" if headless else ""
        names = [*(cell.names[0] for cell in missing), *lacking]
        self.problems.append(f"{some(names)} missing: {len(names)} tensor(s){untied}. Is the download complete?")
