"""Several roles in one tensor: the expression of a fused tensor, as simple as its parts allow."""

from dataclasses import replace

from bam_merge.checkpoints.pieces import Slice, Whole
from bam_merge.expressions import Concat, Expr, Merge


def fuse(pieces: tuple[Expr, ...], groups: int) -> Expr:
    """Concat of `pieces`, simplified: slices that make up a whole tensor again become that tensor, and an element-wise
    merge of such slices becomes the merge of the whole tensors."""
    first = pieces[0]
    shape = (sum(part.shape[0] for part in pieces), *first.shape[1:])
    if all(isinstance(part, Slice) for part in pieces):
        slices = [part for part in pieces if isinstance(part, Slice)]
        if len({part.of for part in slices}) == 1 and _tiles(slices, groups):
            return slices[0].of
    merges = [part for part in pieces if isinstance(part, Merge)]
    if len(merges) == len(pieces) and _same_elementwise(merges):
        operands = tuple(
            (name, fuse(tuple(merge.operands[i][1] for merge in merges), groups)) for i, (name, _) in enumerate(merges[0].operands)
        )
        bases = [merge.base for merge in merges if merge.base]
        base = (bases[0][0], fuse(tuple(expr for _, expr in bases), groups)) if bases else None
        return Merge(merges[0].method, operands, base, first.dtype, shape)
    return Concat(pieces, groups, first.dtype, shape)


def stack(parts: tuple[Expr, ...]) -> Concat:
    """One tensor of those of all experts."""
    first = parts[0]
    return Concat(parts, 1, first.dtype, (sum(part.shape[0] for part in parts), *first.shape[1:]), stacked=True)


def apart(expr: Expr, count: int) -> tuple[Expr, ...]:
    """What `count` tensors hold of one that each source has in as many, or in one: each is made as the whole would be, on its own."""
    if count == 1:
        return (expr,)
    if isinstance(expr, Merge):
        operands = [(name, apart(part, count)) for name, part in expr.operands]
        base = None if expr.base is None else (expr.base[0], apart(expr.base[1], count))
        return tuple(
            replace(
                expr,
                operands=tuple((name, parts[place]) for name, parts in operands),
                base=None if base is None else (base[0], base[1][place]),
                shape=operands[0][1][place].shape,
            )
            for place in range(count)
        )
    if isinstance(expr, Whole):  # an expert's, of a mixture that holds them in one
        rows = expr.shape[0] // count
        return tuple(Slice(expr, 1, place * rows, rows, (rows, *expr.shape[1:])) for place in range(count))
    assert isinstance(expr, Concat)
    assert len(expr.parts) == count, "sources hold it in as many tensors as the result"
    return expr.parts


def _tiles(slices: list[Slice], groups: int) -> bool:
    position = 0
    for part in slices:
        if part.groups != groups or part.start != position:
            return False
        position += part.rows
    return position * groups == slices[0].of.shape[0]


def _same_elementwise(merges: list[Merge]) -> bool:
    first = merges[0]
    names = [name for name, _ in first.operands]
    return first.method.about.elementwise and all(
        merge.method == first.method
        and [name for name, _ in merge.operands] == names
        and (merge.base is None) == (first.base is None)
        and (merge.base is None or first.base is None or merge.base[0] == first.base[0])
        for merge in merges
    )
