"""The reference model of a source that is one expert of a mixture: the mixture's, with that expert alone, as verification finds it.

The plan goes from the layout's table to roles and from facts to a config.json of the dense family; this goes from the parameters of the
reference model, and what the mixture's own config.json means, to those of a dense one. Nothing of sources/ is imported.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from bam_merge.architectures.locate import Cell
from bam_merge.architectures.tables import Row
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Computed, Joined, Leaf, Piece, Read, Slice, stored, whole
from bam_merge.checkpoints.provenance import MANIFEST, read_manifest, recorded_experts
from bam_merge.errors import CheckpointError
from bam_merge.expressions import Expr
from bam_merge.formulas import Pairs
from bam_merge.model.config import model_config
from bam_merge.model.loading import StoredModel, parameter_name, stored_model
from bam_merge.planning.plan import Plan
from bam_merge.text import printable, some
from bam_merge.verifying.formulas import order_of_pairs
from bam_merge.verifying.pairs import as_turned, rows_of
from bam_merge.verifying.report import Check
from bam_merge.verifying.rows import leaf_rows

OF_EXPERT = re.compile(r"(self_attn|mlp)\.experts\.(\d+)\.")


def one_expert(checkpoint: Checkpoint, expert: str, family: Mapping[str, Any]) -> StoredModel:
    """The expert of that name or number, in the order of rotary pairs that a config.json of its `family` says. Raises CheckpointError."""
    mixed = stored_model(checkpoint)
    chosen = _number(checkpoint, expert)
    leaves = {}
    for parameter, leaf in mixed.leaves.items():
        found = OF_EXPERT.search(parameter)
        if ".router." in parameter or ".shared_expert" in parameter or (found and int(found[2]) != chosen):
            continue
        leaves[OF_EXPERT.sub(r"\1.", parameter)] = leaf
    alone = replace(
        mixed.config, num_experts=0, num_experts_per_tok=1, norm_topk_prob=False, gate_scale=1.0, shared_expert_intermediate_size=0,
        num_attention_experts=0, attention_kv=None, shared_kv_layers=None, attention_routing=None, num_attention_experts_per_tok=None,
    )  # fmt: skip
    return as_turned(StoredModel(checkpoint, alone, leaves), model_config(dict(family)).rope_interleaved)


def same_experts(plan: Plan, sources: Mapping[str, StoredModel]) -> Iterator[Check]:
    """One check that of every source that is an expert the plan reads what the reference model does, rows of which tensor, for each
    parameter; `sources` are in the order of rotary pairs that the plan puts them in."""
    wrong, chosen = [], [model for model in plan.models.values() if model.expert is not None and not model.adapters]
    for model in chosen:
        mine = sources[model.name]
        for (role, layer), piece in model.tensors.items():
            if not _is_stored(piece) or plan.recipe.output.layers is not None:  # of aligned rows, and of stacks, others tell
                continue
            parameter = parameter_name(role, Cell(Row((role,), ("",)), layer))
            own = mine.leaves.get(parameter)
            if own is None or stored(own).tensor != stored(piece).tensor:
                read = "nothing" if own is None else printable(stored(own).tensor)
                wrong.append(f"{model.name}: {role} is read from {printable(stored(piece).tensor)}, the expert has it in {read}")
            elif not _same_rows(own, rows_of(mine, parameter), piece):
                read = printable(stored(piece).tensor)
                wrong.append(f"{model.name}: {role} is other rows of {read} than the expert's, or those in another order")
    if chosen:
        passed = f"{len(chosen)} sources are experts, each with that expert's own tensors"
        yield Check("experts", not wrong, some(wrong, 4) if wrong else passed)


def _is_stored(expr: Expr) -> TypeGuard[Piece]:
    """Whether an expression is rows of a stored tensor, as they are or in the other order of rotary pairs."""
    of = expr.of if isinstance(expr, Slice) else expr
    return isinstance(of, Read) or (isinstance(of, Computed) and isinstance(of.formula, Pairs) and _is_stored(of.inputs[0]))


def _same_rows(own: Leaf, order: Tensor | None, piece: Piece) -> bool:
    """Whether the expert's own rows, in `order` where there is one, are those that the plan reads."""
    assert not isinstance(own, Joined)  # no layout of mixtures has a role in several tensors
    of = whole(piece)
    if order is None and isinstance(of, Read):
        return list(leaf_rows(own)) == list(leaf_rows(piece))
    mine, theirs = (torch.cat([torch.arange(*run) for run in leaf_rows(leaf)]) for leaf in (own, piece))
    while isinstance(of, Computed):
        assert isinstance(of.formula, Pairs)
        theirs, of = order_of_pairs(of.formula, of.shape[0])[theirs], of.inputs[0]
    return torch.equal(mine if order is None else mine[order], theirs)


def _number(checkpoint: Checkpoint, expert: str) -> int:
    named = recorded_experts(read_manifest(checkpoint.path)["recipe"]) if (checkpoint.path / MANIFEST).exists() else None
    names = named or checkpoint.config.get("expert_names") or []
    places = [place for place, name in enumerate(names) if name == expert]
    if len(places) == 1:
        return places[0]
    if not places and expert.isdecimal():
        return int(expert)
    raise CheckpointError(f"{printable(str(checkpoint.path))}: no one expert {printable(repr(expert), 60)}.")
