"""The second way to the methods that average directions on the sphere."""

import math

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.verifying.rederive.deriving import COMPUTING, COSINE_ERROR, Rows, blocks_of, derive, survey_anew, weighted
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


@derive.register
def _nuslerp(method: expressions.Nuslerp, rows: Rows) -> Derived:
    if rows.known is not None:
        weights, errors = rows.known
        return weighted(weights, errors, rows)
    a, b = rows.wide
    aa, ab, bb = ((x * y).sum(-1, keepdim=True) for x, y in ((a, a), (a, b), (b, b)))
    cosine = torch.where((aa > 0) & (bb > 0), ab / (aa.sqrt() * bb.sqrt()), 1.0)

    def at(cosine: Tensor) -> tuple[Tensor, Tensor]:
        angle = cosine.clamp(-1, 1).acos()
        straight = angle.sin() < 1e-7
        first, second = ((share * angle).sin() / angle.sin() for share in (1 - method.t, method.t))
        return first.masked_fill(straight, 1 - method.t), second.masked_fill(straight, method.t)

    weights, error = at(cosine), COSINE_ERROR[rows.computing.dtype]
    around = [at(cosine - 2 * ANGLE_ERROR), at(cosine + 2 * ANGLE_ERROR)]
    slack = torch.zeros_like(a)
    for x, weight, *others in zip((a, b), weights, *around, strict=True):
        off = torch.maximum(*((other - weight).abs() for other in others))
        slack += x.abs() * (off + weight.abs() * (4 * rows.computing.unit + error))
    return Derived(a * weights[0] + b * weights[1], slack + 4 * rows.computing.least)


@survey_anew.register
def _nuslerp_weights(
    method: expressions.Nuslerp, node: expressions.Merge, sources: SourceTensors
) -> tuple[list[float], list[float]] | None:
    return None if method.by == "rows" and len(node.shape) > 1 else _slerp_weights(expressions.Slerp(method.t), node, sources)


@derive.register
def _karcher(method: expressions.Karcher, rows: Rows) -> Derived:
    weights, errors = rows.known
    return weighted(weights, errors, rows)


@survey_anew.register
def _karcher_weights(method: expressions.Karcher, node: expressions.Merge, sources: SourceTensors) -> tuple[list[float], list[float]]:
    """The operands' weights, and how much each may differ for the rounding of the angles."""
    count = len(node.operands)
    products = torch.zeros(count, count, dtype=torch.float64)
    for start, stop in blocks_of(node):
        x_K = torch.stack([sources.piece(operand, start, stop).double().flatten() for _, operand in node.operands])
        products += torch.stack([(one[None] * x_K).sum(1) for one in x_K])
    lengths = products.diagonal().sqrt()
    cosines = (products / torch.outer(lengths, lengths)).clamp(-1, 1)
    weights = _mean_weights(cosines, lengths)
    error = COSINE_ERROR[COMPUTING[expressions.in_float64(node)].dtype]
    around = [_mean_weights((cosines + way).clamp(-1, 1).fill_diagonal_(1), lengths) for way in (-2 * ANGLE_ERROR, 2 * ANGLE_ERROR)]
    off = torch.stack([(other - weights).abs() for other in around]).amax(0) + weights.abs() * error
    return weights.tolist(), off.tolist()


def _mean_weights(cosines: Tensor, lengths: Tensor) -> Tensor:
    """By coordinates of the directions, in the space that they span: the mean is the point m that sum_i theta_i / sin(theta_i) u_i points
    to, theta_i the angle between m and u_i; found by going towards it again and again, as many lengths of m as there are directions taken
    along: straight there, m would leap over it where angles are wide."""
    even = torch.full_like(lengths, 1 / len(lengths))
    used = lengths > 0
    if not used.any():
        return even
    values, vectors = torch.linalg.eigh(cosines[used][:, used])
    u = vectors * values.clamp(min=0).sqrt()
    u = u / u.norm(dim=1, keepdim=True)
    m = u.mean(0)
    if float(m.norm()) < 1e-7 or float((u @ m).min()) < 1e-7 * float(m.norm()):
        return even
    m = m / m.norm()
    for _ in range(2000):
        angles = 2 * torch.atan2((u - m).norm(dim=1), (u + m).norm(dim=1))
        pulls = torch.where(angles > 1e-8, angles / angles.sin(), 1.0)
        ahead = pulls @ u
        before, m = m, ahead + (len(u) - ahead @ m) * m
        m = m / m.norm()
        if float((m - before).abs().max()) < 2.0**-52:
            break
    shares = torch.zeros_like(lengths)
    shares[used] = pulls / (pulls @ u).norm()
    return torch.where(used, lengths.mean() * shares / lengths, 0.0)
