"""What a model costs: parameters, bytes, key-value cache and FLOPs per token, from the shapes of its tensors by role."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from bam_merge.architectures.anatomy import Anatomy
from bam_merge.architectures.flops import CONVOLUTIONS, Flops, Piece, block_flops, numbers_of_state, seen_twice
from bam_merge.architectures.locate import Place, applies, cut, in_order, shape_of
from bam_merge.architectures.quantisation import Quantisation, is_packed, logical_shape, weights_in
from bam_merge.architectures.tables import Architecture, at_layer
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_BITS
from bam_merge.checkpoints.pieces import Read, stored
from bam_merge.errors import CheckpointError

CONTEXT = 256
"""Tokens of the prompt in the paper's tables."""


Kind = Literal["expert_kv", "shared_kv", "btx"]


@dataclass(frozen=True)
class Cost:
    """A model as the pieces that it is made of. `windows` holds each layer's sliding window; `tied`: the embeddings are the head;
    `key_channels` are those of a key of linear attention."""

    pieces: tuple[Piece, ...]
    windows: tuple[int | None, ...]
    tied: bool
    unexplained: int = 0
    key_channels: int = 0

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def parameters(self) -> int:
        return sum(piece.copies * piece.size for piece in self.pieces) + self.unexplained

    @property
    def active(self) -> int | None:
        """Parameters that one token's forward multiplies with; None where the routing is not known."""
        inside = [piece for piece in self.pieces if piece.layer is None or piece.layer < self.layers]
        return (
            None if not inside or any(piece.used is None for piece in inside) else sum((piece.used or 0) * piece.size for piece in inside)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the explained tensors."""
        return sum(piece.copies * piece.size * DTYPE_BITS[piece.dtype] // 8 for piece in self.pieces)

    @property
    def by_role(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for piece in self.pieces:
            counts[piece.role] += piece.copies * piece.size
        return {**counts, **({"unknown": self.unexplained} if self.unexplained else {})}

    @property
    def active_by_role(self) -> dict[str, int] | None:
        """Of every role, the parameters that one token's forward multiplies with; None where the routing is not known."""
        if self.active is None:
            return None
        counts: Counter[str] = Counter()
        for piece in self.pieces:
            if piece.layer is None or piece.layer < self.layers:
                counts[piece.role] += (piece.used or 0) * piece.size
        return dict(counts)

    @cached_property
    def blocks(self) -> tuple[dict[str, list[Piece]], ...]:
        """The pieces of every layer, by role: expert tensors and a shared one may stand under the same role."""
        blocks: tuple[dict[str, list[Piece]], ...] = tuple({} for _ in range(self.layers))
        for piece in self.pieces:
            if piece.layer is not None and piece.layer < self.layers:
                blocks[piece.layer].setdefault(piece.role, []).append(piece)
        return blocks

    @property
    def kv_cache_bytes_per_token(self) -> int | None:
        """Bytes that one token adds to the cache: keys and values of every attention expert in every layer (or the one latent vector)."""
        total = 0
        for block in self.blocks:
            if "linear.o" in block:
                continue
            values = "attn.v" if "attn.v" in block else "attn.k"  # which are values as well, where these have no projection
            cached = [piece for role in ("attn.kv_a", "attn.k", values) for piece in block.get(role, [])]
            if not cached:
                return None
            total += sum(piece.copies * piece.shape[0] * _cache_bytes(piece.dtype) for piece in cached)
        return total or None

    @property
    def state_bytes(self) -> int:
        """Bytes that a sequence of any length takes in layers with linear attention, of all their experts: states in float32, and what the
        convolutions see, as the weights are stored."""
        total = 0
        for block in self.blocks:
            seen = [piece for role in CONVOLUTIONS for piece in block.get(role, [])]
            total += sum(piece.copies * piece.size * _cache_bytes(piece.dtype) for piece in seen)
            total += 4 * sum(piece.copies * numbers_of_state(block, piece, self.key_channels) for piece in block.get("linear.A_log", []))
        return total

    def flops(self, context: int = CONTEXT, decode: bool = False) -> list[Flops] | None:
        """FLOPs per token of every block: averaged over a prompt of `context` tokens, or decoding after it. None where not known."""
        if self.active is None or not self.blocks or not all("attn.o" in block or "linear.o" in block for block in self.blocks):
            return None
        seen = [seen_twice(context, window, decode) for window in self.windows]
        return [block_flops(block, times, self.key_channels) for block, times in zip(self.blocks, seen, strict=True)]

    @property
    def head_flops(self) -> int:
        return sum(2 * piece.size for piece in self.pieces if piece.role == ("embed" if self.tied else "head") and piece.layer is None)

    def document(self, context: int = CONTEXT) -> dict[str, Any]:
        """The cost card, as `inspect --json` prints it."""
        return {
            "parameters": {
                "total": self.parameters,
                "active": self.active,
                "by_role": self.by_role,
                "active_by_role": self.active_by_role,
            },
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
            **({"state_bytes_per_sequence": self.state_bytes} if self.state_bytes else {}),
            "flops_per_token": self._flops_document(context),
        }

    def _flops_document(self, context: int) -> dict[str, Any] | None:
        blocks, decoded = self.flops(context), self.flops(context, decode=True)
        if blocks is None or decoded is None:
            return None
        whole, later = sum(blocks, Flops()), sum(decoded, Flops())
        mean = {name: _exact(value, len(blocks)) for name, value in whole.document().items()}
        return {
            "context": context,
            "attention": whole.attention, "ffn": whole.ffn, "router": whole.router, "head": self.head_flops,
            "total": whole.total + self.head_flops,
            "decode": {"attention": later.attention, "total": later.total + self.head_flops},
            "per_layer": mean,
            "by_layer": [block.document() for block in blocks],
        }  # fmt: skip


def cost_of(anatomy: Anatomy) -> Cost:
    """The cost of what a checkpoint holds, as it is stored."""
    facts = anatomy.facts
    if anatomy.quantised is not None:
        return _cost_of_quantised(anatomy, anatomy.quantised)
    kept = [name for name in anatomy.checkpoint.tensors if name not in anatomy.dropped]
    tied = not facts["untied"] if facts else not any(role == "head" for role, _, _ in anatomy.leaves)
    cost = cost_of_tensors(((place, leaf.shape, leaf.dtype) for place, leaf in anatomy.leaves.items()), facts, tied)
    explained = set(anatomy.places)
    unexplained = sum(anatomy.checkpoint.tensors[name].numel for name in kept if name not in explained)
    return replace(cost, pieces=() if anatomy.architecture is None else cost.pieces, unexplained=unexplained)


def _cost_of_quantised(anatomy: Anatomy, quantised: Quantisation) -> Cost:
    """The cost of the model that quantised weights stand for: of a dense one as config.json gives it, of another by what is stored.

    What stands beside weights (scales, zero points, ...) is no parameter. A matrix whose shape is not known is counted, and no more.
    """
    facts, architecture, tensors = anatomy.facts, anatomy.architecture, anatomy.checkpoint.tensors
    unexplained = sum(weights_in(tensors[name], quantised) for name in anatomy.unknown)
    if architecture is None:
        return Cost((), (), False, sum(weights_in(entry, quantised) for entry in tensors.values()))
    tied = not facts["untied"] if facts else not any(role == "head" for role, _, _ in anatomy.leaves)
    if architecture.kind == "dense" and facts:
        return replace(cost_of_tensors(_by_config(architecture, facts), facts, tied), unexplained=unexplained)
    known: list[tuple[Place, tuple[int, ...], str]] = []
    for place, leaf in anatomy.leaves.items():
        entry = tensors[stored(leaf).tensor]
        what = anatomy.beside.get(entry.name, "")
        if what and not is_packed(entry, what, quantised) and what != "weight":
            continue
        shape = logical_shape(entry, what, quantised) if what else leaf.shape
        if shape is None:
            unexplained += weights_in(entry, quantised)
        else:
            known.append((place, shape, entry.dtype if entry.dtype in ARITHMETIC_DTYPES else "BF16"))
    return replace(cost_of_tensors(known, facts, tied), unexplained=unexplained)


def _by_config(family: Architecture, facts: Mapping[str, Any]) -> Iterator[tuple[Place, tuple[int, ...], str]]:
    """(place, shape, dtype) of every tensor that a dense model with these facts has in 16 bits."""
    for cell in in_order(family, facts["num_hidden_layers"]):
        if applies(cell, facts):
            own = at_layer(facts, cell.layer)
            pieces = cut(cell.row, Read("", cell.names[0], "BF16", shape_of(cell.row, own)), own) or {}
            yield from (((role, cell.layer, None), leaf.shape, leaf.dtype) for role, leaf in pieces.items())


def cost_of_tensors(tensors: Iterable[tuple[Place, tuple[int, ...], str]], facts: Mapping[str, Any], tied: bool) -> Cost:
    """The cost of (place, shape, dtype) of every tensor of a model that `facts` describe. `tied`: the embeddings are the head."""
    grouped: dict[tuple[str, int | None, bool], list[tuple[tuple[int, ...], str]]] = {}
    for (role, layer, expert), shape, dtype in tensors:
        grouped.setdefault((role, layer, expert is not None), []).append((shape, dtype))
    pieces = tuple(
        Piece(role, layer, shape, dtype, count, _used(role, count, facts, split), split)
        for (role, layer, split), members in grouped.items()
        for (shape, dtype), count in Counter(members).items()
    )
    stored_layers = 1 + max((layer for _, layer, _ in grouped if layer is not None), default=-1)
    layers = facts.get("num_hidden_layers", stored_layers)
    channels = facts.get("linear_key_head_dim")
    windows = tuple(_window(facts, layer) for layer in range(layers))
    return Cost(pieces, windows, tied, key_channels=channels if type(channels) is int else 0)


def as_mixture(dense: Cost, experts: int, kind: Kind, top_k: int = 1, shards: int = 1, shared: bool = False) -> Cost:
    """What a merge of `experts` such dense models would cost: method bam with kv: expert or shared, or btx; top_k FFN experts. With
    `shards` every FFN is so many experts, and top_k is of these; with `shared` one more FFN is every token's.

    Raises CheckpointError when the model is a mixture already, or its attention is not known by role.
    """
    if any(piece.per_expert for piece in dense.pieces) or any(piece.role.startswith("router.") for piece in dense.pieces):
        raise CheckpointError("--as-bam: this is a mixture already; give one of the dense models.")
    whole = ({"attn.q", "attn.k", "attn.o", "ffn.up"}, {"linear.q", "linear.o", "ffn.up"})
    if not all(any(roles <= set(block) for roles in whole) for block in dense.blocks) or not dense.blocks:
        raise CheckpointError("--as-bam: needs a dense model whose attention and FFN are known by role.")
    embed = next((piece for piece in dense.pieces if piece.role == "embed"), None)
    if embed is None or len(embed.shape) != 2:
        raise CheckpointError("--as-bam: needs the embeddings, which say how wide a router is.")
    if not 1 <= top_k <= experts * shards:
        raise CheckpointError(f"--top-k is {top_k}, expected 1 to the number of experts, {experts * shards}.")
    widths = {piece.shape[0] for piece in dense.pieces if piece.role == "ffn.up"}
    if any(width % shards for width in widths):
        raise CheckpointError(f"--shards is {shards}, and an FFN of {max(widths)} units does not go into that many. Use a divisor.")
    averaged = {"shared_kv": ("attn.k", "attn.v"), "btx": ("attn.", "linear."), "expert_kv": ()}[kind]
    pieces = []
    for piece in dense.pieces:
        if piece.role.startswith("ffn."):
            if shared:
                pieces.append(replace(piece, role=f"ffn.shared.{piece.role.removeprefix('ffn.')}"))
            piece = replace(piece, shape=_shard(piece, shards), copies=experts * shards, used=top_k, per_expert=True)
        elif piece.role.startswith(("attn.", "linear.")) and not piece.role.startswith(averaged):
            piece = replace(piece, copies=experts, used=experts, per_expert=True)
        pieces.append(piece)
    for layer in range(dense.layers):
        for role in ("router.ffn", *(() if kind == "btx" else ("router.attn",))):
            count = experts * shards if role == "router.ffn" else experts
            pieces.append(Piece(role, layer, (count, embed.shape[1]), embed.dtype))
        if shared:
            pieces.append(Piece("ffn.shared.router", layer, (1, embed.shape[1]), embed.dtype))
    return replace(dense, pieces=tuple(pieces))


def _shard(piece: Piece, shards: int) -> tuple[int, ...]:
    """The shape of one of so many shards of an FFN's tensor: its rows, of the last matrix its columns; the last bias is whole."""
    if piece.role == "ffn.down":
        return (piece.shape[0], piece.shape[1] // shards)
    return piece.shape if piece.role == "ffn.down.bias" else (piece.shape[0] // shards, *piece.shape[1:])


def _used(role: str, count: int, facts: Mapping[str, Any], split: bool) -> int | None:
    """Of `count` expert tensors, those that a token goes through."""
    if not split:
        return 1
    if role.startswith("ffn."):
        top_k = facts.get("num_experts_per_tok")
    elif facts.get("attention_routing") == "top_k":
        top_k = facts.get("num_attention_experts_per_tok")
    else:
        return count if facts else None
    return min(top_k, count) if type(top_k) is int and top_k > 0 else None


def _window(facts: Mapping[str, Any], layer: int) -> int | None:
    """The sliding window of a layer; a layer that slides by no known window sees everything."""
    window, types = facts.get("sliding_window"), facts.get("layer_types")
    slides = not isinstance(types, list) or (layer < len(types) and types[layer] == "sliding_attention")
    return window if type(window) is int and window > 0 and slides else None


def _cache_bytes(dtype: str) -> int:
    """Of one number of a key or value: cached as the weights are stored where that is computed with; for others 16 bits are taken."""
    return DTYPE_BITS[dtype] // 8 if dtype in ARITHMETIC_DTYPES else 2


def _exact(total: int, count: int) -> int | float:
    """total / count, as an integer where it is one."""
    return total // count if total % count == 0 else total / count
