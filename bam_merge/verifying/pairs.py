"""Rotary pairs in another order than the sources': the second reading of their rows, and the proof that it computes the same.

A plan puts the rows of queries and keys in its layout's order (planning/pairs.py). Here the dense models are read in that order by code of
its own, are held against the plan's tensors, and against themselves as they are stored: a block must compute the same in either.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bam_merge.architectures.locate import Cell
from bam_merge.model.loading import StoredModel, parameter_name
from bam_merge.model.model_config import ModelConfig
from bam_merge.model.streaming import streamed_block, streamed_embeddings
from bam_merge.planning.plan import Plan
from bam_merge.verifying.levels import layers_asked
from bam_merge.verifying.measuring import Way, Worst, difference, of_layers, positions_of
from bam_merge.verifying.report import Check
from bam_merge.verifying.rows import RowReader, SourceTensors
from bam_merge.verifying.updates import TOLERANCE, apart_by

TURNED = tuple(f"self_attn.{part}" for part in ("q_proj.", "k_proj.", "q_norm.", "k_norm."))
"""What the reference model calls what has channels of queries or keys for rows, in a layer."""


@dataclass(frozen=True)
class Ordered(StoredModel):
    """The dense model `of`, with the rows of its queries and keys in the order that `config` turns them in."""

    of: StoredModel | None = None

    def read(self, parameter: str, dtype: torch.dtype | None = None) -> Tensor:
        assert self.of is not None
        values = self.of.read(parameter, dtype)
        order = self._order(parameter)
        return values if order is None else values[order]

    def read_rows(self, parameter: str, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        assert self.of is not None
        order = self._order(parameter)
        return self.of.read_rows(parameter, rows if order is None else order[list(rows)].tolist(), dtype)

    def _order(self, parameter: str) -> Tensor | None:
        """Where each row stands in the model as it is; None where all stay."""
        assert self.of is not None
        layer, _, rest = parameter.removeprefix("model.layers.").partition(".")
        if not rest.startswith(TURNED):
            return None
        own = self.of.config.at(int(layer))
        slides = own.layer_types is not None and own.layer_types[int(layer)] == "sliding_attention"
        rope = own.sliding_rope_parameters if slides and own.sliding_rope_parameters else own.rope_parameters
        pairs = torch.arange(int(own.head_dim * rope.get("partial_rotary_factor", 1.0)) // 2)
        if self.config.rope_interleaved:  # p, half + p of each pair in turn
            turning = torch.stack((pairs, len(pairs) + pairs), 1).flatten()
        else:
            turning = torch.cat((2 * pairs, 2 * pairs + 1))
        of_a_head = torch.cat((turning, torch.arange(len(turning), own.head_dim)))
        heads = torch.arange(self.leaves[parameter].shape[0] // own.head_dim)
        return (heads[:, None] * own.head_dim + of_a_head).flatten()


def rows_of(model: StoredModel, parameter: str) -> Tensor | None:
    """Which row of what the folder holds each row of a parameter is, of a model in another order than its folder; None where all stay."""
    order = model._order(parameter) if isinstance(model, Ordered) else None
    inner = getattr(model, "of", None)
    before = rows_of(inner, parameter) if isinstance(inner, StoredModel) else None
    return before if order is None else order if before is None else before[order]


def is_turned(model: StoredModel, parameter: str) -> bool:
    """Whether rows of the parameter are read in another order than the folder has them in."""
    rows = rows_of(model, parameter)
    return rows is not None and not torch.equal(rows, torch.arange(len(rows)))


def as_turned(model: StoredModel, interleaved: bool) -> StoredModel:
    """The model as one that turns neighbours, or else halves of a head."""
    if model.config.rope_interleaved == interleaved:
        return model
    return Ordered(model.checkpoint, replace(model.config, rope_interleaved=interleaved), model.leaves, model)


def in_order(dense: Mapping[str, StoredModel], mixture: ModelConfig, plan: Plan) -> dict[str, StoredModel]:
    """The dense models as a layout turns them that turns one way only."""
    if plan.layout.kind != "mixture" or not isinstance(plan.layout.accepts.get("rope_interleaved"), bool):
        return dict(dense)
    wanted = mixture.rope_interleaved
    return {name: as_turned(model, wanted) for name, model in dense.items()}


@torch.no_grad()
def same_in_either_order(
    own: Mapping[str, StoredModel], dense: Mapping[str, StoredModel], exact: Mapping[str, StoredModel], plan: Plan, ids_BT: Tensor, way: Way
) -> Iterator[Check]:
    """One check of the models that are read in another order than their `own`: theirs are the plan's tensors, and their blocks compute
    what they did.

    `exact` are the same models before they are rounded to what the merge writes, as the plan's tensors are.
    """
    ordered = {
        name: model
        for name, model in dense.items()
        if isinstance(model, Ordered) and model.config.rope_interleaved != own[name].config.rope_interleaved
    }
    if not ordered:
        return
    tensors, blocks = Worst("rotary order", TOLERANCE), Worst("rotary order")
    sources = SourceTensors(plan, RowReader())
    asked: Sequence[int] = ()
    for name, model in ordered.items():
        assert model.of is not None
        asked = sorted(layers_asked(model.config, way.level))
        x_BTD = streamed_embeddings(model, ids_BT, way.computing)
        for (role, layer), expr in plan.models[name].tensors.items():
            row = next(row for row in plan.models[name].family.rows if role in row.roles)
            parameter = parameter_name(role, Cell(row, layer))
            if layer in asked and f".{TURNED[0].partition('.')[0]}." in parameter:
                tensors.add(apart_by(sources, expr, exact[name], parameter), f"sources.{name}: {parameter}")
        for layer in asked:
            blocks.add(_apart(model, model.of, layer, x_BTD, way, blocks.tolerance), f"sources.{name}: layer {layer}")
    count = plan.models[plan.recipe.seed_name].facts["num_hidden_layers"]
    passed = f"rows of q and k in the layout's order of rotary pairs compute what they do in the sources'{of_layers(asked, count)}"
    yield tensors.check(passed) if tensors.places else blocks.check(passed)


@torch.no_grad()
def same_as_in_the_mixture(own: Mapping[str, StoredModel], ids_BT: Tensor, way: Way) -> Iterator[Check]:
    """One check of the sources that are experts of a mixture of another order than their family's: their blocks compute what they do there.

    Which rows a plan reads of them, one_expert.same_experts tells.
    """
    blocks, count = Worst("experts' rotary order"), 0
    for name, model in own.items():
        if not isinstance(model, Ordered):
            continue
        assert model.of is not None
        asked, count = sorted(layers_asked(model.config, way.level)), model.config.num_hidden_layers
        x_BTD = streamed_embeddings(model, ids_BT % model.config.vocab_size, way.computing)
        for layer in asked:
            blocks.add(_apart(model, model.of, layer, x_BTD, way, blocks.tolerance), f"sources.{name}: layer {layer}")
    if count:
        yield blocks.check(
            f"rows of q and k in the family's order of rotary pairs compute what they do in the mixture{of_layers(asked, count)}"
        )


def _apart(model: StoredModel, of: StoredModel, layer: int, x_BTD: Tensor, way: Way, tolerance: float) -> float:
    """How far the block of one is from that of the other, on the same hidden states."""
    for computing in way.precisions:
        x = computing.taken(x_BTD)
        got, expected = (streamed_block(one, layer, computing)(x, positions_of(x)).hidden for one in (model, of))
        error = difference(got - x, expected - x, expected)
        if error <= tolerance:
            break
    return error
