"""How an inspection looks in a terminal. Builds text; cli.py prints it."""

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bam_merge.cost import Cost
from bam_merge.errors import printable
from bam_merge.inspection import Inspection
from bam_merge.render import count, human_bytes, ranges
from bam_merge.safetensors_header import TensorEntry
from bam_merge.terminal import Terminal

COLUMNS = {"expert_kv": "Expert-KV", "shared_kv": "Shared-KV", "btx": "BTX", "dense": "dense"}
NUMBER = re.compile(r"(?<=\.)([0-9]+)(?=\.)")


def inspection_text(found: Inspection, terminal: Terminal, every: bool = False, zoomed: bool = False) -> str:
    """The whole picture; or, zoomed in, each tensor that was asked for with where it comes from; or what became of a source's."""
    parts: list[RenderableType] = []
    if found.where is not None:
        parts += _fates(found)
    elif zoomed:
        parts += _details(found, terminal) if found.shown else [Text("no tensor matches")]
    else:
        parts += [Text(printable(found.path), style="bold"), _padded(_facts(found)), _heading("parameters", "by role")]
        parts += [_padded(_roles(found, terminal)), *_tensors(found, terminal, every), *_costs(found)]
    if found.values and found.shown:
        parts += _values(found, every or zoomed)
    if found.findings and found.where is None:
        parts += [_heading("findings"), *(_line(f"  {printable(text, 2000)}", "yellow") for text in found.findings)]
    return terminal.text(*parts)


# ---- pieces ----------------------------------------------------------------------------------------------------------------


def _heading(text: str, aside: str = "") -> Text:
    return Text.assemble("\n", (text, "bold"), (f"  {aside}" if aside else "", "dim"))


def _line(text: str, style: str = "") -> Text:
    """A line whose continuation is indented as it is."""
    return Text(text, style=style)


def _padded(table: Table) -> Padding:
    return Padding(table, (0, 0, 0, 2))


def _grid(*justify: str, header: Sequence[str] | None = None) -> Table:
    table = Table(box=None, show_header=header is not None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for index, side in enumerate(justify):
        right = side == "right"
        table.add_column(header[index] if header else "", justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _number(value: int | float) -> str:
    """1,234,567 while it fits a column, 671 G beyond."""
    if isinstance(value, float):
        return f"{value:,.0f}"
    for unit in ("", "G", "T", "P"):
        if value < 10**10:
            return f"{value:,} {unit}".rstrip()
        value = round(value / 10**9) if not unit else round(value / 1000)
    return f"{value:.3g}"


def _g(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _span(values: Iterable[float | None]) -> str:
    shown = sorted(value for value in values if value is not None)
    if not shown:
        return "-"
    low, high = _g(shown[0]), _g(shown[-1])
    return low if low == high else f"{low} to {high}"


# ---- what it is ------------------------------------------------------------------------------------------------------------


def _facts(found: Inspection) -> Table:
    facts, anatomy = found.anatomy.facts, found.anatomy
    table = _grid("left", "left")
    for name, value in _rows(found):
        table.add_row(Text(name, style="cyan"), Text(value))
    assert facts is anatomy.facts
    return table


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    facts, cost = found.anatomy.facts, found.cost
    yield "model", _identity(found)
    if found.anatomy.architecture:
        yield "blocks", _blocks(found)
    if facts:
        yield "attention", _attention(found)
    if experts := _experts(found):
        yield "experts", experts
    if facts:
        yield "vocabulary", f"{facts['vocab_size']:,}, head {'tied to the embeddings' if not facts['untied'] else 'of its own'}"
    active = f", {cost.active:,} active per token" if cost.active is not None else ""
    yield "parameters", f"{cost.parameters:,} total{active}"
    dtypes = ", ".join(
        name if len(found.dtypes) == 1 else f"{name} {elements / max(1, sum(found.dtypes.values())):.1%}"
        for name, elements in found.dtypes.items()
    )
    yield "stored", f"{human_bytes(found.nbytes)} in {count(len(found.checkpoint.files), 'file')}, {dtypes or 'no tensors'}"
    if found.origins:
        sources = sorted({source for origin in found.origins.values() for source, _ in origin.reads})
        yield "made of", f"{', '.join(map(printable, sources))} (bam_merge.json; --tensors and --where ask it)"


def _identity(found: Inspection) -> str:
    anatomy = found.anatomy
    if anatomy.architecture is None:
        model_type = found.checkpoint.config.get("model_type")
        return f"unknown architecture (model_type {printable(repr(model_type), 60)}); names and sizes only"
    name = anatomy.architecture.name
    if anatomy.guessed:
        return f"looks like {name} by its tensor names; no config.json"
    if name == "bam":
        base = printable(str(anatomy.facts.get("base_model_type", "unknown")))
        return f"bam mixture of {base} models"
    return name if anatomy.architecture.kind == "dense" else f"{name} mixture"


def _blocks(found: Inspection) -> str:
    facts = found.anatomy.facts
    text = f"{found.cost.layers}"
    if facts:
        kind = "parallel, " + count(facts.get("parallel_norms") or 1, "norm") if facts.get("parallel_block") else "sequential"
        gated = "gated " if facts.get("gated_ffn") else ""
        text += f", {kind}; width {facts['hidden_size']:,}, FFN {facts['intermediate_size']:,} ({gated}{printable(str(facts['hidden_act']))})"
    dense = [layer for layer, block in enumerate(found.cost.blocks) if "router.ffn" not in block]
    if found.expert_count("ffn") and dense:
        text += f"; layers {ranges(dense)} without experts"
    return text


def _attention(found: Inspection) -> str:
    facts = found.anatomy.facts
    latent = next((leaf.shape[0] for (role, _, _), leaf in found.anatomy.leaves.items() if role == "attn.kv_a"), None)
    if latent:
        return f"{facts['num_attention_heads']} heads over a latent vector of {latent}"
    heads, kv = facts["num_attention_heads"], facts["num_key_value_heads"]
    text = f"{count(heads, 'head')} of {facts['head_dim']}" + (f", {kv} for keys and values" if kv != heads else "")
    traits = [name for key, name in (("qk_norm", "q and k normed"), ("attention_bias", "biases")) if facts.get(key)]
    rope = facts.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float):
        traits.append(f"rotary {printable(str(rope.get('rope_type')))} (theta {rope['rope_theta']:,.0f})")
    if facts.get("sliding_window"):
        traits.append(f"window {facts['sliding_window']}")
    return ", ".join((text, *traits))


def _experts(found: Inspection) -> str:
    facts, ffn, attention = found.anatomy.facts, found.expert_count("ffn"), found.expert_count("attn")
    lines = []
    if found.expert_names and ffn:
        lines.append(", ".join(map(printable, found.expert_names)))
    if ffn:
        gate = {True: ", gates sum to one", False: ", gates of the softmax over all"}.get(facts.get("norm_topk_prob", ""), "")
        scale = f" x {facts['gate_scale']:g}" if isinstance(facts.get("gate_scale"), float) and facts["gate_scale"] != 1 else ""
        top_k = f", top {facts['num_experts_per_tok']}" if facts.get("num_experts_per_tok") else ""
        lines.append(f"FFN: {ffn}{top_k}{gate}{scale}")
    if any(piece.role.startswith("ffn.shared.") for piece in found.cost.pieces):
        lines[-1:] = [f"{line}, and one shared by all tokens" for line in lines[-1:]]
    if attention:
        routing = f"top {facts.get('num_attention_experts_per_tok')}" if facts.get("attention_routing") == "top_k" else "soft routing"
        partly = facts.get("shared_kv_layers")
        kv = "keys and values shared" if facts.get("attention_kv") == "shared" else "keys and values per expert"
        kv += f" (shared in layers {ranges(partly)})" if isinstance(partly, list) and partly else ""
        lines.append(f"attention: {attention}, {routing if facts else 'routing not known'}{', ' + kv if facts else ''}")
    return "\n".join(lines)


def _roles(found: Inspection, terminal: Terminal) -> Table:
    roles = sorted(found.cost.by_role.items(), key=lambda item: -item[1])
    table = _grid("left", "right", "right", "left")
    for role, parameters in roles:
        share = parameters / max(1, found.cost.parameters)
        table.add_row(Text(role), f"{parameters:,}", f"{share:.1%}", Text(terminal.bar(share, 30), style="cyan"))
    return table


# ---- tensors ---------------------------------------------------------------------------------------------------------------


def _kind(entry: TensorEntry) -> str:
    return f"{entry.dtype} [{', '.join(map(str, entry.shape))}]"


def _tensors(found: Inspection, terminal: Terminal, every: bool) -> Iterator[RenderableType]:
    entries = found.entries
    yield _heading("tensors", f"{len(entries):,}")
    if every:
        table = _grid("left", "left", "left")
        for entry in entries:
            table.add_row(Text(printable(entry.name)), _kind(entry), _role(found, entry))
        yield _padded(table)
        return
    table = _grid("left", "left", "left" if found.values else "right")
    for indent, name, members in _folded(entries):
        if not members:
            table.add_row(Text(name, style="cyan"), "", "")
        else:
            last = _figures(found, members, terminal) if found.values else f"{members[0].numel:,}"
            times = f"{len(members)} x " if len(members) > 1 and not indent else ""
            table.add_row(Text("  " * indent + times + name), _kind(members[0]), last)
    yield _padded(table)


def _folded(entries: Sequence[TensorEntry]) -> Iterator[tuple[int, str, list[TensorEntry]]]:
    """(indent, name, members): equal layers stand together under a heading without members, and so do a layer's equal experts."""
    blocks: dict[tuple[str, str | None], list[TensorEntry]] = {}
    for entry in entries:
        prefix, number, rest = _split(entry.name)
        blocks.setdefault((prefix, number), []).append(entry)
        assert rest
    alike: dict[tuple[object, ...], list[tuple[str, list[TensorEntry]]]] = {}
    for (prefix, number), members in blocks.items():
        if number is None:
            alike[prefix, None] = [("", members)]
        else:
            inside = frozenset((_split(entry.name)[2], entry.dtype, entry.shape) for entry in members)
            alike.setdefault((prefix, inside), []).append((number, members))
    for (prefix, inside, *_), layers in alike.items():
        if inside is None:
            yield 0, printable(str(prefix)), layers[0][1]
            continue
        times = f"{len(layers)} x " if len(layers) > 1 else ""
        each = sum(entry.numel for entry in layers[0][1])
        yield 0, f"{times}{printable(str(prefix))}{ranges([int(n) for n, _ in layers])}.  ({each:,} parameters{' each' if times else ''})", []
        yield from _fold_experts([entry for _, members in layers for entry in members])


def _fold_experts(entries: Sequence[TensorEntry]) -> Iterator[tuple[int, str, list[TensorEntry]]]:
    groups: dict[tuple[object, ...], list[TensorEntry]] = {}
    for entry in entries:
        rest = _split(entry.name)[2]
        groups.setdefault((NUMBER.sub("#", f".{rest}"), entry.dtype, entry.shape), []).append(entry)
    for members in groups.values():
        rest = f".{_split(members[0].name)[2]}"
        numbers = [[int(n) for n in NUMBER.findall(f".{_split(entry.name)[2]}")] for entry in members]
        columns = iter([sorted(set(column)) for column in zip(*numbers, strict=True)])
        name = NUMBER.sub(lambda _, columns=columns: ranges(next(columns)), rest)  # type: ignore[misc]
        yield 1, printable(name[1:]), members


def _split(name: str) -> tuple[str, str | None, str]:
    """A name at its first number: 'model.layers.3.x' -> ('model.layers.', '3', 'x'); without one ('name', None, 'name')."""
    found = NUMBER.search(name)
    return (name[: found.start()], found[1], name[found.end() + 1 :]) if found else (name, None, name)


def _role(found: Inspection, entry: TensorEntry) -> str:
    if entry.name in found.anatomy.dropped:
        return "not used: " + found.anatomy.dropped[entry.name]
    return found.anatomy.keys.get(entry.name, ("unknown", None, None))[0]


def _details(found: Inspection, terminal: Terminal) -> Iterator[RenderableType]:
    """Every tensor asked for, over several lines."""
    for entry in found.entries:
        _, layer, expert = found.anatomy.keys.get(entry.name, ("", None, None))
        names = found.expert_names or []
        who = f" ({printable(names[expert])})" if expert is not None and expert < len(names) else ""
        where = [f"layer {layer}"] * (layer is not None) + [f"expert {expert}{who}"] * (expert is not None)
        yield Text(printable(entry.name), style="bold")
        yield Text(f"  {_kind(entry)}, {human_bytes(entry.nbytes)} in {printable(entry.file)}")
        yield Text(f"  {', '.join([_role(found, entry), *where])}")
        if origin := found.origins.get(entry.name):
            yield Text(f"  = {printable(origin.expression, 2000)}", style="green")
            if tuple(f"{source}:{tensor}" for source, tensor in origin.reads) != (origin.expression,):
                yield from (Text(f"      {printable(source)}:{printable(tensor)}", style="dim") for source, tensor in origin.reads)
        if found.values and entry.name in found.values.tensors:
            yield Padding(_figures(found, [entry], terminal), (0, 0, 0, 2))


def _fates(found: Inspection) -> Iterator[RenderableType]:
    """What became of a source's tensors."""
    for record in found.where or []:
        yield Text(f"{printable(record['source'])}:{printable(record['tensor'])}", style="bold")
        for made in record["made"]:
            whole = made["expression"].removesuffix(f":{record['tensor']}") == record["source"]
            yield Text(f"  is {printable(made['name'])}" if whole else f"  in {printable(made['name'])}", style="green")
            if not whole:
                yield Text(f"     = {printable(made['expression'], 2000)}", style="dim")
        if not record["made"]:
            yield Text(f"  not read: {printable(str(record['unused'] or 'no tensor of the result needs it'), 2000)}", style="yellow")


# ---- costs -----------------------------------------------------------------------------------------------------------------


def _costs(found: Inspection) -> Iterator[RenderableType]:
    costs = {"this model" if not found.mixtures else "dense": found.cost, **found.mixtures}
    if found.cost.flops(found.context) is None:
        return
    aside = f"FLOPs: 2 per multiply-add, averaged over a prompt of {found.context} tokens"
    if found.mixtures:
        aside = f"merges of {found.experts} such models, FFN top {found.top_k}; prompt of {found.context} tokens"
    yield _heading("cost", aside)
    table = _grid("left", *["right"] * len(costs), header=("", *(COLUMNS.get(name, name) for name in costs)))
    for name, values in _cost_rows(costs, found.context):
        table.add_row(Text(name, style="" if name.startswith("  ") else "cyan"), *values)
    yield _padded(table)


def _cost_rows(costs: dict[str, Cost], context: int) -> Iterator[tuple[str, list[str]]]:
    cards = [cost.document(context) for cost in costs.values()]
    flops = [card["flops_per_token"] for card in cards]
    caches = [card["kv_cache_bytes_per_token"] or 0 for card in cards]
    if len(costs) > 1:
        yield "parameters", [_number(cost.parameters) for cost in costs.values()]
        yield "active per token", [_number(cost.active or 0) for cost in costs.values()]
        yield "bytes", [human_bytes(cost.nbytes) for cost in costs.values()]
    yield "KV cache per token", [f"{cache:,} B" if cache < 10**8 else human_bytes(cache) for cache in caches]
    if len(costs) > 1 and caches[0]:
        yield "  times dense", [f"{cache / caches[0]:.3g} x" for cache in caches]
    layers = next(iter(costs.values())).layers
    uneven = len({block["total"] for block in flops[0]["by_layer"]}) > 1
    yield f"FLOPs per block{' (mean)' if uneven else ''}", [_number(card["per_layer"]["total"]) for card in flops]
    columns = {"qkv": "QKV", "scores": "scores", "output": "output", "ffn": "FFN", "attention_router": "attention router", "ffn_router": "FFN router"}
    for key, name in columns.items():
        if any(card["per_layer"][key] for card in flops):
            yield f"  {name}", [_number(card["per_layer"][key]) for card in flops]
    yield f"FLOPs, {count(layers, 'block')} + head", [_number(card["total"]) for card in flops]
    yield "  decoding after it", [_number(card["decode"]["total"]) for card in flops]
    if len(costs) > 1:
        yield "  times dense", [f"{card['total'] / flops[0]['total']:.3g} x" for card in flops]


# ---- values ----------------------------------------------------------------------------------------------------------------


def _figures(found: Inspection, members: Sequence[TensorEntry], terminal: Terminal) -> Text:
    """The figures of one tensor, or of alike ones together, with their summed histograms (bins are in standard deviations)."""
    assert found.values
    stats = [found.values.tensors[entry.name] for entry in members]
    if all(item.finite is None for item in stats):
        return Text("values not computed for this dtype", style="dim")
    bins = [sum(column) for column in zip(*(item.histogram for item in stats if item.histogram), strict=True)]
    low = min((item.min for item in stats if item.min is not None), default=None)
    high = max((item.max for item in stats if item.max is not None), default=None)
    text = f"{_g(low)} to {_g(high)}, std {_span(item.std for item in stats)} "
    if len(members) == 1:
        text = f"{text.rstrip()}, mean {_g(stats[0].mean)}, norm {_g(stats[0].norm)}, {stats[0].zeros:,} zeros "
    return Text.assemble(text, (terminal.sparkline(bins), "cyan"))


def _values(found: Inspection, every: bool) -> Iterator[RenderableType]:
    assert found.values
    values = found.values
    odd = list(_oddities(found))
    yield _heading("values", f"{len(values.tensors):,} tensors read")
    yield from odd or [Text("  nothing odd: no NaN, infinity, -0.0, constant tensor, zero row, or value near its dtype's limit")]
    for group, copy, original in values.clones:
        yield _line(f"  {group} expert {copy} equals expert {original} in every tensor", "yellow")
    if values.duplicates:
        yield _line(f"  {count(len(values.duplicates), 'group')} of byte-identical tensors:", "yellow")
        for names in values.duplicates if every else values.duplicates[:5]:
            yield _line("    " + " = ".join(map(printable, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else ""))
        if not every and len(values.duplicates) > 5:
            yield _line(f"    and {len(values.duplicates) - 5:,} more groups (--all lists them)", "dim")
    if values.routers:
        yield _heading("routers", "on random inputs of unit root mean square; entropy as a share of log N")
        yield _padded(_routers(found, every))


def _oddities(found: Inspection) -> Iterator[Text]:
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
            yield _line(f"  {what}: {count(len(hit), 'tensor')}: {first}{more}", "yellow")


def _routers(found: Inspection, every: bool) -> Table:
    assert found.values
    groups: dict[tuple[object, ...], list[object]] = {}
    table = _grid("left", "left", "left", "left", "left", "left", "left", header=("router", "init", "std", "|cos|", "cond.", "entropy", "load"))
    routers = found.values.routers
    for router in routers:
        groups.setdefault((router.role, router.init, router.layer if every else None), []).append(router)
    for role, init, _ in groups:
        layer_of = [r for r in routers if r in groups[role, init, _]]
        layers = ranges([r.layer for r in layer_of if r.layer is not None])
        loads = [share for r in layer_of for share in r.load]
        table.add_row(
            f"{role} {layers}", str(init), _span(r.std for r in layer_of), f"<= {max(r.cosine for r in layer_of):.2g}",
            _span(r.condition for r in layer_of), _span(round(r.entropy, 3) for r in layer_of),
            ", ".join(f"{share:.0%}" for share in loads) if len(layer_of) == 1 and len(loads) <= 8 else f"{min(loads):.1%} to {max(loads):.1%}",
        )  # fmt: skip
    return table
