"""A base with adapters as one dense source: every tensor that an adapter changes is computed, the others are the base's own.

What is done equals PEFT's merge_and_unload, of float32 weights and with one rounding; what it asks and is not done here is refused by
name. Two questions are asked and must have one answer: which modules adapter_config.json names, and of which the file has tensors.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from bam_merge.architectures.locate import Cell
from bam_merge.checkpoints.adapter_folder import AdapterFolder
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES
from bam_merge.checkpoints.pieces import Computed, Read, Shape, Whole, instead, whole
from bam_merge.errors import CheckpointError
from bam_merge.formulas import Dora, LowRank, Saved, Shifted, TokenRows
from bam_merge.records import Formula
from bam_merge.sources.adapter_config import AdapterConfig, read_adapter_config
from bam_merge.sources.adapter_tensors import PREFIXES, Module, Parts, modules_of, parts_of
from bam_merge.sources.dense import Adapter, DenseModel, Site
from bam_merge.text import printable, some

QUANTISED = re.compile(r"bnb|4-?bit|8-?bit|int[48]|nf4|gptq|awq|qlora", re.IGNORECASE)
"""What the name of a quantised base has in it."""


@dataclass(frozen=True)
class Opened:
    """One adapter: what plans call it, its folder, and what its updates are multiplied with."""

    store: str
    folder: AdapterFolder
    weight: float = 1.0


@dataclass
class _Changes:
    """What adapters do to one tensor of the base, in the order in which it is done."""

    saved: Read | None = None
    updates: list[tuple[str, float, bool, Read, Read]] = field(default_factory=list)
    dora: tuple[Formula, tuple[Read, ...]] | None = None
    last: list[tuple[Formula, Read]] = field(default_factory=list)


def with_adapters(name: str, base: DenseModel, adapters: list[Opened]) -> DenseModel:
    """`base` as source `name`, with the adapters' updates. Raises CheckpointError with every problem of all of them."""
    work = _Adapting(name, base, modules_of(base))
    for adapter in adapters:
        work.apply(adapter)
    if len(adapters) > 1:
        work.refuse_what_cannot_be_added()
    if work.problems:
        raise CheckpointError(*dict.fromkeys(work.problems))
    return work.result()


@dataclass
class _Adapting:
    """Collects what every adapter does to the base, and what is wrong with it."""

    name: str
    base: DenseModel
    modules: dict[str, Module]
    changes: dict[Cell, _Changes] = field(default_factory=dict)
    own_head: bool = False
    opened: list[Adapter] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def tied(self) -> bool:
        return bool(self.base.facts["tie_word_embeddings"])

    def apply(self, adapter: Opened) -> None:
        """Everything that one adapter does."""
        found: list[str] = []
        config = read_adapter_config(adapter.folder.config, found)
        parts, unknown, prefix = parts_of(adapter.folder.tensors, self.modules)
        one = _One(self, adapter, config or AdapterConfig(), parts)
        if config is not None:
            one.settle()
            found += one.problems
            if unknown:
                found.append(
                    f"{some(unknown)}: {len(unknown)} tensor(s) that are of no module of {self.base.family.name}. Nothing is dropped "
                    "silently: is it an adapter on this base?"
                )
            self.notes += list(_notes(config, adapter, self.base, prefix, one))
        where = f"sources.{adapter.store}: {printable(str(adapter.folder.path))}"
        self.problems += [f"{where}: {problem}" for problem in found]
        self.opened.append(Adapter(adapter.store, adapter.folder, adapter.weight, one.dropped))

    def refuse_what_cannot_be_added(self) -> None:
        """Of several adapters only updates can be added up."""
        for cell, changes in self.changes.items():
            if changes.saved or changes.dora or changes.last:
                what = "DoRA's lengths" if changes.dora else "a tensor that was trained whole"
                self.problems.append(
                    f"sources.{self.name}.adapter: {cell.names[0]} is changed by {what}, which cannot be added to other adapters' updates. "
                    "Name one adapter, or make the first merge a folder of its own (method: merge) and name that as the base."
                )
                return

    def cell(self, module: Module, part: str) -> Cell | None:
        """The base's tensor that a module's weight or bias is: of a tied head the embeddings."""
        if module.head and part == "weight" and not module.cells and not self.own_head:
            module = next(module for module in self.modules.values() if module.embedding)
        return module.cells.get(part)

    def current(self, cell: Cell) -> Whole:
        """The base's tensor as it is."""
        site = (cell.row.roles[0], cell.layer)
        return whole(self.base.tensors[site if site in self.base.tensors else ("embed", None)])  # type: ignore[arg-type]

    def of(self, cell: Cell) -> _Changes:
        return self.changes.setdefault(cell, _Changes())

    def result(self) -> DenseModel:
        """The base with every changed tensor in the place of its own."""
        tensors, facts = dict(self.base.tensors), dict(self.base.facts)
        if self.own_head:
            embed = next(module for module in self.modules.values() if module.embedding)
            facts |= {"tie_word_embeddings": False, "untied": True}
            tensors["head", None] = self.base.tensors["embed", None]
            assert embed.cells
        for cell, changes in self.changes.items():
            sites: list[Site] = [(role, cell.layer) for role in cell.row.roles]
            made = self._made(whole(tensors[sites[0]]), changes)  # type: ignore[arg-type]
            tensors |= {site: instead(tensors[site], made) for site in sites}  # type: ignore[arg-type]
        adapters = (*self.base.adapters, *self.opened)
        return replace(
            self.base, name=self.name, tensors=tensors, facts=facts, store=self.base.store_name, adapters=adapters,
            notes=(*self.base.notes, *self.notes),
        )  # fmt: skip

    def _made(self, before: Whole, changes: _Changes) -> Whole:
        dtype, shape, tensor = before.dtype, before.shape, before.tensor

        def computed(formula: Formula, *inputs: Whole) -> Computed:
            return Computed(self.name, tensor, formula, inputs, dtype, shape)

        now = before
        if changes.saved is not None:
            now = changes.saved if changes.saved.dtype == dtype else computed(Saved(), changes.saved)
        if changes.updates:
            labels, scales, turned, _, _ = zip(*changes.updates, strict=True)
            factors = (factor for _, _, _, a, b in changes.updates for factor in (a, b))
            now = computed(LowRank(tuple(dict.fromkeys(labels)), scales, turned if any(turned) else ()), now, *factors)
        if changes.dora is not None:
            now = computed(changes.dora[0], now, *changes.dora[1])
        for formula, factor in changes.last:
            now = computed(formula, now, factor)
        return now


@dataclass
class _One:
    """One adapter held against the base: what it does, and what is wrong with it."""

    work: _Adapting
    adapter: Opened
    config: AdapterConfig
    parts: Parts
    problems: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    reaches_both: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Every module that the configuration names has its tensors, and every tensor is of such a module."""
        config, modules = self.config, self.work.modules
        targets = [module for module in modules.values() if any(config.targets(name, module.linear, module.head) for name in module.names)]
        saved = [module for module in modules.values() if any(map(config.saves, module.names))]
        ends = [module for module in modules.values() if module.embedding or module.head]
        if self.work.tied and config.ensure_weight_tying and any(module in ends for module in (*targets, *saved)):
            self.problems.append(
                "ensure_weight_tying with tied embeddings that are trained: PEFT adds such an update to them twice. Merge it with PEFT "
                "(merge_and_unload, save_pretrained), look at what it gives, and write that folder as a plain source."
            )
            return
        if not targets and not saved and not config.trainable_token_indices:
            self.problems.append(f"target_modules names no module of {self.work.base.family.name}. Is it an adapter on this base?")
        if self.work.tied and any(module.head or module.embedding for module in saved):
            self.work.own_head = True
            head = next(module for module in modules.values() if module.head)
            cell = next(cell for cell in _head_cells(self.work.base))
            modules[head.name] = replace(head, cells={"weight": cell})
        for module in [modules[module.name] for module in saved]:
            for part, cell in module.cells.items():
                self._replace(module, part, part, cell, "modules_to_save")
        targets = [modules[module.name] for module in targets]
        lacking = [module for module in targets if not self._update(module)]
        if lacking:
            names = [module.name for module in lacking]
            self.problems.append(
                f"{some(names)}: {len(names)} module(s) that target_modules names, and no tensors of an update. Is the file complete?"
            )
        self._biases(targets)
        for module in ends:
            self._tokens(modules[module.name])
        for parts in self.parts.values():
            if "velora" in parts:
                self.dropped[parts["velora"]] = "VeLoRA's: how gradients were stored while it was trained"
        self._left_over()

    def read(self, name: str) -> Read:
        entry = self.adapter.folder.tensors[name]
        self.used.add(name)
        if entry.dtype not in ARITHMETIC_DTYPES:
            self.problems.append(f"{printable(name)} is {entry.dtype}, and updates are computed from {', '.join(ARITHMETIC_DTYPES)} only.")
        return Read(self.adapter.store, name, entry.dtype, entry.shape)

    def _shape(self, read: Read, expected: Shape, why: str) -> bool:
        if read.shape == expected:
            return True
        grown = ""
        if len(read.shape) == 2 and any(token in read.tensor for token in ("embed", "lm_head")):
            grown = (
                " If tokens were added before the training: embeddings are never cut or extended here, so resize the base in the same way "
                "(resize_token_embeddings, save_pretrained), and name that as the base."
            )
        self.problems.append(f"{printable(read.tensor)} is {list(read.shape)}, expected {list(expected)} ({why}).{grown}")
        return False

    # ---- updates -----------------------------------------------------------------------------------------------------------

    def _update(self, module: Module) -> bool:
        """A module's low-rank update; whether there is one."""
        parts, cell = self.parts.get(module.name, {}), self.work.cell(module, "weight")
        kinds = ("embedding A", "embedding B") if module.embedding else ("A", "B")
        if cell is None or not set(kinds) <= parts.keys():
            return False
        base, (a, b) = self.work.current(cell), (self.read(parts[kind]) for kind in kinds)
        rank = self.config.rank(*module.names)
        rows, columns = base.shape if not module.embedding else base.shape[::-1]
        right = self._shape(a, (rank, columns), "rank, columns of the weight") and self._shape(b, (rows, rank), "rows of the weight, rank")
        if base.dtype not in ARITHMETIC_DTYPES:
            self.problems.append(f"{base.tensor} of the base is {base.dtype}, which nothing is added to. Take the 16-bit original.")
        if not right:
            return True
        if "base weight" in parts:
            self._base_layer(module, parts["base weight"], cell)
        if self.work.tied and not self.work.own_head and (module.embedding or module.head):
            self.reaches_both.append(module.name)
        scale, changes = self.config.scale(*module.names) * self.adapter.weight, self.work.of(cell)
        if self.config.use_dora:
            self._dora(module, changes, scale, a, b, rows)
        else:
            changes.updates.append((self.adapter.store, scale, module.embedding, a, b))
        if self.config.lora_bias:
            self._shift(module, scale)
        return True

    def _dora(self, module: Module, changes: _Changes, scale: float, a: Read, b: Read, rows: int) -> None:
        if module.embedding:
            self.problems.append(
                f"use_dora of {module.name}: DoRA of embeddings divides by the lengths of whole columns, which is not done by rows. Merge "
                "it with PEFT first (merge_and_unload, save_pretrained)."
            )
            return
        name = self.parts[module.name].get("magnitude")
        if name is None:
            self.problems.append(f"{module.name}: use_dora is set, and lora_magnitude_vector is missing. Is the file complete?")
        elif self.adapter.weight != 1:
            self.problems.append(f"weight {self.adapter.weight:g}: DoRA scales whole rows, so that there is no part of it. Use weight 1.")
        elif self._shape(m := self.read(name), (rows,), "rows of the weight"):
            changes.dora = Dora(self.adapter.store, scale), (a, b, m)

    def _shift(self, module: Module, scale: float) -> None:
        name, cell = self.parts[module.name].get("B.bias"), module.cells.get("bias")
        if name is None:
            self.problems.append(f"{module.name}: lora_bias is set, and lora_B.bias is missing. Is the file complete?")
        elif cell is None:
            self.problems.append(
                f"{module.name}: lora_bias is set, and the base has no bias there that it could be added to: no weights are equal to it."
            )
        elif self._shape(shift := self.read(name), self.work.current(cell).shape, "as the base's bias"):
            self.work.of(cell).last.append((Shifted(self.adapter.store, scale), shift))

    # ---- what was trained whole ----------------------------------------------------------------------------------------------

    def _replace(self, module: Module, kind: str, part: str, cell: Cell, why: str) -> None:
        """The adapter's tensor in the place of the base's."""
        name = self.parts.get(module.name, {}).get(kind)
        if name is None:
            self.problems.append(f"{module.name}.{part} is missing, which {why} says was saved. Is the file complete?")
            return
        if self._shape(saved := self.read(name), self.work.current(cell).shape, "as the base's"):
            self.work.of(cell).saved = saved
        if self.adapter.weight != 1:
            self.problems.append(f"weight {self.adapter.weight:g}: {printable(name)} was trained whole, so there is no part of it.")

    def _base_layer(self, module: Module, name: str, cell: Cell) -> None:
        """Embeddings that PEFT saves beside their update, and loads in the place of the base's."""
        changes = self.work.of(cell)
        if changes.saved is not None:
            self.used.add(name)
            self.dropped[name] = "the embeddings once more: head and embeddings are tied"
        elif self._shape(saved := self.read(name), self.work.current(cell).shape, "as the base's"):
            changes.saved = saved

    def _biases(self, targets: list[Module]) -> None:
        """Biases that were trained: of all modules, or of those with an update."""
        if self.config.bias == "none":
            return
        of = targets if self.config.bias == "lora_only" else list(self.work.modules.values())
        for module in of:
            if "bias" in module.cells and not any(map(self.config.saves, module.names)):
                kind = "base bias" if "base bias" in self.parts.get(module.name, {}) else "bias"
                if self.config.bias == "all" and kind not in self.parts.get(module.name, {}) and not module.linear:
                    continue  # a norm's
                self._replace(module, kind, "bias", module.cells["bias"], f"bias: {self.config.bias}")

    def _tokens(self, module: Module) -> None:
        """Rows of the embeddings, or of the head, that were trained alone."""
        name = self.parts.get(module.name, {}).get("tokens")
        rows = next((rows for name in module.names if (rows := self.config.tokens(name, module.embedding)) is not None), None)
        cell = self.work.cell(module, "weight")
        if rows is None or cell is None or (module.head and not module.cells and name is None):
            return
        if name is None:
            self.problems.append(f"{module.name}: trainable_token_indices names {len(rows)} tokens, and their rows are missing.")
            return
        vocabulary, columns = self.work.current(cell).shape
        if len(set(rows)) < len(rows) or max(rows) >= vocabulary:
            self.problems.append(
                f"trainable_token_indices: {len(rows)} ids up to {max(rows)}, of which each may stand once and be below {vocabulary}."
            )
        elif self.adapter.weight != 1:
            self.problems.append(f"weight {self.adapter.weight:g}: {printable(name)} are rows trained whole, so there is no part of them.")
        elif self._shape(trained := self.read(name), (len(rows), columns), "tokens, columns"):
            self.work.of(cell).last.append((TokenRows(self.adapter.store, tuple(rows)), trained))

    def _left_over(self) -> None:
        """Tensors of modules that the configuration does not name."""
        left = [name for parts in self.parts.values() for name in parts.values() if name not in self.used | self.dropped.keys()]
        if left and not self.problems:
            self.problems.append(
                f"{some(left)}: {len(left)} tensor(s) of what adapter_config.json does not name. Nothing is dropped silently: correct "
                "target_modules, modules_to_save or bias, or remove them."
            )


def _head_cells(base: DenseModel) -> Iterator[Cell]:
    """The head's cell, which a tied base has not."""
    return (Cell(row) for row in base.family.rows if row.roles == ("head",))


# ---- what the plan says ------------------------------------------------------------------------------------------------------


def _notes(config: AdapterConfig, adapter: Opened, base: DenseModel, prefix: tuple[str, str], one: _One) -> Iterator[str]:
    named, folder = config.base_model_name_or_path or "", base.checkpoint.path.name
    if named and named.rstrip("/").rpartition("/")[2] != folder:
        yield f"adapter_config.json names the base {printable(named)}, here it is {printable(folder)}: see that they are the same weights."
    if QUANTISED.search(named):
        yield (
            "trained on a quantised base, it seems, and added to the 16-bit one: what it computes differs from what was trained by the "
            "quantisation's error."
        )
    if config.fan_in_fan_out:
        yield "fan_in_fan_out is ignored, as in PEFT: no module of the base stores its weight turned."
    if prefix != PREFIXES[0]:
        named = f"{printable(prefix[0])}NAME" if prefix[0] else "NAME"
        yield f"tensors are named {named}, where PEFT writes {PREFIXES[0][0]}{prefix[1]}NAME: taken for these."
    if one.reaches_both:
        yield (
            f"{some(one.reaches_both)}: head and embeddings are tied, so the update reaches both, as in PEFT's merge_and_unload; while "
            "it was trained it was in one of them."
        )
