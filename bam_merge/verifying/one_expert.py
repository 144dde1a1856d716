"""The reference model of a source that is one expert of a mixture: the mixture's, with that expert alone, as verification finds it.

The plan goes from the layout's table to roles and from facts to a config.json of the dense family; this goes from the parameters of the
reference model, and what the mixture's own config.json means, to those of a dense one. Nothing of sources/ is imported.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from bam_merge.architectures.locate import Cell
from bam_merge.architectures.tables import Row
from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.pieces import Joined, Leaf, Read, Slice, stored
from bam_merge.checkpoints.provenance import MANIFEST, read_manifest, recorded_experts
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import StoredModel, parameter_name, stored_model
from bam_merge.planning.plan import Plan
from bam_merge.text import printable, some
from bam_merge.verifying.report import Check
from bam_merge.verifying.rows import leaf_rows

OF_EXPERT = re.compile(r"(self_attn|mlp)\.experts\.(\d+)\.")


def one_expert(checkpoint: Checkpoint, expert: str) -> StoredModel:
    """The expert of that name or number. Raises CheckpointError."""
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
    return StoredModel(checkpoint, alone, leaves)


def same_experts(plan: Plan, sources: Mapping[str, StoredModel]) -> Iterator[Check]:
    """One check that of every source that is an expert the plan reads what the reference model does, rows of which tensor, for each
    parameter."""
    wrong, chosen = [], [model for model in plan.models.values() if model.expert is not None and not model.adapters]
    for model in chosen:
        mine = sources[model.name].leaves
        for (role, layer), leaf in model.tensors.items():
            if not isinstance(leaf, Read | Slice) or plan.recipe.output.layers is not None:  # of aligned rows, and of stacks, others tell
                continue
            own = mine.get(parameter_name(role, Cell(Row((role,), ("",)), layer)))
            if own is None or _where(own) != _where(leaf):
                read = "nothing" if own is None else printable(stored(own).tensor)
                wrong.append(f"{model.name}: {role} is read from {printable(stored(leaf).tensor)}, the expert has it in {read}")
    if chosen:
        passed = f"{len(chosen)} sources are experts, each with that expert's own tensors"
        yield Check("experts", not wrong, some(wrong, 4) if wrong else passed)


def _where(leaf: Leaf) -> tuple[str, list[tuple[int, int]]]:
    assert not isinstance(leaf, Joined)  # no layout of mixtures has a role in several tensors
    return stored(leaf).tensor, list(leaf_rows(leaf))


def _number(checkpoint: Checkpoint, expert: str) -> int:
    named = recorded_experts(read_manifest(checkpoint.path)["recipe"]) if (checkpoint.path / MANIFEST).exists() else None
    names = named or checkpoint.config.get("expert_names") or []
    places = [place for place, name in enumerate(names) if name == expert]
    if len(places) == 1:
        return places[0]
    if not places and expert.isdecimal():
        return int(expert)
    raise CheckpointError(f"{printable(str(checkpoint.path))}: no one expert {printable(repr(expert), 60)}.")
