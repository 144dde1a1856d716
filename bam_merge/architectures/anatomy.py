"""Any checkpoint through the tables: what every stored tensor is, in a dense family, a mixture layout or a public mixture.

Nothing here refuses: a damaged, incomplete or unknown model is described as far as it goes, and what is odd about it is a finding.
A name is a row's template with its numbers filled in, so each name is looked up, not searched for, and layers and experts are those
that are stored. Where a config.json is missing, the table that explains the most names is taken.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bam_merge.architectures.config import dense_layers, facts_of
from bam_merge.architectures.locate import (
    Cell,
    Place,
    Words,
    applies,
    gathered,
    in_order,
    joined,
    locate,
    parts_of,
    piece_shape,
    read_name,
    shape_of,
    spellings,
    words,
)
from bam_merge.architectures.naming import Naming, find_naming, ties_of
from bam_merge.architectures.opening import open_folder
from bam_merge.architectures.quantisation import OF_ATTENTION, PACKED, Quantisation, advice, is_packed, owners, quantisation
from bam_merge.architectures.tables import Architecture, Row, architectures, at_layer, find_by_model_type, why_left_out
from bam_merge.architectures.vocabulary import LINEAR
from bam_merge.architectures.wrappers import Wrapper, beside_text, unwrap, wrapper_note
from bam_merge.checkpoints.folder import Checkpoint, open_file
from bam_merge.checkpoints.pieces import Leaf, Read, stored
from bam_merge.paths import located
from bam_merge.text import count, human_bytes, printable, some

SCALE = "_scale_inv"
"""Ending of a block-quantised weight's scales (the float8 files of DeepSeek and Qwen): their role is the weight's with ".scale"."""


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint's tensors by role.

    `places` says where each explained tensor stands (the roles of a fused one joined by "+"), `leaves` what each role is read from: a whole
    tensor or rows of a fused one. A fused tensor that cannot be cut, because its sizes are unknown, stands under its joined roles.
    `dropped` are known and not part of the model, with the reason; `unknown` no row explains; `missing` ought to be there.
    `quantised` is what config.json says of quantised weights; `beside` then says of each tensor of their modules what it is: qweight,
    scales, ... `guessed`: the architecture was chosen by the names. `facts` is empty where config.json is of no use; `findings` says why.
    `config` is the text model's, of a wrapper (`wrapper`) too; names are those in the files.
    """

    checkpoint: Checkpoint
    architecture: Architecture | None
    guessed: bool
    facts: Mapping[str, Any]
    places: Mapping[str, Place]
    leaves: Mapping[Place, Leaf]
    dropped: Mapping[str, str]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    findings: tuple[str, ...]
    quantised: Quantisation | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    wrapper: Wrapper | None = None


def open_anatomy(path: str | os.PathLike[str], source: str = "model") -> Anatomy:
    """Open a folder or one safetensors file. Raises CheckpointError where the files themselves cannot be read."""
    place = located(path)
    alone = os.path.exists(place) and not os.path.isdir(place)
    return anatomy(open_file(place) if alone else open_folder(place), source)


def anatomy(checkpoint: Checkpoint, source: str = "model") -> Anatomy:
    """What each tensor of `checkpoint` is; leaves read from `source`."""
    findings = list(checkpoint.notes)
    facts: dict[str, Any] = {}
    inside = unwrap(checkpoint.config)
    config, naming = inside.config, Naming({})
    quantised = quantisation(checkpoint.config) or quantisation(config)
    if quantised:
        findings.append(
            f"config.json has a {quantised.key} ({quantised.words()}): values are those of the quantised weights as stored, parameters are "
            f"counted as of the model that it stands for. {advice(quantised)}"
        )
    if checkpoint.config_digest:
        architecture, guessed = find_by_model_type(config.get("model_type"), config), False
        names = checkpoint.tensors if quantised else _weights(checkpoint.tensors)
        naming = find_naming(names, architecture, inside.wrapper) if architecture else naming
        if architecture:
            config = {**config, **ties_of(inside, architecture, naming)}
            facts = facts_of(architecture, config, findings)
        elif inside.problems:
            findings += inside.problems
        else:
            stated = checkpoint.config.get("model_type")
            findings.append(f"config.json: model_type {printable(repr(stated), 60)} is in no table{why_left_out(stated)}.")
    else:
        architecture, guessed = _guess_renamed(checkpoint.tensors), True
        naming = find_naming(checkpoint.tensors, architecture) if architecture else naming
    findings += [text for text in (naming.problem, f"{naming.note}." if naming.note else None) if text]
    found = _Described(checkpoint, architecture, facts, source, findings, naming, config, quantised)
    found.run()
    dropped = found.dropped
    if inside.wrapper is not None and architecture is not None:
        findings.append(f"{wrapper_note(inside.wrapper, naming.beside)}{_beside(checkpoint, naming)}.")
        dropped |= {name: beside_text(inside.wrapper, what) for name, what in naming.beside.items()}
    return Anatomy(
        checkpoint, architecture, guessed, facts, found.places, found.leaves, dropped,
        tuple(found.unknown), tuple(found.missing), tuple(findings), quantised, found.beside, config, inside.wrapper,
    )  # fmt: skip


def _weights(names: Iterable[str]) -> dict[str, None]:
    """Names without the ending of scales: what they are the scales of."""
    return dict.fromkeys(name.removesuffix(SCALE) if name.endswith("weight" + SCALE) else name for name in names)


def _beside(checkpoint: Checkpoint, naming: Naming) -> str:
    """How much stands beside a text model."""
    entries = [checkpoint.tensors[name] for name in naming.beside]
    parameters, nbytes = sum(entry.numel for entry in entries), sum(entry.nbytes for entry in entries)
    return f" ({count(len(entries), 'tensor')}, {parameters:,} parameters, {human_bytes(nbytes)})" if entries else ""


def guess(names: Iterable[str]) -> Architecture | None:
    """The architecture whose table explains the most of `names`, of equals the one with the fewest rows to spare; None if none does."""
    return next(iter(alike(names)), None)


def _guess_renamed(names: Collection[str]) -> Architecture | None:
    """As `guess`, but of names that no table explains also those that have a prefix, or something inside."""
    plain = guess(names)
    known = spellings(plain) if plain else {}
    explained = sum(read_name(name, known) is not None for name in names)
    if explained == len(names):
        return plain
    found = ((table, find_naming(names, table)) for table in sorted(architectures(), key=lambda table: len(table.rows)))
    best, most = max(((table, len(naming.names)) for table, naming in found if naming.note), key=lambda pair: pair[1], default=(plain, 0))
    return best if most > explained else plain


def alike(names: Iterable[str]) -> list[Architecture]:
    """The architectures whose tables explain the most of `names`, all of one kind, those with fewer rows first."""
    stored = set(map(words, names))
    known = {table.name: spellings(table).keys() for table in architectures()}
    explained = {name: len(stored & of) for name, of in known.items()}
    most = max(explained.values())
    best = sorted((table for table in architectures() if most and explained[table.name] == most), key=lambda a: len(known[a.name]))
    return [table for table in best if table.kind == best[0].kind]


# ---- every stored tensor ---------------------------------------------------------------------------------------------------

NEEDED = (
    "norm.attn", "attn.q", "attn.k", "attn.v", "attn.o", "linear.q", "linear.o", "attn.kv_a", "attn.kv_b", "ffn.up", "ffn.down",
    "router.ffn",
)  # fmt: skip
"""Roles that every layer of a mixture has, where its table knows them; further ones if another layer has them."""


def of_this_kind(role: str, layer: int, facts: Mapping[str, Any]) -> bool:
    """Whether a layer is of the kind that has the role: attention or linear attention."""
    types = facts.get("layer_types")
    linear = isinstance(types, list) and layer < len(types) and types[layer] == LINEAR
    return not role.startswith("attn." if linear else "linear.")


@dataclass
class _Described:
    """Places every stored tensor, then looks for what is not there."""

    checkpoint: Checkpoint
    architecture: Architecture | None
    facts: Mapping[str, Any]
    source: str
    findings: list[str]
    naming: Naming
    config: Mapping[str, Any]
    quantised: Quantisation | None = None
    beside: dict[str, str] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    leaves: dict[Place, Leaf] = field(default_factory=dict)
    pieces: dict[Place, dict[int, Read]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def run(self) -> None:
        known = spellings(self.architecture) if self.architecture else {}
        for name in self.checkpoint.tensors:
            if name in self.naming.beside:
                continue
            (plain,) = [name] if self.quantised else _weights([name])
            cell = read_name(self.naming.own_name(plain), known)
            if self.quantised and (cell is None or self.is_weight(name)) and self.place_quantised(name, known):
                continue
            if cell is None:
                self.unknown.append(name)
            elif not cell.row.roles:
                self.dropped[name] = "a buffer that loading recomputes"
            elif cell.row.roles == ("head",) and self.facts and not self.facts["untied"]:
                self.dropped[name] = "config.json ties the head to the embeddings; this copy counts for nothing where it equals them"
            else:
                self.place(name, cell)
        self.leaves |= {place: joined(tuple(read for _, read in sorted(parts.items()))) for place, parts in self.pieces.items()}
        if self.architecture and self.facts:
            (self.compare if self.architecture.kind == "dense" else self.find_gaps)()
            self.report("missing: {} tensor(s). Is the download complete?", self.missing)
            last = self.facts["num_hidden_layers"]
            beyond = [name for name, (_, layer, _) in self.places.items() if layer is not None and layer >= last]
            self.report(f"of layers beyond the {last} of config.json: {{}} tensor(s).", beyond)

    def is_weight(self, name: str) -> bool:
        """Whether a tensor that is called as a weight holds several in one number."""
        assert self.quantised is not None
        return name.endswith(".weight") and is_packed(self.checkpoint.tensors[name], "weight", self.quantised)

    def place_quantised(self, name: str, known: Mapping[Words, list[tuple[Words, Row]]]) -> bool:
        """Place a tensor of a quantised module: at the weight's role what holds the weights, what stands beside it at a role of its own."""
        own = self.naming.own_name(name)
        for owner, what in (*owners(own), *((own, "weight") for _ in range(own.endswith(".weight")))):
            cell = read_name(owner, known)
            if cell is not None and cell.row.roles:
                self.beside[name] = what
                holds = what == "weight" or (what in (*PACKED, "blocks") and owner not in self.naming.names)
                self.place(name, cell, "" if holds else f".{what}")
                return True
        if name.rpartition(".")[2] in OF_ATTENTION:
            self.beside[name] = name.rpartition(".")[2]
            self.places[name] = f"attn.{self.beside[name]}", None, None
            return True
        return False

    def place(self, name: str, cell: Cell, scale: str = "") -> None:
        row, layer, expert = cell
        entry = self.checkpoint.tensors[name]
        read = Read(self.source, name, entry.dtype, entry.shape)
        scale = ".scale" if name.endswith("weight" + SCALE) and not self.quantised else scale
        all_roles = "+".join(role + scale for role in row.roles)
        self.places[name] = all_roles, layer, expert
        if row.pieces:
            start = next(len(words) for words in (whole.partition("{head}")[0] for whole in cell.names) if self.own(name).startswith(words))
            self.pieces.setdefault(self.places[name], {})[int(self.own(name)[start:].partition(".")[0])] = read
            return
        can_be_cut = not scale and (len(row.roles) == 1 or self.facts)
        found = parts_of(cell, read, at_layer(self.facts, layer)) if can_be_cut else None
        for (role, of), leaf in (found or {(all_roles, expert): read}).items():
            first = self.leaves.setdefault((role, layer, of), leaf)
            if first is not leaf:
                self.findings.append(f"{printable(stored(first).tensor)} and {printable(name)} are two spellings of one tensor.")

    def own(self, name: str) -> str:
        """The family's own name of a tensor."""
        return self.naming.own_name(name)

    def compare(self) -> None:
        """A dense model against all that its table and config.json imply: absent, present in vain, of another shape."""
        assert self.architecture is not None
        tensors, layers = self.checkpoint.tensors, self.facts["num_hidden_layers"]
        stored = {own: name for own, name in self.naming.names.items() if name in tensors}
        known = gathered(stored, self.architecture, layers, lambda layer: at_layer(self.facts, layer))
        self.missing += known.lacking
        if self.quantised:
            packed = (name for name, what in self.beside.items() if what in (*PACKED, "blocks"))
            held = {owner for name in packed for owner, _ in owners(self.naming.own_name(name))}
            whole = locate(known.names.keys() | held, in_order(self.architecture, layers), lambda cell: applies(cell, self.facts))
            self.missing += [cell.names[0] for cell in whole.missing]
            return
        found = locate(known.names, in_order(self.architecture, layers), lambda cell: applies(cell, self.facts))
        self.missing += [cell.names[0] for cell in found.missing]
        expected = {
            name: (piece_shape if cell.row.pieces else shape_of)(cell.row, at_layer(self.facts, cell.layer))
            for cell, names, wanted in found.met
            if wanted
            for first in map(known.names.get, names)
            if first
            for name in known.parts.get(first, (first,))
        }
        vain = [name for name, (_, layer, _) in self.places.items() if name not in expected and (layer or 0) < layers]
        self.report("present, though config.json does not imply it: {} tensor(s).", [name for name in vain if not name.endswith(SCALE)])
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                self.findings.append(f"{printable(name)} is {list(tensors[name].shape)}, config.json implies {list(shape)}.")

    def find_gaps(self) -> None:
        """What a mixture lacks: roles that each layer needs or that other layers have, and experts, all of which it has elsewhere."""
        assert self.architecture is not None
        layers, config = self.facts["num_hidden_layers"], self.config
        blank = dense_layers(config, layers)
        rows: dict[str, list[Row]] = {}
        for row in (*self.architecture.rows, *self.architecture.others):
            for role in row.roles:
                rows.setdefault(role, []).append(row)
        have: dict[str, dict[int | None, set[int | None]]] = {}
        for role, layer, expert in self.leaves:
            have.setdefault(role, {}).setdefault(layer, set()).add(expert)
        norms = self.facts.get("norm_weights", True)
        alone = ("embed", *(("norm.final",) if norms else ()), *(("head",) if self.facts["untied"] else ()))
        self.missing += [rows[role][0].name() for role in alone if role not in have]
        latent = "attn.kv_a" in rows
        wanted = [role for role in NEEDED if role in rows and not (latent and role == "attn.q")]
        inside = [role for role, at in have.items() if role in rows and any(layer is not None and layer < layers for layer in at)]
        wanted = [role for role in wanted if role != "norm.attn" or (norms and self.facts.get("pre_norms", True))]
        for role in dict.fromkeys((*wanted, *(["router.attn"] if self.facts.get("num_attention_experts") else []), *inside)):
            key = "num_experts" if role.startswith("ffn.") else "num_attention_experts"
            for layer in range(layers):
                if not of_this_kind(role, layer, self.facts):
                    continue
                dense = layer in blank and role.startswith(("ffn.", "router.ffn"))
                if role.startswith("attn.v") and self.facts.get("values_are_keys") and not self.slides(layer):
                    continue
                if dense and not any(not row.per_expert and row in self.architecture.others for row in rows[role]):
                    continue
                self.missing += self.absent(rows[role], layer, have.get(role, {}), 0 if dense else self.facts.get(key) or 0)
        self.missing = list(dict.fromkeys(self.missing))  # a tensor may hold several roles

    def slides(self, layer: int) -> bool:
        types = self.facts.get("layer_types")
        return isinstance(types, list) and layer < len(types) and types[layer] == "sliding_attention"

    def absent(self, rows: list[Row], layer: int, have: Mapping[int | None, set[int | None]], experts: int) -> Iterator[str]:
        """Names of what one role lacks in one layer, which holds `experts` of it unless it shares one."""
        assert self.architecture is not None
        found = have.get(layer, set())
        shared = next((row for row in rows if not row.per_expert), None)
        split = next((row for row in rows if row.per_expert), None)
        if None in found or (split is None and found):
            return
        never_shared = shared is None or shared in self.architecture.others
        if split and experts and (found or never_shared or not have or any(None not in other for other in have.values())):
            yield from dict.fromkeys(split.name(layer, expert) for expert in range(experts) if expert not in found)
        elif shared:
            yield shared.name(layer)

    def report(self, problem: str, names: list[str]) -> None:
        if names:
            self.findings.append(f"{some(names)} {problem.format(f'{len(names):,}')}")
