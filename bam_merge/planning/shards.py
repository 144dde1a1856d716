"""Fine-grained experts: shards of one FFN (virtual groups, arXiv 2410.07524, section 2.3).

Of E copies of G shards, expert e is of shard e // E: the experts of a router group are copies of one shard. All router groups start with
the same rows, so that the best experts come from every group, one copy of each shard. Gates of equal rows are equal, and G of them share
what one expert would get: so the last matrix is multiplied by G, and its bias is not.
"""

from collections.abc import Mapping

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES
from bam_merge.checkpoints.pieces import Computed, Read, Slice, whole
from bam_merge.formulas import Columns
from bam_merge.recipe.makes import UNITS
from bam_merge.recipe.schema import Recipe
from bam_merge.sources.dense import DenseModel, Site


def shards_of(site: Site, recipe: Recipe, models: Mapping[str, DenseModel], problems: list[str]) -> tuple[expressions.Expr, ...]:
    """The tensor of every expert: the rows or columns of its shard's units, or the bias that belongs to none."""
    model = models[recipe.expert_names[0]]
    own, units, shards = model.tensors[site], model.facts["intermediate_size"], recipe.shards
    problem = None
    if units % shards:
        problem = f"experts.shards: intermediate_size {units} does not go into {shards} equal shards. Use a divisor of it."
    elif site[0] in UNITS and (not isinstance(own, Slice | Computed | Read) or (isinstance(own, Slice) and own.groups > 1)):
        problem = f"experts.shards: {own} is not stored so that its units can be taken apart."
    elif UNITS.get(site[0]) == "columns" and (own.dtype not in ARITHMETIC_DTYPES or isinstance(own, Slice)):
        problem = f"experts.shards: {own} is {own.dtype}, and columns are taken of {', '.join(ARITHMETIC_DTYPES)} only."
    if problem is not None:
        text = f"{recipe.file}: {problem}"
        problems += [text] if text not in problems else []
        return (own,) * len(recipe.expert_names)
    copies, width = len(recipe.expert_names) // shards, units // shards
    by_shard = [_shard(own, UNITS.get(site[0]), shard * width, width, shards) for shard in range(shards)]
    return tuple(by_shard[expert // copies] for expert in range(len(recipe.expert_names)))


def _shard(own: expressions.Expr, units: str | None, first: int, width: int, shards: int) -> expressions.Expr:
    if units is None:
        return own
    assert isinstance(own, Read | Computed | Slice), "a source's tensor"
    if units == "rows":
        start = own.start if isinstance(own, Slice) else 0
        return Slice(whole(own), 1, start + first, width, (width, *own.shape[1:]))
    of = whole(own)
    return Computed(of.source, of.tensor, Columns(first, first + width, float(shards)), (of,), of.dtype, (of.shape[0], width))
