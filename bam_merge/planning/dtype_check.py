"""What the stored dtypes allow: which tensors are only ever copied, and what a plan says of them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_BITS
from bam_merge.checkpoints.pieces import Slice
from bam_merge.sources.dense import DenseModel
from bam_merge.text import some

if TYPE_CHECKING:
    from bam_merge.planning.plan import Step


def dtype_of_new_tensors(model: DenseModel) -> str:
    """The dtype of what no source has, such as routers: the embeddings', or the final norm's where those are only copied."""
    found = [model.tensors[role, None].dtype for role in ("embed", "norm.final") if (role, None) in model.tensors]
    return next((dtype for dtype in found if dtype in ARITHMETIC_DTYPES), found[0])


def copied_only_problems(steps: Sequence["Step"], file: str) -> Iterator[str]:
    """A message for what is to be made in a dtype that is only copied, and for slices that do not begin and end with a byte."""
    for step in steps:
        if isinstance(step.expr, expressions.Init | expressions.Calibrated) and step.expr.dtype not in ARITHMETIC_DTYPES:
            yield (
                f"{file}: {step.name} would be {step.expr.dtype}, as the embeddings and the final norm are, and nothing can be "
                f"initialised in that. Use sources whose embeddings or final norm are {', '.join(ARITHMETIC_DTYPES)}."
            )
            return
    for step in steps:
        for leaf in expressions.leaves(step.expr):
            if isinstance(leaf, Slice) and prod(leaf.shape[1:]) * DTYPE_BITS[leaf.dtype] % 8:
                yield (
                    f"{file}: {step.name}: rows of {leaf.of} ({leaf.dtype}) are not whole bytes, so it cannot be cut. Use a layout that "
                    "stores it fused, or sources in another dtype."
                )
                return


def copied_only_note(steps: Sequence["Step"]) -> Iterator[str]:
    """What the plan says of tensors in dtypes that the reference model does not compute with."""
    names: dict[str, list[str]] = defaultdict(list)
    for step in steps:
        if step.dtype not in ARITHMETIC_DTYPES:
            names[step.dtype].append(step.name)
    for dtype, of in names.items():
        yield (
            f"{len(of)} tensors are {dtype} ({some(of)}): copied as they are. Verification compares their bytes; what the model "
            "computes is not checked."
        )
