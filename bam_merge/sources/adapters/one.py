"""One adapter held against its base: which tensors its configuration names, which its file has, and what is done with each."""

from dataclasses import dataclass, field

from bam_merge.architectures.locate import Cell
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES
from bam_merge.checkpoints.pieces import Read, Shape
from bam_merge.formulas import Dora, Shifted, TokenRows
from bam_merge.sources.adapters.changes import Changes, Changing, Opened
from bam_merge.sources.adapters.config import AdapterConfig
from bam_merge.sources.adapters.tensors import Module, Parts, Prefix, trained_names
from bam_merge.text import printable, some


@dataclass
class OneAdapter:
    """One adapter held against the base: what it does, and what is wrong with it."""

    work: Changing
    adapter: Opened
    config: AdapterConfig
    parts: Parts
    prefix: Prefix
    problems: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    reaches_both: list[str] = field(default_factory=list)

    def settle(self) -> None:
        """Every module that the configuration names has its tensors, and every tensor is of such a module."""
        config, modules = self.config, self.work.modules
        targets = [m for m in modules.values() if any(config.targets(name, m.linear, m.head) for name in self.names(m))]
        saved = [module for module in modules.values() if any(map(config.saves, self.names(module)))]
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
            self.work.untie()
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
        for module in [modules[module.name] for module in ends]:
            if module not in targets and module.name not in {one.name for one in saved} and (end := self.work.cell(module, "weight")):
                for kind in [kind for kind in self.parts.get(module.name, {}) if kind in ("weight", "base weight")]:
                    self._base_layer(module, self.parts[module.name][kind], end)
        for module in ends:
            self._tokens(modules[module.name])
        for parts in self.parts.values():
            if "velora" in parts:
                self.dropped[parts["velora"]] = "VeLoRA's: how gradients were stored while it was trained"
        self._left_over()

    def names(self, module: Module) -> tuple[str, ...]:
        """What a module was called where the adapter was trained."""
        return trained_names(module, self.prefix)

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
        rank = self.config.rank(*self.names(module))
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
        scale, changes = self.config.scale(*self.names(module)) * self.adapter.weight, self.work.of(cell)
        if self.config.use_dora:
            self._dora(module, changes, scale, a, b, rows)
        else:
            changes.updates.append((self.adapter.store, scale, module.embedding, a, b))
        if self.config.lora_bias:
            self._shift(module, scale)
        return True

    def _dora(self, module: Module, changes: Changes, scale: float, a: Read, b: Read, rows: int) -> None:
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
            if "bias" in module.cells and not any(map(self.config.saves, self.names(module))):
                kind = "base bias" if "base bias" in self.parts.get(module.name, {}) else "bias"
                if self.config.bias == "all" and kind not in self.parts.get(module.name, {}) and not module.linear:
                    continue  # a norm's
                self._replace(module, kind, "bias", module.cells["bias"], f"bias: {self.config.bias}")

    def _tokens(self, module: Module) -> None:
        """Rows of the embeddings, or of the head, that were trained alone."""
        name = self.parts.get(module.name, {}).get("tokens")
        rows = next((rows for name in self.names(module) if (rows := self.config.tokens(name, module.embedding)) is not None), None)
        cell = self.work.cell(module, "weight")
        if rows is None or cell is None or (name is None and (not rows or (module.head and not module.cells))):
            return
        if name is None:
            self.problems.append(f"{module.name}: trainable_token_indices names {len(rows)} tokens, and their rows are missing.")
            return
        vocabulary, columns = self.work.current(cell).shape
        if len(set(rows)) < len(rows) or max(rows, default=0) >= vocabulary:
            self.problems.append(
                f"trainable_token_indices: {len(rows)} ids up to {max(rows)}, of which each may stand once and be below {vocabulary}."
            )
        elif self.adapter.weight != 1:
            self.problems.append(f"weight {self.adapter.weight:g}: {printable(name)} are rows trained whole, so there is no part of them.")
        elif self.work.of(cell).updates or self.work.of(cell).dora:
            self.problems.append(
                f"trainable_token_indices beside an update of {module.name}: which comes first decides what is computed. Merge it with "
                "PEFT (merge_and_unload, save_pretrained), and write that folder as a plain source."
            )
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
