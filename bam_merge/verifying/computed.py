"""Is the mixture its dense models? Hidden states go through one layer at a time; no matrix is ever held whole.

Every check compares the reference model of the merged folder with the reference models of its dense sources, layer by layer, on the
same input: an error is found in the layer that makes it. (docs/explanation/step-0.md.)
"""

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bam_merge.model.loading import StoredModel
from bam_merge.model.model import Block, FfnMixture
from bam_merge.model.positions import Cache
from bam_merge.model.routes import router_logits
from bam_merge.model.streaming import Computing, streamed_block, streamed_embeddings
from bam_merge.planning.plan import Plan
from bam_merge.recipe.schema import Ffn, Recipe
from bam_merge.verifying.levels import layers_asked
from bam_merge.verifying.measuring import Way, Worst, difference, of_layers, positions_of
from bam_merge.verifying.parameters import shared_strangers, strangers
from bam_merge.verifying.remade import MARK, experts_models, reassembled
from bam_merge.verifying.report import Check
from bam_merge.verifying.wiring import miswired

NORMS = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm", "layer_scale")
"""What a block has beside attention and FFN. Its experts share them."""


CHANGED = 2.0**-8
"""How much a second norm of what experts give may change a block: as much as the rounding to bfloat16, in which such models are stored."""


def with_expert(mixture: Block, dense: Block, j: int) -> Block:
    """The mixture's block with all that its experts share taken from the dense model j: norms, and what of attention is shared.

    With the gates forced to expert j this must be the dense block.
    """
    block = copy.copy(mixture)
    block._modules = dict(mixture._modules)
    for name in NORMS:
        ours, theirs = getattr(mixture, name), getattr(dense, name)
        if ours is not None and theirs is not None:
            setattr(block, name, _with_weights(ours, theirs))
    if isinstance(mixture.mlp, FfnMixture) and mixture.mlp.branches is not None:
        assert dense.post_attention_layernorm is not None
        mlp, around = copy.copy(mixture.mlp), copy.copy(mixture.mlp.branches)
        around._modules = {
            **around._modules,
            "before_experts": _with_weights(mixture.mlp.branches.before_experts, dense.post_attention_layernorm),
        }
        mlp._modules = {**mlp._modules, "branches": around}
        block.mlp = mlp
    if not len(mixture.self_attn.experts):
        block.self_attn = dense.self_attn
    elif mixture.self_attn.shares_kv:
        attention = copy.copy(mixture.self_attn)
        attention._modules = {**mixture.self_attn._modules}
        for name in ("k_proj", "v_proj", "k_norm"):
            setattr(attention, name, getattr(dense.self_attn, name))
        block.self_attn = attention
    return block


def as_beside_dense(dense: Block, mixture: Block) -> Block:
    """The dense block as a layout computes it that norms what experts give once more, before the norm that stands after the FFN."""
    if not isinstance(mixture.mlp, FfnMixture) or mixture.mlp.branches is None:
        return dense
    block = copy.copy(dense)
    block._modules = {**dense._modules, "post_mlp_layernorm": nn.Sequential(mixture.mlp.branches.unit, dense.post_mlp_layernorm)}
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
    expert._parameters = {name: getattr(dense, name, parameter) for name, parameter in expert._parameters.items()}
    result._modules["experts"] = nn.ModuleList([expert if i == j else other for i, other in enumerate(experts)])
    return result


@torch.no_grad()
def against_dense(
    mixture: StoredModel,
    dense: Mapping[str, StoredModel],
    plan: Plan,
    proved: frozenset[str],
    ids_BT: Tensor,
    way: Way,
    measured: "Mapping[int, LayerErrors] | None" = None,
) -> Iterator[Check]:
    """Expert isolation and identity: parameters in every layer, and forward passes in the layers that are asked.

    Where all are asked, every dense model's hidden states advance by its own blocks; else every layer gets the embeddings, and another
    process may have `measured` it. A layer that is off in float32 is measured again in float64, which tells an error from the rounding of a
    large model.
    """
    sources, seed = plan.recipe.expert_names, plan.recipe.seed_name
    names, models = experts_models(mixture, plan, dense)
    isolation, identity, twice = Worst("expert isolation"), Worst("identity"), Worst("normed twice", CHANGED)
    known = set()
    for stranger in strangers(mixture, models, names, plan, proved):
        known.add((stranger.layer, stranger.expert))
        isolation.value = max(isolation.value, stranger.error)
        isolation.places.append(f"layer {stranger.layer}, expert {stranger.expert} ({_name(sources, stranger.expert)}): {stranger.where}")
    for layer, j, what in miswired(mixture, models, names):
        known.add((layer, j))
        isolation.value = math.inf
        isolation.places.append(f"layer {layer}, expert {j} ({sources[j]}): the block's configuration or wiring ({what})")
    factors: list[float] = []
    for layer, error, where in shared_strangers(mixture, models, plan, proved):
        known.add((layer, SHARED))
        isolation.value = max(isolation.value, error)
        isolation.places.append(f"layer {layer}, shared expert ({plan.recipe.shared_source}): {where}")
    x = {name: streamed_embeddings(models[name], ids_BT, way.computing) for name in dict.fromkeys((*names, seed))}
    asked = sorted(layers_asked(mixture.config, way.level))
    for layer in asked:
        found = (measured or {}).get(layer) or _Layer(mixture, models, names, plan.recipe, layer, way).found(x, isolation.tolerance)
        for error, j, place in found.isolation:
            if (layer, j) not in known:
                isolation.add(error, place)
        identity.add(*found.identity)
        factors.append(found.factor)
        if found.twice is not None:
            twice.add(found.twice, f"layer {layer}")
        x = found.hidden if way.level.thorough else x
        way.ran(layer)
    of = of_layers(asked, mixture.config.num_hidden_layers)
    ran = f"; its blocks compute the same{of}" if of else ""
    anew = sum(MARK in name for name in names)
    remade = f", {'all' if anew == len(names) else anew} remade as the recipe says," if anew else ""
    yield isolation.check(f"every expert of {len(names)} is its dense model{remade} in every layer{ran}")
    scale = sum(factors) / len(factors)
    meaning = f"its attention exactly, its FFN times {scale:.4f} (the chosen gates' sum)"
    if abs(scale - 1) < 1e-6:
        meaning = "the dense model exactly"
    elif mixture.config.post_norms:
        meaning += ", which the norm after it takes away"
    shards, shared = plan.recipe.shards, plan.recipe.shared_source
    beside = f", beside the shared expert, which is {shared}'s FFN" if shared else ""
    what = f"copies of {seed}" if shards == 1 else f"the {shards} shards of {seed}"
    yield identity.check(f"{what} under these routers are {meaning}{beside}{of}")
    if mixture.config.dense_intermediate_size:
        again = twice.check(f"the layout norms what experts give once more, which changes a block by {twice.value:.2g} at most{of}")
        small = "the FFNs give so little that a second norm, which the layout has, makes other blocks of them; use layout bam: "
        yield again if again.ok else replace(again, detail=small + again.detail)


@torch.no_grad()
def of_embeddings(
    mixture: StoredModel, dense: Mapping[str, StoredModel], plan: Plan, ids_BT: Tensor, way: Way, layers: Collection[int]
) -> "dict[int, LayerErrors]":
    """What some of the layers show that get the embeddings, as all do where not every layer is asked; without hidden states."""
    names, models = experts_models(mixture, plan, dense)
    x = {name: streamed_embeddings(models[name], ids_BT, way.computing) for name in dict.fromkeys((*names, plan.recipe.seed_name))}
    tolerance = Worst("expert isolation").tolerance
    return {layer: _Layer(mixture, models, names, plan.recipe, layer, way).found(x, tolerance)._replace(hidden={}) for layer in layers}


def _name(names: Sequence[str], expert: int) -> str:
    return names[expert] if expert < len(names) else "of no source"


class LayerErrors(NamedTuple):
    """What one layer showed: (error, expert, place) of every expert; (error, place) of copies of the seed, and the mean factor of their
    FFN; the dense models' hidden states [B, T, D] after the layer; and by how much a block changes where its layout norms what experts give
    once more, None where it does not."""

    isolation: list[tuple[float, int, str]]
    identity: tuple[float, str]
    factor: float
    hidden: dict[str, Tensor]
    twice: float | None = None


@dataclass(frozen=True)
class _Layer:
    """One layer of the mixture and of its dense models."""

    mixture: StoredModel
    dense: Mapping[str, StoredModel]
    names: Sequence[str]
    recipe: Recipe
    layer: int
    way: Way

    def found(self, x: Mapping[str, Tensor], tolerance: float) -> LayerErrors:
        """What the layer shows on the dense models' hidden states `x`, in as much precision as leaves no doubt."""
        for computing in self.way.precisions:
            found = self._measured({name: computing.taken(x_BTD) for name, x_BTD in x.items()}, tolerance, computing)
            if all(error <= tolerance for error in (found.identity[0], *(error for error, _, _ in found.isolation))):
                break
        return found

    def _measured(self, x: Mapping[str, Tensor], tolerance: float, computing: Computing) -> LayerErrors:
        names, seed, layer = self.names, self.recipe.seed_name, self.layer
        block = streamed_block(self.mixture, layer, computing)
        isolation, hidden, changed = [], {}, list[float]()
        source = self.recipe.shared_source
        alone = block if source is None else without_shared(block)
        for name, x_BTD in x.items():
            own, positions = streamed_block(self.dense[name], layer, computing), positions_of(x_BTD)
            hidden[name] = expected = own(x_BTD, positions).hidden
            normed_twice = as_beside_dense(own, block)
            if normed_twice is not own:
                expected = normed_twice(x_BTD, positions).hidden
                changed.append(difference(expected - x_BTD, hidden[name] - x_BTD, hidden[name]))
            for j in (j for j, expert in enumerate(names) if expert == name):
                got = with_expert(alone, own, j)(x_BTD, positions, force_expert=j).hidden
                error = difference(got - x_BTD, expected - x_BTD, expected)
                wrong = error > tolerance or error != error
                blame = f": {_blame(alone, own, j, x_BTD, expected, tolerance)}" if wrong else ""
                isolation.append((error, j, f"layer {layer}, expert {j} ({name.partition(MARK)[0]}){blame}"))
        beside = None
        if source is not None:
            beside = streamed_block(self.dense[source], layer, computing)
            error = _shared_apart(block, beside, x[seed])
            isolation.append((error, SHARED, f"layer {layer}, shared expert ({source})"))
        whole = reassembled(self.dense, names, self.recipe)
        of_copies, factor = _identity(block, streamed_block(whole, layer, computing), x[seed], self.recipe, beside)
        return LayerErrors(isolation, (of_copies, f"layer {layer}"), factor, hidden, max(changed, default=None))


SHARED = -1
"""Stands for the shared expert where experts have numbers."""


def without_shared(mixture: Block) -> Block:
    """The mixture's block without an expert of every token."""
    assert isinstance(mixture.mlp, FfnMixture)
    block, mlp = copy.copy(mixture), copy.copy(mixture.mlp)
    block._modules, mlp._modules = {**mixture._modules, "mlp": mlp}, {**mixture.mlp._modules, "shared_expert": None}
    return block


def _shared_apart(mixture: Block, dense: Block, x_BTD: Tensor) -> float:
    """How far the shared expert's output is from that of the dense FFN on the same normed hidden states."""
    assert isinstance(mixture.mlp, FfnMixture)
    if mixture.mlp.shared_expert is None:
        return math.inf
    normed = dense.input_layernorm(x_BTD)
    return difference(mixture.mlp.shared_expert(normed), dense.mlp(normed))


def _identity(mixture: Block, dense: Block, x_BTD: Tensor, recipe: Recipe, beside: Block | None = None) -> tuple[float, float]:
    """With every expert the seed's, attention must be the seed's, the FFN (before a norm that stands after it) times the
    sum of the gates that `recipe` asks for; and the FFN of `beside`, whose the shared expert is, besides, weighted as the layout does.
    The gates must be those, too. (error, the first factor's mean)"""
    block, dense = with_expert(mixture, dense, 0), as_beside_dense(dense, mixture)
    for j in range(len(mixture.self_attn.experts)):
        block.self_attn = _as_expert(block.self_attn, dense.self_attn, j)
    assert isinstance(mixture.mlp, FfnMixture)
    for j in range(len(mixture.mlp.experts) if recipe.shards == 1 else 0):  # shards of the FFN are to be the dense one as they are
        block.mlp = _as_expert(block.mlp, dense.mlp, j)
    positions = positions_of(x_BTD)
    normed = dense.input_layernorm(x_BTD)
    attention = dense.scale * dense.post_self_attn_layernorm(dense.self_attn(normed, positions, Cache(), None)[0])
    if dense.post_attention_layernorm is not None:
        normed = dense.post_attention_layernorm(x_BTD if dense.parallel else x_BTD + attention)
    factor_BT1 = _gate_sum(mixture.mlp.router(normed), recipe)
    with router_logits(block) as logits:
        out, _, gates_BTN = block(x_BTD, positions)
    ffn = factor_BT1 * dense.mlp(normed)
    if beside is not None:
        ffn = _with_shared(mixture.mlp, normed, ffn, beside.mlp(normed))
    ffn = dense.scale * dense.post_mlp_layernorm(ffn)
    error = difference(out - x_BTD, dense.layer_scale(x_BTD + attention + ffn) - x_BTD, out)
    return max(error, _gates_apart(gates_BTN, logits["ffn"], recipe)), float(factor_BT1.mean())


def _with_shared(mixture: FfnMixture, normed_BTD: Tensor, ffn_BTD: Tensor, shared_BTD: Tensor) -> Tensor:
    """The FFN with a shared expert's output: times its gate where it has one; half of both where the layout averages them; else the sum."""
    if mixture.shared_expert_gate is not None:
        gate_BT1: Tensor = mixture.shared_expert_gate(normed_BTD).sigmoid()
        return ffn_BTD + gate_BT1 * shared_BTD
    return 0.5 * ffn_BTD + 0.5 * shared_BTD if mixture.shared_mix == "average" else ffn_BTD + shared_BTD


def _gates_apart(gates_BTN: Tensor | None, logits_BTN: Tensor, recipe: Recipe) -> float:
    """How far the gates are that a block gave its experts for these logits from what `recipe` asks for, each token's in order of size.

    Equal experts show what gates sum to. That they are shares of sigmoids and not of a softmax, only the gates themselves show.
    """
    assert gates_BTN is not None
    top_k, renormalised = recipe.gates
    logits_BTN, gates_BTN = (z.cpu().double() for z in (logits_BTN, gates_BTN))
    best_BTk = logits_BTN.sort(dim=-1, descending=True).values[..., :top_k]
    if recipe.sigmoid:
        wanted_BTk = 1 / (1 + (-best_BTk).exp())
        wanted_BTk = wanted_BTk / wanted_BTk.sum(-1, keepdim=True)
    else:
        of_BT1 = (best_BTk if renormalised else logits_BTN).logsumexp(-1, keepdim=True)
        wanted_BTk = (best_BTk - of_BT1).exp()
    sorted_BTN = gates_BTN.sort(dim=-1, descending=True).values
    wanted_BTN = pad(wanted_BTk, (0, gates_BTN.shape[-1] - top_k))
    return float((sorted_BTN - wanted_BTN).abs().max())


def _gate_sum(logits_BTN: Tensor, recipe: Recipe) -> Tensor:
    """What equal FFN experts are multiplied with [B, T, 1], by the recipe alone: gate_scale, times the sum of the k largest of
    softmax(logits) where they are not renormalised."""
    top_k, renormalised = recipe.gates
    p_BTN = logits_BTN.softmax(-1)
    sum_BT1 = torch.ones_like(p_BTN[..., :1]) if renormalised else p_BTN.topk(top_k).values.sum(-1, keepdim=True)
    return sum_BT1 * (recipe.ffn or Ffn()).gate_scale
