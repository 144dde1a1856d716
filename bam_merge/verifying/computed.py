"""Does the mixture compute what it should? Hidden states go through one block at a time; no model is ever held whole.

Every check compares the reference model of the merged folder with the reference models of its dense sources, layer by layer, on the
same input: an error is found in the layer that makes it. (docs/explanation/step-0.md.)
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bam_merge.model.loading import StoredModel
from bam_merge.model.model import Block, FfnMixture
from bam_merge.model.positions import Cache
from bam_merge.planning.plan import Plan
from bam_merge.recipe.schema import Ffn, Recipe
from bam_merge.text import some
from bam_merge.verifying.decodable import decodable, first_part
from bam_merge.verifying.report import Check, Report

TOLERANCE = 1e-5
"""Largest difference of hidden states or logits, relative to their root mean square, that float32 arithmetic may cause."""


DEGENERATE_SHARE = 0.9
"""A router that sends this share of tokens to one expert is named."""


@dataclass
class Worst:
    """The largest of several measurements, and every place where one was beyond the tolerance."""

    name: str
    tolerance: float
    value: float = 0.0
    places: list[str] = field(default_factory=list)

    def add(self, value: float, place: str) -> None:
        value = value if value == value else float("inf")
        self.value = max(self.value, value)
        if value > self.tolerance:
            self.places.append(f"{place} ({value:.3g})")

    def check(self, passed: str) -> Check:
        return Check(self.name, not self.places, some(self.places, 6) if self.places else passed, self.value, self.tolerance)


def difference(a: Tensor, b: Tensor, carried: Tensor | None = None) -> float:
    """Largest absolute difference, relative to the root mean square of `b`, or to a tenth of its largest element where that is more:
    the rounding of one huge channel reaches all others through the products it stands in.

    What a block adds to the residual stream is known only to the rounding of the sum `carried`, whose few huge channels in real models
    (arXiv 2402.17762) would otherwise look like errors of the block: four roundings of each element are not counted.
    """
    scale = torch.maximum(b.square().mean().sqrt(), b.abs().max() / 10).clamp(min=1e-12)
    error = (a - b).abs()
    if carried is not None:
        error = (error - carried.abs() * 2 * torch.finfo(carried.dtype).eps).clamp(min=0).where(torch.isfinite(error), error)
    return float(error.max() / scale)


def positions_of(x_BTD: Tensor) -> Tensor:
    return torch.arange(x_BTD.shape[1]).expand(x_BTD.shape[:2])


# ---- the mixture against its dense models ----------------------------------------------------------------------------------


def with_expert(mixture: Block, dense: Block, j: int) -> Block:
    """The mixture's block with all that its experts share taken from the dense model j: norms, and what of attention is shared.

    With the gates forced to expert j this must be the dense block.
    """
    block = copy.copy(mixture)
    block._modules = dict(mixture._modules)
    block.input_layernorm = _with_weights(mixture.input_layernorm, dense.input_layernorm)
    if mixture.post_attention_layernorm is not None and dense.post_attention_layernorm is not None:
        block.post_attention_layernorm = _with_weights(mixture.post_attention_layernorm, dense.post_attention_layernorm)
    if not len(mixture.self_attn.experts):
        block.self_attn = dense.self_attn
    elif mixture.self_attn.shares_kv:
        attention = copy.copy(mixture.self_attn)
        attention._modules = {**mixture.self_attn._modules}
        for name in ("k_proj", "v_proj", "k_norm"):
            setattr(attention, name, getattr(dense.self_attn, name))
        block.self_attn = attention
    return block


def _with_weights(module: Any, other: nn.Module) -> Any:
    """`module`, computing as its own configuration says, with the weights of `other`."""
    result = copy.copy(module)
    result._parameters = dict(other._parameters)
    return result


def _blame(mixture: Block, dense: Block, j: int, x_BTD: Tensor, expected: Tensor, tolerance: float) -> str:
    """Which half of expert j is wrong: the one whose replacement by the dense model's mends the block."""

    def mended(attention: bool, ffn: bool) -> bool:
        block = with_expert(mixture, dense, j)
        if attention:
            block.self_attn = _as_expert(block.self_attn, dense.self_attn, j)
        if ffn and isinstance(block.mlp, FfnMixture):
            block.mlp = _as_expert(block.mlp, dense.mlp, j)
        return difference(block(x_BTD, positions_of(x_BTD), force_expert=j).hidden, expected) <= tolerance

    if mended(attention=False, ffn=True):
        return "FFN"
    if mended(attention=True, ffn=False):
        return "attention"
    return "attention and FFN" if mended(attention=True, ffn=True) else "the block's configuration or wiring"


def _as_expert(mixture: nn.Module, dense: nn.Module, j: int) -> Any:
    """A copy of a mixture whose expert j computes with the dense module's weights."""
    result = copy.copy(mixture)
    result._modules = dict(mixture._modules)
    experts = result._modules.get("experts")
    if not isinstance(experts, nn.ModuleList) or not len(experts):
        return dense
    expert = copy.copy(experts[j])
    expert._modules = {name: getattr(dense, name, module) for name, module in expert._modules.items()}
    result._modules["experts"] = nn.ModuleList([expert if i == j else other for i, other in enumerate(experts)])
    return result


@torch.no_grad()
def against_dense(mixture: StoredModel, dense: dict[str, StoredModel], plan: Plan, ids_BT: Tensor) -> Iterator[Check]:
    """Expert isolation and identity, block by block. Every dense model's hidden states advance by its own blocks.

    A layer that is off in float32 is measured again in float64, which tells an error from the rounding of a large model.
    """
    names, seed = plan.recipe.expert_names, plan.recipe.seed_name
    tolerance = TOLERANCE
    isolation, identity = Worst("expert isolation", tolerance), Worst("identity", tolerance)
    factors: list[float] = []
    x = {name: dense[name].embed(ids_BT) for name in dict.fromkeys((*names, seed))}
    for layer in range(mixture.config.num_hidden_layers):
        for dtype in (torch.float32, torch.float64):
            found = _layer(mixture, dense, plan, layer, {name: x_BTD.to(dtype) for name, x_BTD in x.items()}, tolerance)
            if all(error <= tolerance for error, _ in (*found.isolation, found.identity)):
                break
        for error, place in found.isolation:
            isolation.add(error, place)
        identity.add(*found.identity)
        factors.append(found.factor)
        x = {name: x_BTD.float() for name, x_BTD in found.hidden.items()}
    yield isolation.check(f"every expert of {len(names)} is its dense model in every layer")
    scale = sum(factors) / len(factors)
    meaning = (
        "the dense model exactly" if abs(scale - 1) < 1e-6 else f"its attention exactly, its FFN times {scale:.4f} (the chosen gates' sum)"
    )
    yield identity.check(f"copies of {seed} under these routers are {meaning}")


class LayerErrors(NamedTuple):
    """What one layer showed: (error, place) of every expert and of the seed's identity, the mean factor of its FFN, and the dense models'
    hidden states [B, T, D] after the layer."""

    isolation: list[tuple[float, str]]
    identity: tuple[float, str]
    factor: float
    hidden: dict[str, Tensor]


def _layer(
    mixture: StoredModel, dense: dict[str, StoredModel], plan: Plan, layer: int, x: dict[str, Tensor], tolerance: float
) -> LayerErrors:
    """Run `layer` on the dense models' hidden states `x`, in their dtype, one dense block in memory at a time."""
    names, seed = plan.recipe.expert_names, plan.recipe.seed_name
    block = mixture.block(layer, x[seed].dtype)
    isolation, hidden = [], {}
    for name, x_BTD in x.items():
        own, positions = dense[name].block(layer, x_BTD.dtype), positions_of(x_BTD)
        hidden[name] = expected = own(x_BTD, positions).hidden
        for j in (j for j, expert in enumerate(names) if expert == name):
            got = with_expert(block, own, j)(x_BTD, positions, force_expert=j).hidden
            error = difference(got - x_BTD, expected - x_BTD, expected)
            wrong = error > tolerance or error != error
            blame = f": {_blame(block, own, j, x_BTD, expected, tolerance)}" if wrong else ""
            isolation.append((error, f"layer {layer}, expert {j} ({name}){blame}"))
        if name == seed:
            of_copies, factor = _identity(block, own, x_BTD, plan.recipe)
        del own  # before the next one is read
    return LayerErrors(isolation, (of_copies, f"layer {layer}"), factor, hidden)


def _identity(mixture: Block, dense: Block, x_BTD: Tensor, recipe: Recipe) -> tuple[float, float]:
    """With every expert the seed's, attention must be the seed's, the FFN times the sum of the gates that `recipe` asks for. (error,
    that factor's mean)"""
    block = with_expert(mixture, dense, 0)
    for j in range(len(mixture.self_attn.experts)):
        block.self_attn = _as_expert(block.self_attn, dense.self_attn, j)
    assert isinstance(mixture.mlp, FfnMixture)
    for j in range(len(mixture.mlp.experts)):
        block.mlp = _as_expert(block.mlp, dense.mlp, j)
    positions = positions_of(x_BTD)
    normed = dense.input_layernorm(x_BTD)
    attention = dense.self_attn(normed, positions, Cache(), None)[0]
    if dense.post_attention_layernorm is not None:
        normed = dense.post_attention_layernorm(x_BTD if dense.parallel else x_BTD + attention)
    factor_BT1 = _gate_sum(mixture.mlp.router(normed), recipe)
    out = block(x_BTD, positions).hidden
    return difference(out - x_BTD, attention + factor_BT1 * dense.mlp(normed), out), float(factor_BT1.mean())


def _gate_sum(logits_BTN: Tensor, recipe: Recipe) -> Tensor:
    """What equal FFN experts are multiplied with [B, T, 1], by the recipe alone: gate_scale, times the sum of the k largest of
    softmax(logits) where they are not renormalised."""
    top_k, renormalised = recipe.gates
    p_BTN = logits_BTN.softmax(-1)
    sum_BT1 = torch.ones_like(p_BTN[..., :1]) if renormalised else p_BTN.topk(top_k).values.sum(-1, keepdim=True)
    return sum_BT1 * (recipe.ffn or Ffn()).gate_scale


# ---- the mixture as it is --------------------------------------------------------------------------------------------------


@torch.no_grad()
def as_it_is(mixture: StoredModel, ids_BT: Tensor, report: Report, sample: str) -> Iterator[Check]:
    """Finite logits; no token sees a later one, another sequence of the batch, or padding; cached decoding is the full forward.

    Where float32 leaves a doubt, float64 decides: rounding can send a token to another expert. Not whether logits are finite: engines
    compute in no more than float32.
    """
    finite: list[Check] = []
    for dtype in (torch.float32, torch.float64):
        checks, routing = _probe(mixture, ids_BT, dtype)
        finite.append(checks[0])
        if all(check.ok is not False for check in checks):
            break
    report.routing += routing
    yield finite[0]
    yield from checks[1:]
    yield _router_check(routing, sample)


def _probe(mixture: StoredModel, ids_BT: Tensor, dtype: torch.dtype) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks, and what every router did.

    All probes go through the blocks together: the batch, the batch with its last third changed, each of its sequences alone, the first
    sequence padded on the left, and the batch, or as much of it as a cache can decode, at once and in two cached parts.
    """
    T = ids_BT.shape[1]
    cut, pad, span = first_part(T), 3, decodable(mixture.config, T)
    changed_BT = ids_BT.clone()
    changed_BT[:, cut:] = (changed_BT[:, cut:] + 1) % mixture.config.vocab_size
    padded_1T = torch.cat((torch.zeros(1, pad, dtype=torch.long), ids_BT[:1]), 1)
    padded = torch.cat((torch.full((1, pad), -1), torch.arange(T)[None]), 1)
    x, later, alone, left = (mixture.embed(ids, dtype) for ids in (ids_BT, changed_BT, ids_BT[:1], padded_1T))
    routing = []
    whole, cache, cuts = positions_of(x), Cache(), ((0, first_part(span)), (first_part(span), span)) if span else ()
    parts, at_once = [x[:, a:b] for a, b in cuts], x[:, :span]
    for layer in range(mixture.config.num_hidden_layers):
        block = mixture.block(layer, dtype)
        with _router_logits(block) as logits_of:
            out = block(x, whole)
        for router, gates_BTN in (("attention", out.attention_gates), ("ffn", out.ffn_gates)):
            if gates_BTN is not None:
                routing.append(_routing(layer, router, gates_BTN, logits_of[router]))
        later, alone = block(later, whole).hidden, block(alone, whole[:1]).hidden
        left = block(left, padded).hidden
        parts = [block(part, whole[:, a:b], cache).hidden for part, (a, b) in zip(parts, cuts, strict=True)]
        at_once = block(at_once, whole[:, :span]).hidden if 0 < span < T else out.hidden
        x = out.hidden
        del block  # before the next one is read: one at a time is what memory is bounded by
    logits = mixture.head(x, dtype)
    bad = int((~torch.isfinite(logits)).sum())
    checks = [Check("finite logits", bad == 0, f"{bad} of {logits.numel()} logits are NaN or infinite" if bad else "", float(bad), 0.0)]
    checks.append(_same("causality", mixture.head(later, dtype)[:, :cut], logits[:, :cut], "a later token changes nothing before it"))
    scaled = f"{mixture.config.rope_parameters['rope_type']} scaling changes the frequencies of longer sequences"
    if span:
        expected = mixture.head(at_once, dtype) if span < T else logits
        passed = "equals the full forward" + (f" of {span} tokens ({scaled})" if span < T else "")
        checks.append(_same("cached decoding", torch.cat([mixture.head(part, dtype) for part in parts], 1), expected, passed))
    else:
        checks.append(Check("cached decoding", None, f"not run: {scaled} from the second token on"))
    checks.append(_same("batch", mixture.head(alone, dtype), logits[:1], "a sequence computes the same alone and in a batch"))
    checks.append(_same("padding", mixture.head(left, dtype)[:, pad:], logits[:1], "padding on the left changes nothing"))
    return checks, routing


def _same(name: str, got: Tensor, expected: Tensor, passed: str) -> Check:
    worst = Worst(name, 10 * TOLERANCE)
    worst.add(difference(got, expected), "logits")
    return worst.check(passed)


@contextmanager
def _router_logits(block: Block) -> Iterator[dict[str, Tensor]]:
    """The logits [B, T, N] that the block's routers give while the context is open, by router."""
    logits: dict[str, Tensor] = {}
    handles = []
    for name, part in (("attention", block.self_attn), ("ffn", block.mlp)):
        router = getattr(part, "router", None)
        if router is not None:
            handles.append(router.register_forward_hook(lambda module, args, out, name=name: logits.update({name: out})))
    yield logits
    for handle in handles:
        handle.remove()


def _routing(layer: int, router: str, gates_BTN: Tensor, logits_BTN: Tensor) -> dict[str, Any]:
    """What a router does with the sample: entropy (nats) of its softmax, mean gate per expert, share of the tokens' choices.

    A soft router chooses, in this sense, the expert with the largest gate.
    """
    p_MN = logits_BTN.float().softmax(-1).flatten(0, 1)
    chosen_MN = gates_BTN.flatten(0, 1) > 0
    if bool(chosen_MN.all()):
        chosen_MN = p_MN == p_MN.amax(-1, keepdim=True)
    share_N = chosen_MN.sum(0) / chosen_MN.sum()
    entropy = float(-(p_MN * p_MN.clamp(min=1e-12).log()).sum(-1).mean())
    return {
        "layer": layer,
        "router": router,
        "entropy": entropy,
        "gate": gates_BTN.flatten(0, 1).mean(0).tolist(),
        "share": share_N.tolist(),
    }


def _router_check(routing: list[dict[str, Any]], sample: str) -> Check:
    """A router that sends nearly everything to one expert is named; that is a finding, not a failure: training may mend it."""
    names = [
        f"layer {row['layer']} {row['router']} (expert {row['share'].index(max(row['share']))}: {max(row['share']):.0%})"
        for row in routing
        if max(row["share"]) >= DEGENERATE_SHARE
    ]
    detail = f"degenerate: {some(names, 6)}" if names else "none sends nearly all tokens to one expert"
    return Check("router load", True, f"on {sample}: {detail}", max((max(row["share"]) for row in routing), default=0.0), None)
