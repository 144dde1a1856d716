"""The second way to the methods that average the tensors themselves."""

from bam_merge import expressions
from bam_merge.verifying.rederive.deriving import Rows, derive, weighed_sum, weighted
from bam_merge.verifying.rounding import Derived


@derive.register
def _mean(method: expressions.Mean, rows: Rows) -> Derived:
    count, x_K = len(rows.operands), rows.wide
    slack = weighed_sum([1.0] * count, [x.abs() for x in x_K]).mul_((count - 1) / count * rows.computing.unit)
    return Derived(weighed_sum([1.0] * count, x_K).div_(count), slack)


@derive.register
def _linear(method: expressions.Linear, rows: Rows) -> Derived:
    return weighted(method.weights, (0.0,) * len(method.weights), rows)
