"""How an inspection shows tensors: equal layers folded, one by one with their origins, their values. Builds text."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bam_merge.checkpoints.header import TensorEntry
from bam_merge.inspecting.inspection import Inspection
from bam_merge.showing.terminal import Terminal, grid, heading, line, padded
from bam_merge.text import NUMBER, count, human_bytes, printable, ranges, short, span

if TYPE_CHECKING:
    from bam_merge.inspecting.router_stats import RouterStats
    from bam_merge.inspecting.tensor_stats import TensorStats

Line = tuple[int, str, list[TensorEntry] | int]
"""Indent, name, and the tensors that it stands for."""


def _kind(entry: TensorEntry) -> str:
    return f"{entry.dtype} [{', '.join(map(str, entry.shape))}]"


def tensors(found: Inspection, terminal: Terminal, every: bool) -> Iterator[RenderableType]:
    entries = found.entries
    yield heading("tensors", f"{len(entries):,}")
    folded = [(0, printable(entry.name), [entry]) for entry in entries] if every else list(_folded(entries))
    if found.values:
        yield from _with_figures(found, folded, terminal)
        return
    table = grid("left", "left", "left" if every else "right")
    for indent, name, members in folded:
        if isinstance(members, int):
            table.add_row(Text(name, style="cyan"), "", Text(f"{members:,}", style="cyan"))
        else:
            last = _role(found, members[0]) if every else f"{members[0].numel:,}"
            table.add_row(Text("  " * indent + name), _kind(members[0]), last)
    yield padded(table)


def _with_figures(found: Inspection, folded: Sequence[Line], terminal: Terminal) -> Iterator[RenderableType]:
    width = max((len(name) + 2 * indent for indent, name, _ in folded), default=0)
    for indent, name, members in folded:
        if isinstance(members, int):
            yield line(name, "cyan")
            continue
        yield line(f"{name:{width - 2 * indent}}  {_kind(members[0])}", indent=2 + 2 * indent)
        yield Padding(_figures(found, members, terminal), (0, 0, 0, 4 + 2 * indent))


def _folded(entries: Sequence[TensorEntry]) -> Iterator[Line]:
    """Equal layers together below a heading, which has one layer's parameters instead of members."""
    blocks: dict[tuple[str, str | None], list[tuple[str, TensorEntry]]] = {}
    for entry in entries:
        prefix, number, rest = _split(entry.name)
        blocks.setdefault((prefix, number), []).append((rest, entry))
    alike: dict[tuple[str, frozenset[object]], list[tuple[str, list[tuple[str, TensorEntry]]]]] = {}
    for (prefix, number), members in sorted(blocks.items(), key=lambda item: (item[0][1] is not None, int(item[0][1] or 0))):
        inside = frozenset((rest, entry.dtype, entry.shape) for rest, entry in members)
        alike.setdefault((prefix, inside), []).append((number or "", members))
    for (prefix, _), layers in alike.items():
        first = layers[0][1]
        if not layers[0][0]:
            yield 0, printable(prefix), [entry for _, entry in first]
            continue
        times = f"{len(layers)} x " if len(layers) > 1 else ""
        name = f"{times}{printable(prefix)}{ranges([int(number) for number, _ in layers])}."
        yield 0, name, sum(entry.numel for _, entry in first)
        yield from _fold_experts([member for _, members in layers for member in members])


def _fold_experts(members: Sequence[tuple[str, TensorEntry]]) -> Iterator[tuple[int, str, list[TensorEntry]]]:
    """The tensors of equal layers, each with its name inside the layer, one line for all that differ in a number only."""
    groups: dict[tuple[object, ...], list[tuple[list[str], TensorEntry]]] = {}
    for rest, entry in members:
        words = NUMBER.split(f".{rest}")
        groups.setdefault((*words[::2], entry.dtype, entry.shape), []).append((words, entry))
    for alike in groups.values():
        words = list(alike[0][0])
        numbers = zip(*(map(int, other[1::2]) for other, _ in alike), strict=True)
        words[1::2] = [ranges(sorted(set(column))) for column in numbers]
        yield 1, printable("".join(words)[1:]), [entry for _, entry in alike]


def _split(name: str) -> tuple[str, str | None, str]:
    """A name at its first number: 'model.layers.3.x' -> ('model.layers.', '3', 'x'); without one ('name', None, 'name')."""
    found = NUMBER.search(name)
    return (name[: found.start()], found[1], name[found.end() + 1 :]) if found else (name, None, name)


def _role(found: Inspection, entry: TensorEntry) -> str:
    if entry.name in found.anatomy.dropped:
        return "not used: " + found.anatomy.dropped[entry.name]
    return found.anatomy.places.get(entry.name, ("unknown", None, None))[0]


def details(found: Inspection, terminal: Terminal) -> Iterator[RenderableType]:
    """Every tensor asked for, over several lines."""
    for entry in found.entries:
        _, layer, expert = found.anatomy.places.get(entry.name, ("", None, None))
        names = found.expert_names or []
        who = f" ({printable(names[expert])})" if expert is not None and expert < len(names) else ""
        where = [f"layer {layer}"] * (layer is not None) + [f"expert {expert}{who}"] * (expert is not None)
        yield Text(printable(entry.name), style="bold")
        yield line(f"{_kind(entry)}, {human_bytes(entry.nbytes)} in {printable(entry.file)}")
        yield line(f"{', '.join([_role(found, entry), *where])}")
        if origin := found.origins.get(entry.name):
            yield line(f"= {printable(origin.expression, 2000)}", "green")
            if tuple(f"{source}:{tensor}" for source, tensor in origin.reads) != (origin.expression,):
                yield from (line(f"{printable(source)}:{printable(tensor)}", "dim", 6) for source, tensor in origin.reads)
        if found.values and entry.name in found.values.tensors:
            yield Padding(_figures(found, [entry], terminal), (0, 0, 0, 2))
            yield line(_counts(found.values.tensors[entry.name]), "dim")


def _counts(stats: "TensorStats") -> str:
    """What is special in a tensor, also where there is nothing."""
    words = [f"{stats.nan:,} NaN", f"{stats.inf:,} infinite", f"{stats.negative_zeros:,} -0.0"]
    words += [count(stats.zero_rows, "zero row")] if stats.zero_rows is not None else []
    words += [f"largest {short(stats.limit)} of the dtype's limit"] if stats.limit is not None else []
    return ", ".join([*words, *["constant"] * stats.constant]) if stats.finite is not None else f"XXH3-128 {stats.digest}"


def fates(found: Inspection) -> Iterator[RenderableType]:
    """What became of a source's tensors."""
    for record in found.where or []:
        yield Text(f"{printable(record['source'])}:{printable(record['tensor'])}", style="bold")
        for made in record["made"]:
            whole = made["expression"].removesuffix(f":{record['tensor']}") == record["source"]
            yield line(f"{'is' if whole else 'in'} {printable(made['name'])}", "green")
            if not whole:
                yield line(f"= {printable(made['expression'], 2000)}", "dim", 5)
        if not record["made"]:
            yield line(f"not read: {printable(str(record['unused'] or 'no tensor of the result needs it'), 2000)}", "yellow")


def _figures(found: Inspection, members: Sequence[TensorEntry], terminal: Terminal) -> Text:
    """The figures of one tensor, or of alike ones together, with their summed histograms (bins are in standard deviations)."""
    assert found.values
    stats = [found.values.tensors[entry.name] for entry in members]
    if all(item.finite is None for item in stats):
        return Text("values not computed for this dtype", style="dim")
    bins = [sum(column) for column in zip(*(item.histogram for item in stats if item.histogram), strict=True)]
    low = min((item.min for item in stats if item.min is not None), default=None)
    high = max((item.max for item in stats if item.max is not None), default=None)
    text = f"{short(low)} to {short(high)}, std {span(item.std for item in stats)}"
    if len(members) == 1:
        text += f", mean {short(stats[0].mean)}, norm {short(stats[0].norm)}, {count(stats[0].zeros, 'zero')}"
    return Text.assemble((terminal.sparkline(bins) or "no spread", "cyan"), f"  {text}")


def values_read(found: Inspection, every: bool) -> Iterator[RenderableType]:
    assert found.values
    values = found.values
    odd = list(_oddities(found))
    yield heading("values", f"{count(len(values.tensors), 'tensor')} read")
    yield from odd or [line("nothing odd: no NaN, infinity, -0.0, constants, zero rows, or near overflow")]
    for group, copy, original in values.clones:
        yield line(f"{group} expert {copy} equals expert {original} in every tensor", "yellow")
    if values.duplicates:
        yield line(f"{count(len(values.duplicates), 'group')} of byte-identical tensors:", "yellow")
        for names in values.duplicates if every else values.duplicates[:5]:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            yield line(" = ".join(map(printable, names[:4])) + more, indent=4)
        if not every and len(values.duplicates) > 5:
            yield line(f"and {len(values.duplicates) - 5:,} more groups (--all lists them)", "dim", 4)
    if values.routers:
        yield heading("routers", "on random inputs of unit root mean square; entropy as a share of log N")
        yield padded(_routers(found, every))


def _oddities(found: Inspection) -> Iterator[Padding]:
    assert found.values
    tensors = found.values.tensors
    zero = [name for name, item in tensors.items() if item.count and item.zeros == item.count]
    kinds = {
        "NaN": {name: item.nan for name, item in tensors.items()},
        "infinite": {name: item.inf for name, item in tensors.items()},
        "-0.0": {name: item.negative_zeros for name, item in tensors.items()},
        "all zero": dict.fromkeys(zero, 1),
        "constant": {name: int(item.constant and item.count > 1 and name not in zero) for name, item in tensors.items()},
        "with zero rows": {name: item.zero_rows or 0 for name, item in tensors.items() if name not in zero},
        "within a factor of 2 of the dtype's limit": {name: int((item.limit or 0) > 0.5) for name, item in tensors.items()},
    }
    for what, counts in kinds.items():
        hit = {name: number for name, number in counts.items() if number}
        if hit:
            first = ", ".join(f"{printable(name)}{f' ({number:,})' if number > 1 else ''}" for name, number in list(hit.items())[:3])
            more = f" and {len(hit) - 3} more" if len(hit) > 3 else ""
            yield line(f"{what}: {count(len(hit), 'tensor')}: {first}{more}", "yellow")


def _routers(found: Inspection, every: bool) -> Table:
    assert found.values
    groups: dict[tuple[str, str, int | None], list[RouterStats]] = {}
    for router in found.values.routers:
        groups.setdefault((router.role, router.init, router.layer if every else None), []).append(router)
    table = grid(*["left"] * 7, header=("router", "init", "std", "|cos|", "condition", "entropy", "load"))
    for (role, init, _), routers in groups.items():
        layers = ranges([router.layer for router in routers if router.layer is not None])
        loads = [share for router in routers for share in router.load]
        table.add_row(
            f"{role} {layers}", init, span(router.std for router in routers), f"{max(router.cosine for router in routers):.2g}",
            span(router.condition for router in routers), span(router.entropy for router in routers),
            " ".join(f"{share:.0%}" for share in loads) if len(loads) <= 4 else f"{min(loads):.0%} to {max(loads):.0%}",
        )  # fmt: skip
    return table
