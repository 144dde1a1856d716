"""Kernels of the methods that average directions on the sphere."""

import math

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.merging.kernels.chunks import Chunk, Chunks, combine, survey, weighted_sum
from bam_merge.merging.kernels.surveys import cosine, dot, gram

STRAIGHT = 1e-7
"""The sine of an angle, and the length of a mean of directions, below which there is no arc: the straight line is taken."""


@survey.register
def slerp_weights(method: expressions.Slerp, chunks: Chunks, numel: int) -> tuple[float, float]:
    """The two weights sin((1-t) a) / sin a and sin(t a) / sin a, with a the angle between the operands.

    Dot products in float64, so the angle is good to about 1e-8; below that, or at opposite directions, where the arc is not
    defined, the straight line 1-t, t.
    """
    dots: list[tuple[float, float, float]] = []
    for chunk in chunks():
        a_C, b_C = chunk.operands
        dots.append((dot(a_C, b_C), dot(a_C, a_C), dot(b_C, b_C)))
    total = math.fsum if a_C.dtype == torch.float64 else sum
    across, norm_a, norm_b = map(total, zip(*dots, strict=True))
    scale = math.sqrt(norm_a) * math.sqrt(norm_b)
    angle = math.acos(max(-1.0, min(1.0, across / scale))) if scale > 0 else 0.0
    if math.sin(angle) < STRAIGHT:
        return 1 - method.t, method.t
    return math.sin((1 - method.t) * angle) / math.sin(angle), math.sin(method.t * angle) / math.sin(angle)


@combine.register
def slerp(method: expressions.Slerp, chunk: Chunk, known: tuple[float, float]) -> Tensor:
    """w_a a + w_b b with the weights of `slerp_weights` (Shoemake 1985)."""
    return weighted_sum(chunk.operands, known)


@survey.register
def nuslerp_weights(method: expressions.Nuslerp, chunks: Chunks, numel: int) -> tuple[float, float] | None:
    """The two weights of `slerp`; None where every row has its own."""
    if method.by == "rows" and next(chunks()).row is not None:
        return None
    return slerp_weights(expressions.Slerp(method.t), chunks, numel)


@combine.register
def nuslerp(method: expressions.Nuslerp, chunk: Chunk, known: tuple[float, float] | None) -> Tensor:
    """As `slerp`, of the whole tensor or of each of its rows."""
    if known is not None:
        return weighted_sum(chunk.operands, known)
    assert chunk.row is not None
    a_RC, b_RC = (x_C.view(-1, chunk.row) for x_C in chunk.operands)
    aa_R, ab_R, bb_R = (torch.linalg.vecdot(x_RC.double(), y_RC.double()) for x_RC, y_RC in ((a_RC, a_RC), (a_RC, b_RC), (b_RC, b_RC)))
    scale_R = aa_R.sqrt() * bb_R.sqrt()
    angle_R = torch.where(scale_R > 0, ab_R / scale_R, 1.0).clamp_(-1, 1).acos_()
    straight_R = angle_R.sin() < STRAIGHT
    sine_R = angle_R.sin().masked_fill_(straight_R, 1.0)
    weights = [
        torch.where(straight_R, share, (share * angle_R).sin() / sine_R)[:, None].to(a_RC.dtype) for share in (1 - method.t, method.t)
    ]
    return (a_RC * weights[0]).add_(b_RC * weights[1]).flatten()


# ---- the Riemannian mean ---------------------------------------------------------------------------------------------------


@survey.register
def karcher_weights(method: expressions.Karcher, chunks: Chunks, numel: int) -> tuple[float, ...]:
    """The operands' weights in their Karcher mean, which lies among their linear combinations, so that inner products are all it takes.

    From the mean m of the directions u_i on, m goes along the geodesic of the mean tangent, sum_i log_m(u_i) / n, until that is 0; of m the
    coefficients of the u_i are known.
    """
    gram_KK = gram(chunks, lambda chunk: chunk.operands)
    count = len(gram_KK)
    norms = [math.sqrt(gram_KK[i][i]) for i in range(count)]
    used = [index for index, norm in enumerate(norms) if norm > 0]
    cosines_UU = torch.tensor([[cosine(gram_KK, i, j) if i != j else 1.0 for j in used] for i in used], dtype=torch.float64)
    mean_U = _mean_direction(cosines_UU) if used else None
    if mean_U is None:
        return (1 / count,) * count
    length = math.fsum(norms) / count
    shares = dict(zip(used, mean_U.tolist(), strict=True))
    return tuple(length * shares[index] / norms[index] if index in shares else 0.0 for index in range(count))


def _mean_direction(cosines_UU: Tensor) -> Tensor | None:
    """The Karcher mean of unit vectors, as coefficients of them; None where they do not lie within 90 degrees of their sum."""
    count = len(cosines_UU)
    m_U = torch.full((count,), 1 / count, dtype=torch.float64)
    length = float(m_U @ cosines_UU @ m_U) ** 0.5 if float(m_U @ cosines_UU @ m_U) > 0 else 0.0
    if length < STRAIGHT or float((cosines_UU @ m_U).min()) < STRAIGHT * length:
        return None
    m_U /= length
    for _ in range(200):
        dots_U = (cosines_UU @ m_U).clamp_(-1, 1)
        angles_U = dots_U.acos()
        pulls_U = torch.where(angles_U > 1e-8, angles_U / angles_U.sin(), 1.0) / count
        tangent_U = pulls_U - (pulls_U @ dots_U) * m_U
        if float(tangent_U.abs().max()) < 1e-15:
            break
        step = float(tangent_U @ cosines_UU @ tangent_U)
        step = math.sqrt(step) if step > 0 else 0.0
        m_U = math.cos(step) * m_U + (math.sin(step) / step if step > 1e-8 else 1.0) * tangent_U
        m_U /= float(m_U @ cosines_UU @ m_U) ** 0.5
    return m_U


@combine.register
def karcher(method: expressions.Karcher, chunk: Chunk, known: tuple[float, ...]) -> Tensor:
    """sum_i w_i x_i with the weights of `karcher_weights`."""
    return weighted_sum(chunk.operands, known)
