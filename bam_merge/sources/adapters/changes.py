"""What adapters do to a base, tensor by tensor, as it is collected: which tensor a module has, and how each is changed."""

from dataclasses import dataclass, field, replace

from bam_merge.architectures.locate import Cell
from bam_merge.checkpoints.adapter_folder import AdapterFolder
from bam_merge.checkpoints.pieces import Read, Whole, whole
from bam_merge.records import Formula
from bam_merge.sources.adapters.tensors import Module
from bam_merge.sources.dense import DenseModel


@dataclass(frozen=True)
class Opened:
    """One adapter: what plans call it, its folder, and what its updates are multiplied with."""

    store: str
    folder: AdapterFolder
    weight: float = 1.0


@dataclass
class Changes:
    """What adapters do to one tensor of the base, in the order in which it is done. An update: (adapter, scale, turned, A, B)."""

    saved: Read | None = None
    updates: list[tuple[str, float, bool, Read, Read]] = field(default_factory=list)
    dora: tuple[Formula, tuple[Read, ...]] | None = None
    last: list[tuple[Formula, Read]] = field(default_factory=list)


@dataclass
class Changing:
    """A base and what its adapters do to it. `own_head`: one of tied head and embeddings was trained whole, so that they are two."""

    name: str
    base: DenseModel
    modules: dict[str, Module]
    changes: dict[Cell, Changes] = field(default_factory=dict)
    own_head: bool = False

    @property
    def tied(self) -> bool:
        return bool(self.base.facts["tie_word_embeddings"])

    def untie(self) -> None:
        """Give the head a tensor of its own."""
        self.own_head = True
        head = next(module for module in self.modules.values() if module.head)
        row = next(row for row in self.base.family.rows if row.roles == ("head",))
        self.modules[head.name] = replace(head, cells={"weight": Cell(row)})

    def cell(self, module: Module, part: str) -> Cell | None:
        """The base's tensor that a module's weight or bias is: of a tied head the embeddings."""
        if module.head and part == "weight" and not module.cells and not self.own_head:
            module = next(module for module in self.modules.values() if module.embedding)
        return module.cells.get(part)

    def current(self, cell: Cell) -> Whole:
        """The base's tensor as it is: of a head that it ties, the embeddings."""
        site = (cell.row.roles[0], cell.layer)
        return whole(self.base.tensors[site if site in self.base.tensors else ("embed", None)])  # type: ignore[arg-type]

    def of(self, cell: Cell) -> Changes:
        return self.changes.setdefault(cell, Changes())
