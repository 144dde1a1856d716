"""The rows of a router, from sums over its true inputs: one function for each record of a calibrator.

Shape suffixes:  K texts    D hidden_size    n tokens of all texts
"""

from functools import singledispatch

import torch
from torch import Tensor

from bam_merge import expressions
from bam_merge.calibrating.sums import Sums, by_rows
from bam_merge.errors import NonFiniteError


@singledispatch
def rows(method: expressions.Calibrator, sums: Sums, negative_KD: Tensor | None) -> Tensor:
    """The router's rows [K, D] in float64, one for each text. `negative_KD` are means of what is not typical of a text, zero where nothing
    is."""
    raise NotImplementedError(f"calibrating/rows.py makes no rows of {type(method).__name__}: a function under @rows.register is missing")


@rows.register
def ridge(method: expressions.Ridge, sums: Sums, negative_KD: None) -> Tensor:
    """scale (S + penalty tr(S)/D I)^-1 (mu_j - mean of mu) / N; for sigmoids (mu_j / N - mean of mu).

    With n < D inputs z_i, weighted so that S = Z^T Z, that is Z^T (Z Z^T + c I)^-1 a_j, where B_j = Z^T a_j: an n x n system.
    """
    count, width = sums.total_KD.shape
    if sums.inputs_nD is None:
        assert sums.second_DD is not None
        b_KD = (sums.means - sums.means.mean(0) * (count if method.sigmoid else 1)) / count
        return method.scale * _solved(sums.second_DD, method.penalty * _trace(sums.second_DD) / width, b_KD.T).T
    z_nD = sums.inputs_nD
    added = method.penalty * float(z_nD.square().sum()) / width
    share_nK = torch.zeros(len(z_nD), count, dtype=torch.float64, device=z_nD.device)
    first = 0
    for text, tokens in enumerate(sums.tokens):  # mu_j = sum of x_i / n_j, and x_i = z_i / sqrt(weight)
        share_nK[first : first + tokens, text] = 1 / (tokens * sums.weight(text) ** 0.5)
        first += tokens
    a_nK = (share_nK - share_nK.mean(1, keepdim=True) * (count if method.sigmoid else 1)) / count
    gram_nn = torch.empty(len(z_nD), len(z_nD), dtype=torch.float64, device=z_nD.device)
    by_rows(sums.pool, len(z_nD), lambda r: torch.mm(z_nD[r.start : r.stop], z_nD.T, out=gram_nn[r.start : r.stop]))
    rows_KD: Tensor = method.scale * (_solved(gram_nn, added, a_nK).T @ z_nD)
    return rows_KD


@rows.register
def hidden_mean(method: expressions.HiddenMean, sums: Sums, negative_KD: Tensor | None) -> Tensor:
    """d_j = mu_j / |mu_j|, centred, and scaled so that the mean token of a text is `scale` nearer to its expert than to the others."""
    mean_KD, count = sums.means, len(sums.tokens)
    typical_KD = mean_KD if negative_KD is None else mean_KD - negative_KD
    d_KD = typical_KD / typical_KD.norm(dim=1, keepdim=True)
    e_KD = d_KD - d_KD.mean(0)
    margin = count / (count - 1) * float((e_KD * mean_KD).sum(1).mean())
    if not margin > 0:
        raise NonFiniteError(
            "the means of the texts have one direction, so that no router follows from them. Give texts that differ, or init: ridge."
        )
    rows_KD: Tensor = method.scale / margin * e_KD
    if method.sigmoid:
        mean_D = mean_KD.mean(0)
        rows_KD = rows_KD - (1 - 1 / count) * method.scale * mean_D / mean_D.square().sum()
    return rows_KD


def _trace(matrix_DD: Tensor) -> float:
    return float(matrix_DD.diagonal().sum())


def _solved(matrix: Tensor, added: float, right: Tensor) -> Tensor:
    """(matrix + added I)^-1 right, in the place of the matrix, which is symmetric and not negative."""
    matrix.diagonal().add_(added)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise NonFiniteError("the second moments of the router's inputs are no positive matrix: is NaN or infinity in the seed?")
    solution: Tensor = torch.cholesky_solve(right, factor)
    return solution
