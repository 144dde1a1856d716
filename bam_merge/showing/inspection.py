"""How an inspection looks in a terminal. Builds text; cli.py prints it."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bam_merge.architectures.anatomy import alike
from bam_merge.architectures.cost import Cost
from bam_merge.architectures.vocabulary import LINEAR, LINEAR_SIZES
from bam_merge.inspecting.inspection import Inspection
from bam_merge.showing.tensors import details, fates, tensors, values_read
from bam_merge.showing.terminal import Terminal, grid, heading, line, padded
from bam_merge.text import count, human_bytes, number, printable, ranges

COLUMNS = {"expert_kv": "Expert-KV", "shared_kv": "Shared-KV", "btx": "BTX", "dense": "dense"}


BLOCK = {
    "qkv": "QKV", "scores": "scores", "output": "output", "ffn": "FFN", "attention_router": "attention router", "ffn_router": "FFN router",
}  # fmt: skip


def inspection_text(found: Inspection, terminal: Terminal, every: bool = False, zoomed: bool = False) -> str:
    """The whole picture; or, zoomed in, each tensor that was asked for with where it comes from; or what became of a source's."""
    parts: list[RenderableType] = []
    if found.where is not None:
        parts += fates(found)
    elif zoomed:
        parts += details(found, terminal) if found.shown else [Text("no tensor matches")]
    else:
        parts += [Text(printable(found.path), style="bold"), padded(_facts(found)), heading("parameters", "by role")]
        parts += [padded(_roles(found, terminal)), *tensors(found, terminal, every), *_costs(found)]
    if found.values and found.shown:
        parts += values_read(found, every or zoomed)
    if found.findings and found.where is None:
        parts += [heading("findings"), *(line(printable(text, 2000), "yellow") for text in found.findings)]
    return terminal.text(*parts)


# ---- what it is ------------------------------------------------------------------------------------------------------------


def _facts(found: Inspection) -> Table:
    table = grid("left", "left")
    for name, value in _rows(found):
        table.add_row(Text(name, style="cyan"), Text(value))
    return table


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    facts, cost = found.anatomy.facts, found.cost
    yield "model", _identity(found)
    if found.anatomy.architecture:
        yield "blocks", _blocks(found)
    if facts:
        yield "attention", _attention(found)
    if facts and (linear := _linear(found)):
        yield "linear", linear
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
        sources = dict.fromkeys(source for origin in found.origins.values() for source, _ in origin.reads)
        yield "made of", f"{', '.join(map(printable, sources))} (--tensors and --where say how)"


def _identity(found: Inspection) -> str:
    anatomy = found.anatomy
    if anatomy.architecture is None:
        model_type = found.checkpoint.config.get("model_type")
        return f"unknown architecture (model_type {printable(repr(model_type), 60)}); names and sizes only"
    name = anatomy.architecture.name
    if anatomy.guessed:
        return f"no config.json; tensor names of {', '.join(table.name for table in alike(found.checkpoint.tensors)) or name}"
    if anatomy.wrapper is not None:
        return f"{name}, the text model of {anatomy.wrapper.name}"
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
        text += (
            f", {kind}; width {facts['hidden_size']:,}, FFN {facts['intermediate_size']:,} ({gated}{printable(str(facts['hidden_act']))})"
        )
        text += "".join(f"; {words}" for words in _factors(facts))
    dense = [layer for layer, block in enumerate(found.cost.blocks) if "router.ffn" not in block]
    if found.expert_count("ffn") and dense:
        text += f"; layer{'s' if len(dense) > 1 else ''} {ranges(dense)} without experts"
    return text


def _factors(facts: Mapping[str, Any]) -> Iterator[str]:
    """What most families have not: other places of norms, norms whose weights are stored as what is missing, factors."""
    if facts.get("post_norms"):
        before = "before and " if facts.get("pre_norms", True) else ""
        yield f"norms {before}after attention and FFN"
    if not facts.get("norm_weights", True):
        yield "norms without weights"
    if facts.get("norm_offset"):
        yield f"norms of {facts['norm_offset']} + w"
    if facts.get("layer_scale"):
        yield "layers x a stored number"
    for key, what in (("embedding_scale", "embeddings"), ("residual_scale", "residual branches"), ("logit_scale", "logits")):
        if isinstance(facts.get(key), int | float):
            yield f"{what} x {facts[key]:.4g}"
    if isinstance(facts.get("logit_softcap"), int | float):
        yield f"logits capped at {facts['logit_softcap']:.4g}"


def _attention(found: Inspection) -> str:
    facts = found.anatomy.facts
    latent = next((leaf.shape[0] for (role, _, _), leaf in found.anatomy.leaves.items() if role == "attn.kv_a"), None)
    if latent:
        return f"{facts['num_attention_heads']} heads over a latent vector of {latent}"
    heads, kv = facts["num_attention_heads"], facts["num_key_value_heads"]
    text = f"{count(heads, 'head')} of {facts['head_dim']}" + (f", {kv} for keys and values" if kv != heads else "")
    for kind, sizes in (facts.get("sizes_by_kind") or {}).items():
        own = {**facts, **sizes}
        where = "with" if kind == "sliding_attention" else "without"
        text += f" ({where} a window {own['num_attention_heads']} of {own['head_dim']}, {own['num_key_value_heads']} for keys and values"
        text += f", FFN {own['intermediate_size']:,})" if own["intermediate_size"] != facts["intermediate_size"] else ")"
    together = " over all heads" if facts.get("qk_norm_shape") == "all heads" else ""
    traits = [f"q, k and v within {facts['attention_clip']:g}"] if isinstance(facts.get("attention_clip"), int | float) else []
    named = (("qk_norm", f"q and k normed{together}"), ("attention_gate", "gated"), ("attention_bias", "biases"))
    traits += [name for key, name in named if facts.get(key)]
    traits += ["values normed"] if facts.get("value_norm") else []
    traits += ["values are keys in layers without a window"] if facts.get("values_are_keys") else []
    rope = facts.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float):
        kind = rope.get("rope_type", "default")
        traits.append(f"rotary{'' if kind == 'default' else ' ' + printable(str(kind), 20)}, theta {rope['rope_theta']:,.0f}")
    local = facts.get("sliding_rope_parameters")
    if isinstance(local, dict) and isinstance(local.get("rope_theta"), int | float):
        traits[-1] += f" ({local['rope_theta']:,.0f} in layers with a window)"
    if isinstance(facts.get("rope_layers"), list):
        traits[-1:] = [f"{traits[-1]} in {len(facts['rope_layers'])} of {facts['num_hidden_layers']} layers"]
    if isinstance(facts.get("attention_scale"), int | float):
        traits.append(f"scores x {facts['attention_scale']:.4g}")
    if isinstance(facts.get("attention_softcap"), int | float):
        traits.append(f"scores capped at {facts['attention_softcap']:.4g}")
    if facts.get("sliding_window"):
        traits.append(f"window {facts['sliding_window']}")
    return ", ".join((text, *traits))


def _linear(found: Inspection) -> str:
    """The layers that have a gated delta net in the place of attention, and its sizes."""
    facts = found.anatomy.facts
    layers = [layer for layer, kind in enumerate(facts.get("layer_types") or ()) if kind == LINEAR]
    if not layers or not all(isinstance(facts.get(key), int) for key in LINEAR_SIZES):
        return ""
    key_heads, heads, key, value, width = (facts[key] for key in LINEAR_SIZES)
    where = f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"
    of_keys = f", {key_heads} heads for queries and keys" if key_heads != heads else ""
    return f"gated delta nets in {where}: {count(heads, 'state')} of {key} x {value}{of_keys}, convolution over {count(width, 'token')}"


MANY = 6
"""Experts of one source that are counted, and not listed, where there are more."""


def _experts(found: Inspection) -> str:
    facts, ffn, attention = found.anatomy.facts, found.expert_count("ffn"), found.expert_count("attn")
    lines = []
    if found.expert_names and ffn:
        names = found.expert_names
        alike = len(names) > MANY and len(set(names)) == 1
        lines.append(f"{len(names)} of {printable(names[0])}" if alike else ", ".join(map(printable, names)))
    if ffn:
        sums = facts.get("norm_topk_prob")
        gate = {True: ", gates sum to one", False: ", gates of the softmax over all"}.get(sums, "") if isinstance(sums, bool) else ""
        if facts.get("scoring_func") == "sigmoid":
            gate = ", gates of sigmoids" + (" that sum to one" if sums else "")
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
        if facts.get("attention_linear"):
            kv += ", linear attention " + ("per expert" if facts["attention_linear"] == "expert" else "shared")
        lines.append(f"attention: {attention}, {routing if facts else 'routing not known'}{', ' + kv if facts else ''}")
    return "\n".join(lines)


def _roles(found: Inspection, terminal: Terminal) -> Table:
    roles, active = sorted(found.cost.by_role.items(), key=lambda item: -item[1]), found.cost.active_by_role
    sparse = active is not None and found.cost.active != found.cost.parameters
    table = grid("left", "right", "right", *["right"] * sparse, "left", header=("", "total", "share", "active", "") if sparse else None)
    for role, parameters in roles:
        share = parameters / max(1, found.cost.parameters)
        used = [f"{active.get(role, 0):,}"] if sparse and active is not None else []
        table.add_row(Text(role), f"{parameters:,}", f"{share:.1%}", *used, Text(terminal.bar(share, 30), style="cyan"))
    return table


# ---- costs -----------------------------------------------------------------------------------------------------------------


def _costs(found: Inspection) -> Iterator[RenderableType]:
    costs = {"this model" if not found.mixtures else "dense": found.cost, **found.mixtures}
    if found.cost.flops(found.context) is None:
        return
    aside = f"FLOPs: 2 per multiply-add, averaged over a prompt of {found.context} tokens"
    if found.mixtures:
        shards = f" of {found.shards} shards each" if found.shards > 1 else ""
        shared = " and one of every token" if found.shared_expert else ""
        aside = f"merges of {found.experts} such models, FFN{shards} top {found.top_k}{shared}; prompt of {found.context} tokens"
    yield heading("cost", aside)
    table = grid("left", *["right"] * len(costs), header=("", *(COLUMNS.get(name, name) for name in costs)))
    for name, values in _cost_rows(costs, found.context):
        table.add_row(Text(name, style="" if name.startswith("  ") else "cyan"), *values)
    yield padded(table)


def _cost_rows(costs: dict[str, Cost], context: int) -> Iterator[tuple[str, list[str]]]:
    cards = [cost.document(context) for cost in costs.values()]
    flops = [card["flops_per_token"] for card in cards]
    caches = [card["kv_cache_bytes_per_token"] or 0 for card in cards]
    if len(costs) > 1:
        yield "parameters", [number(cost.parameters) for cost in costs.values()]
        yield "active per token", [number(cost.active or 0) for cost in costs.values()]
        yield "bytes", [human_bytes(cost.nbytes) for cost in costs.values()]
    if any(cost.state_bytes for cost in costs.values()):
        yield "states per sequence", [human_bytes(cost.state_bytes) for cost in costs.values()]
    yield "KV cache per token", [f"{cache:,} B" if cache < 10**8 else human_bytes(cache) for cache in caches]
    if len(costs) > 1 and caches[0]:
        yield "  times dense", [f"{cache / caches[0]:.3g} x" for cache in caches]
    layers = next(iter(costs.values())).layers
    uneven = len({block["total"] for block in flops[0]["by_layer"]}) > 1
    yield f"FLOPs per block{' (mean)' if uneven else ''}", [number(card["per_layer"]["total"]) for card in flops]
    for key, name in BLOCK.items():
        if any(card["per_layer"][key] for card in flops):
            yield f"  {name}", [number(card["per_layer"][key]) for card in flops]
    yield f"FLOPs, {count(layers, 'block')} + head", [number(card["total"]) for card in flops]
    yield "  decoding after it", [number(card["decode"]["total"]) for card in flops]
    if len(costs) > 1:
        yield "  times dense", [f"{card['total'] / flops[0]['total']:.3g} x" for card in flops]
