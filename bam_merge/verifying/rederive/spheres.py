"""The second way to the methods that average directions on the sphere."""

import math

from bam_merge import expressions
from bam_merge.verifying.rederive.deriving import Rows, blocks_of, derive, survey_anew, weighted
from bam_merge.verifying.rounding import Derived
from bam_merge.verifying.rows import SourceTensors


@derive.register
def _slerp(method: expressions.Slerp, rows: Rows) -> Derived:
    weights, errors = rows.known
    return weighted(weights, errors, rows)


ANGLE_ERROR = 2.0**-50
"""How much two correct ways to the cosine of an angle between tensors may differ."""


@survey_anew.register
def _slerp_weights(method: expressions.Slerp, node: expressions.Merge, sources: SourceTensors) -> tuple[list[float], list[float]]:
    """The two weights, and how much each may differ for the rounding of the angle: near opposite tensors that is a lot."""
    t = method.t
    sums: list[list[float]] = []
    for start, stop in blocks_of(node):
        a, b = (sources.piece(operand, start, stop).double().flatten() for _, operand in node.operands)
        sums.append([float((x * y).sum()) for x, y in ((a, b), (a, a), (b, b))])
    ab, aa, bb = map(math.fsum, zip(*sums, strict=True))
    cosine = ab / (math.sqrt(aa) * math.sqrt(bb)) if aa and bb else 1.0

    def at(cosine: float) -> tuple[float, float]:
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        if math.sin(angle) < 1e-7:
            return 1 - t, t
        return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)

    weights = at(cosine)
    around = [at(cosine - ANGLE_ERROR), at(cosine + ANGLE_ERROR)]
    return list(weights), [max(abs(other[i] - weights[i]) for other in around) for i in (0, 1)]
