"""The reference model of a source that is one expert of a mixture: the mixture's, with that expert alone, as verification finds it.

The plan goes from the layout's table to roles and from facts to a config.json of the dense family; this goes from the parameters of the
reference model, and what the mixture's own config.json means, to those of a dense one. Nothing of sources/ is imported.
"""

import re
from dataclasses import replace

from bam_merge.checkpoints.folder import Checkpoint
from bam_merge.checkpoints.provenance import MANIFEST, read_manifest, recorded_experts
from bam_merge.errors import CheckpointError
from bam_merge.model.loading import StoredModel, stored_model
from bam_merge.text import printable

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


def _number(checkpoint: Checkpoint, expert: str) -> int:
    named = recorded_experts(read_manifest(checkpoint.path)["recipe"]) if (checkpoint.path / MANIFEST).exists() else None
    names = named or checkpoint.config.get("expert_names") or []
    places = [place for place, name in enumerate(names) if name == expert]
    if len(places) == 1:
        return places[0]
    if not places and expert.isdecimal():
        return int(expert)
    raise CheckpointError(f"{printable(str(checkpoint.path))}: no one expert {printable(repr(expert), 60)}.")
