"""The walk over a table: which stored tensor is which row of it, at which layer and for which expert; what is missing, what is over.

Merges, the reference model and `inspect` all ask here, and nothing here judges: it gives records, and each of them says in its own words
what it refuses, drops or remarks on. A merge and the model that proves it share this walk and the tables, so a mistake in them would not
show between the two: names, shapes and values are compared with transformers' own models, for every family and layout, in
tests/architectures/test_locate.py. What a configuration means, and how bytes become numbers, each of them reads by code of its own.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bam_merge.architectures.tables import Architecture, Row, at_layer, evaluate, natural_order
from bam_merge.checkpoints.pieces import Joined, Read, Shape, Slice

Place = tuple[str, int | None, int | None]
"""A role, its layer and its expert, where it has them."""


class Cell(NamedTuple):
    """A row of a table at a layer, for an expert: one tensor of a model. The row of a buffer, which loading recomputes, has no roles.

    A tensor that holds all experts is one cell, without an expert.
    """

    row: Row
    layer: int | None = None
    expert: int | None = None

    @property
    def names(self) -> list[str]:
        """Every spelling of its name; the first is the one that is written."""
        return [self.row.name(self.layer, self.expert, spelling) for spelling in range(len(self.row.names))]


class Met(NamedTuple):
    """A cell of which something is stored: under which names, and whether the model is to have it. Several names are too many."""

    cell: Cell
    names: tuple[str, ...]
    wanted: bool


@dataclass(frozen=True)
class Located:
    """What is stored, held against the cells of a model.

    `met` has the cells of which something is stored, `missing` those that are wanted and of which nothing is, both in the order of the
    walk; `extra` the stored tensors that are of none of the cells, in the order of the files.
    """

    met: tuple[Met, ...]
    missing: tuple[Cell, ...]
    extra: tuple[str, ...]


def locate(names: Collection[str], cells: Iterable[Cell], wanted: Callable[[Cell], bool]) -> Located:
    """Look for every one of `cells`, of which a model has those `wanted`, among the stored `names`."""
    met: list[Met] = []
    missing: list[Cell] = []
    for cell in cells:
        there = tuple(name for name in cell.names if name in names)
        if there:
            met.append(Met(cell, there, wanted(cell)))
        elif wanted(cell):
            missing.append(cell)
    known = {name for item in met for name in item.names}
    return Located(tuple(met), tuple(missing), tuple(name for name in names if name not in known))


def cells(table: Architecture, layers: int, experts: int = 0) -> Iterator[Cell]:
    """Every row of `table` at every layer, for every expert; then the buffers that old files hold."""
    for row in (*table.rows, *_buffers(table)):
        for layer in range(layers) if row.per_layer else (None,):
            yield from (Cell(row, layer, expert) for expert in (range(experts) if row.per_expert and not row.stacked else (None,)))


def in_order(table: Architecture, layers: int) -> Iterator[Cell]:
    """The cells of a dense family layer by layer, without buffers."""
    return (Cell(row, layer) for row, layer in natural_order(table, layers))


def _buffers(table: Architecture) -> Iterator[Row]:
    return (Row((), (name,)) for name in table.dropped)


# ---- what a dense family has ---------------------------------------------------------------------------------------------------


def applies(cell: Cell, facts: Mapping[str, Any]) -> bool:
    """Whether a dense model with these facts has the tensor. It has no buffer."""
    return (
        bool(cell.row.roles) and (cell.row.when is None or holds(cell.row.when, at_layer(facts, cell.layer))) and of_its_kind(cell, facts)
    )


def of_its_kind(cell: Cell, facts: Mapping[str, Any]) -> bool:
    """Whether the cell's layer is of a kind that has the tensor."""
    kinds, types = cell.row.kinds, facts.get("layer_types")
    return not kinds or cell.layer is None or not types or types[cell.layer] in kinds


def is_named_here(row: Row, table: Architecture, facts: Mapping[str, Any]) -> bool:
    """Whether a model with these facts calls what `row` holds by the row's name: of several rows with one role, the one whose condition
    is true."""
    rivals = any(other is not row and other.roles == row.roles and other.per_expert == row.per_expert for other in table.rows)
    return row.when is None or not rivals or holds(row.when, facts)


def holds(when: str, facts: Mapping[str, Any]) -> bool:
    """Whether the condition of a row, "FACT" or "not FACT" or several by "and", is true of a model with these facts."""
    parts = [(part.removeprefix("not "), not part.startswith("not ")) for part in when.split(" and ")]
    return all(bool(facts[fact]) == wanted for fact, wanted in parts)


def shape_of(row: Row, facts: Mapping[str, Any]) -> Shape:
    """The shape of a row's tensor, by its table."""
    return tuple(evaluate(size, facts) for size in row.shape)


def family_tensors(family: Architecture, facts: Mapping[str, Any], spelling: int = 0) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of every tensor that a model of `family` with these facts has, in the table's order, layer by layer."""
    for cell in in_order(family, facts["num_hidden_layers"]):
        if applies(cell, facts):
            own, name = at_layer(facts, cell.layer), cell.names[min(spelling, len(cell.row.names) - 1)]
            if cell.row.pieces:
                yield from ((piece, piece_shape(cell.row, own)) for piece in pieces_of(cell.row, name, own))
            else:
                yield name, shape_of(cell.row, own)


# ---- one tensor in several ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """Stored tensors by their own names, those that hold one together under its name, with {head} in the place of their numbers: there it
    is the first of them that stands for all, and `parts` has them in order. `lacking` are the own names of those that are not there."""

    names: Mapping[str, str]
    parts: Mapping[str, tuple[str, ...]]
    lacking: tuple[str, ...]


def gathered(stored: Mapping[str, str], table: Architecture, layers: int, facts_at: Callable[[int | None], Mapping[str, Any]]) -> Gathered:
    """`stored` maps own names to stored ones; `facts_at` gives the facts that hold at a layer."""
    names, parts, lacking = dict(stored), dict[str, tuple[str, ...]](), list[str]()
    for row in (row for row in table.rows if row.pieces):
        for layer in range(layers) if row.per_layer else (None,):
            for spelling in range(len(row.names)):
                whole = row.name(layer, spelling=spelling)
                own = pieces_of(row, whole, facts_at(layer))
                there = tuple(names.pop(name) for name in own if name in names)
                if there:
                    names[whole], parts[there[0]] = there[0], there
                    lacking += [name for name in own if name not in stored]
    return Gathered(names, parts, tuple(lacking))


def pieces_of(row: Row, name: str, facts: Mapping[str, Any]) -> list[str]:
    """The names of the tensors that hold the one of `row` called `name` together, in order; of most that is itself."""
    if not row.pieces:
        return [name]
    return [name.replace("{head}", str(head)) for head in range(evaluate(row.pieces, facts))]


def piece_shape(row: Row, facts: Mapping[str, Any]) -> Shape:
    """The shape of each of these."""
    first, *rest = shape_of(row, facts)
    return (first // evaluate(row.pieces or "1", facts), *rest)


def joined(reads: tuple[Read, ...]) -> Read | Joined:
    """The tensor that these hold together."""
    return reads[0] if len(reads) == 1 else Joined(reads, (sum(read.shape[0] for read in reads), *reads[0].shape[1:]))


# ---- fused tensors -------------------------------------------------------------------------------------------------------------


def rows_of(row: Row, facts: Mapping[str, Any]) -> int:
    """The rows of a fused tensor: as many blocks as the table says, of all roles' parts."""
    return evaluate(row.groups, facts) * sum(evaluate(part, facts) for part in row.parts)


def parts_of(cell: Cell, read: Read, facts: Mapping[str, Any]) -> dict[tuple[str, int | None], Read | Slice] | None:
    """What each role of a cell is read from, by the role and the expert: as `cut`, and of a tensor that holds all experts for each of them.

    None where its table does not say what is where.
    """
    row, _, expert = cell
    if not row.stacked:
        found = cut(row, read, facts)
        return None if found is None else {(role, expert): leaf for role, leaf in found.items()}
    if len(read.shape) < 2 or (len(row.roles) > 1 and (not row.parts or read.shape[1] != rows_of(row, facts))):
        return None
    experts, rows, *rest = read.shape
    one_axis = replace(read, shape=(experts * rows, *rest))
    pieces: dict[tuple[str, int | None], Read | Slice] = {}
    for index in range(experts):
        start = index * rows
        for role, part in zip(row.roles, row.parts or (None,), strict=True):
            count = rows if part is None or len(row.roles) == 1 else evaluate(part, facts)
            pieces[role, index] = Slice(one_axis, 1, start, count, (count, *rest))
            start += count
    return pieces


def cut(row: Row, read: Read, facts: Mapping[str, Any]) -> dict[str, Read | Slice] | None:
    """What each role of `row` is read from: the tensor as it is, or its rows of a fused one.

    None where a fused tensor has other rows than `facts` imply, or its table names no parts: nobody knows what is where.
    """
    if len(row.roles) == 1:
        return {row.roles[0]: read}
    if not row.parts or not read.shape or read.shape[0] != rows_of(row, facts):
        return None
    groups, start = evaluate(row.groups, facts), 0
    pieces: dict[str, Read | Slice] = {}
    for role, part in zip(row.roles, row.parts, strict=True):
        rows = evaluate(part, facts)
        pieces[role] = Slice(read, groups, start, rows, (groups * rows, *read.shape[1:]))
        start += rows
    return pieces


# ---- a table read backwards ------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.)")
_NUMBER_OR_MARK = re.compile(r"(?<=\.)(\{layer\}|\{expert\}|\{head\}|0|[1-9][0-9]{0,8})(?=\.)")

Words = tuple[str, ...]
"""What stands between the numbers of a name: 'model.layers.3.x' -> ('model.layers.', '.x')."""


def words(name: str) -> Words:
    """A name with its numbers taken out."""
    return tuple(_NUMBER.split(name)[::2])


def spellings(table: Architecture) -> dict[Words, list[tuple[Words, Row]]]:
    """Every spelling of every row of `table`, buffers too, by its words: its marks and literal numbers in order, and the row."""
    found: dict[Words, list[tuple[Words, Row]]] = {}
    for row in (*table.rows, *table.others, *_buffers(table)):
        for name in row.names:
            pieces = _NUMBER_OR_MARK.split(name)
            found.setdefault(tuple(pieces[::2]), []).append((tuple(pieces[1::2]), row))
    return found


def read_name(name: str, known: Mapping[Words, list[tuple[Words, Row]]]) -> Cell | None:
    """The cell whose tensor `name` is, at whatever layer and for whatever expert; None where no row of the table is called so."""
    numbers = _NUMBER.findall(name)
    for marks, row in known.get(words(name), ()):
        pairs = list(zip(marks, numbers, strict=True))
        if all(mark.startswith("{") or mark == number for mark, number in pairs):
            at = {mark: int(number) for mark, number in pairs}
            return Cell(row, at.get("{layer}"), at.get("{expert}"))
    return None
