"""A base with adapters as one dense source: every tensor that an adapter changes is computed, the others are the base's own.

What is done equals PEFT's merge_and_unload, of float32 weights and with one rounding; what it asks and is not done here is refused by
name. Two questions are asked and must have one answer: which modules adapter_config.json names, and of which the file has tensors.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from filecmp import cmp
from pathlib import Path

from bam_merge.architectures.wrappers import beside_text
from bam_merge.checkpoints.folder import VOCABULARIES
from bam_merge.checkpoints.pieces import Computed, Whole, instead, whole
from bam_merge.errors import CheckpointError
from bam_merge.formulas import LowRank, Saved
from bam_merge.records import Formula
from bam_merge.sources.adapters.changes import Changes, Changing, Opened
from bam_merge.sources.adapters.config import AdapterConfig, read_adapter_config
from bam_merge.sources.adapters.one import OneAdapter
from bam_merge.sources.adapters.tensors import PREFIXES, Prefix, beside_of, modules_of, parts_of
from bam_merge.sources.dense import Adapter, DenseModel, Site
from bam_merge.text import printable, some

QUANTISED = re.compile(r"bnb|4-?bit|8-?bit|int[48]|nf4|gptq|awq|qlora", re.IGNORECASE)
"""What the name of a quantised base has in it."""


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
class _Adapting(Changing):
    """Collects what every adapter does to the base, and what is wrong with it."""

    opened: list[Adapter] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def apply(self, adapter: Opened) -> None:
        """Everything that one adapter does."""
        found: list[str] = []
        config = read_adapter_config(adapter.folder.config, found)
        wrapper = self.base.wrapper
        beside = {name: what for name in adapter.folder.tensors if (what := beside_of(name, wrapper)) is not None}
        parts, unknown, prefix = parts_of([name for name in adapter.folder.tensors if name not in beside], self.modules, wrapper)
        one = OneAdapter(self, adapter, config or AdapterConfig(), parts, prefix)
        if wrapper is not None:
            one.dropped |= {name: beside_text(wrapper, what) for name, what in beside.items()}
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
            notes=tuple(self.notes),
        )  # fmt: skip

    def _made(self, before: Whole, changes: Changes) -> Whole:
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


# ---- what the plan says ------------------------------------------------------------------------------------------------------


def _notes(config: AdapterConfig, adapter: Opened, base: DenseModel, prefix: Prefix, one: OneAdapter) -> Iterator[str]:
    named, folder = config.base_model_name_or_path or "", _called(base.checkpoint.path)
    if named and named.rstrip("/").rpartition("/")[2] != folder:
        yield f"adapter_config.json names the base {printable(named)}, here it is {printable(folder)}: see that they are the same weights."
    if QUANTISED.search(named):
        yield (
            "trained on a quantised base, it seems, and added to the 16-bit one: what it computes differs from what was trained by the "
            "quantisation's error."
        )
    if base.checkpoint.remote is None and (others := _other_tokenizers(adapter.folder.path, base.checkpoint.path)):
        yield (
            f"{some(others)} beside the adapter is not the base's, and not read: tokens have the base's ids. If the adapter was trained "
            "with other tokens, name a base that has them, with that tokenizer in its folder."
        )
    if config.fan_in_fan_out:
        yield "fan_in_fan_out is ignored, as in PEFT: no module of the base stores its weight turned."
    if prefix[:2] != PREFIXES[0] and not (base.wrapper is not None and prefix[2] != prefix[0]):
        named = f"{printable(prefix[0])}NAME" if prefix[0] else "NAME"
        yield f"tensors are named {named}, where PEFT writes {PREFIXES[0][0]}{prefix[1]}NAME: taken for these."
    if one.reaches_both:
        yield (
            f"{some(one.reaches_both)}: head and embeddings are tied, so the update reaches both, as in PEFT's merge_and_unload; while "
            "it was trained it was in one of them."
        )


def _other_tokenizers(adapter: Path, base: Path) -> list[str]:
    """The files that name tokens in an adapter's folder, as trainers save them there, and that are not its base's."""
    names = sorted(name for name in VOCABULARIES if (adapter / name).is_file())
    try:
        return [name for name in names if not ((base / name).is_file() and cmp(adapter / name, base / name, shallow=False))]
    except OSError:  # what is wrong with the base's is said elsewhere
        return names


def _called(folder: Path) -> str:
    """The name of a model's folder; of one in the hub's cache the model's."""
    above = folder.parent.parent.name
    return above.rpartition("--")[2] if folder.parent.name == "snapshots" and above.startswith("models--") else folder.name
