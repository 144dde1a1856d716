"""What routers do before anyone asks them about text: how they look initialised, and where they send random tokens."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bam_merge.architectures.anatomy import Anatomy
from bam_merge.checkpoints.dtypes import ARITHMETIC_DTYPES, DTYPE_BITS
from bam_merge.checkpoints.pieces import Leaf, numel, stored
from bam_merge.checkpoints.reading import read_piece
from bam_merge.values.arrays import Array, widen
from bam_merge.values.wide import LEAST

TOKENS = 2048
"""Random inputs that a router is asked about; each has unit root mean square, as what a norm puts out before its weight."""


SEED = 0


@dataclass(frozen=True)
class RouterStats:
    """One router W [N, d]. `init` is what its values look like: zeros, orthogonal, uniform, normal, or other.

    `cosine` is the largest |cosine| of two rows, `condition` the largest over the smallest singular value (None: singular).
    Over the random inputs: `entropy` of softmax(W x), mean, as a share of log N; `load` the share of choices that go to each expert
    (top_k of them per token), or its mean gate where all are used.
    """

    name: str
    role: str
    layer: int | None
    experts: int
    std: float
    init: str
    cosine: float
    condition: float | None
    entropy: float
    load: tuple[float, ...]

    def document(self) -> dict[str, Any]:
        """As `inspect --json` prints it."""
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "load": list(self.load)}


def router_stats(anatomy: Anatomy) -> list[RouterStats]:
    """Every router of a model whose values are finite floats, layer by layer."""
    inputs: dict[int, Array] = {}
    found = []
    for (role, layer, _), leaf in anatomy.leaves.items():
        if role in ("router.attn", "router.ffn") and len(leaf.shape) == 2 and min(leaf.shape) > 0 and leaf.dtype in ARITHMETIC_DTYPES:
            w_ND = _read(anatomy, leaf)
            if np.isfinite(w_ND).all():
                D = leaf.shape[1]
                if D not in inputs:
                    inputs = {D: random_inputs(D)}
                found.append(_describe(anatomy, role, layer, stored(leaf).tensor, w_ND, inputs[D]))
    return sorted(found, key=lambda router: (router.role, router.layer or 0))


def random_inputs(d: int) -> Array:
    """TOKENS random vectors of unit root mean square, float64 [T, D]; the same ones every time, and with every numpy (NEP 19)."""
    x_TD = np.random.RandomState(SEED).standard_normal((TOKENS, d))
    scaled_TD: Array = x_TD / np.sqrt(np.square(x_TD).mean(1, keepdims=True))
    return scaled_TD


def _read(anatomy: Anatomy, leaf: Leaf) -> Array:
    """The router in float64 [N, D]."""
    size, count = DTYPE_BITS[leaf.dtype] // 8, numel(leaf)
    data = memoryview(bytearray(count * size))
    read_piece(anatomy.checkpoint, leaf, data)
    return widen(data, leaf.dtype, np.empty(count)).reshape(leaf.shape)


def _describe(anatomy: Anatomy, role: str, layer: int | None, name: str, w_ND: Array, x_TD: Array) -> RouterStats:
    N, facts = len(w_ND), anatomy.facts
    size = float(np.abs(w_ND).max()) or 1.0
    w_ND = w_ND / size  # so that no square leaves float64
    gram_NN = w_ND @ w_ND.T
    norms_N = np.sqrt(gram_NN.diagonal()).clip(np.finfo(np.float64).tiny)
    cosines_NN = gram_NN / norms_N[:, None] / norms_N
    np.fill_diagonal(cosines_NN, 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        singular = np.linalg.svd(w_ND, compute_uv=False)
        condition = float(singular[0] / singular[-1])
        logits_TN = x_TD @ w_ND.T
        gates_TN = np.exp((logits_TN - logits_TN.max(1, keepdims=True)) * size)
        gates_TN /= gates_TN.sum(1, keepdims=True)
        surprise_TN = gates_TN * np.log(np.maximum(gates_TN, LEAST))  # 0 where the gate is
    soft = role == "router.attn" and facts.get("attention_routing") != "top_k"
    top_k = None if soft else facts.get("num_attention_experts_per_tok" if role == "router.attn" else "num_experts_per_tok")
    return RouterStats(
        name=name,
        role=role,
        layer=layer,
        experts=N,
        std=float(w_ND.std()) * size,
        init=looks_like(w_ND),
        cosine=float(np.abs(cosines_NN).max()),
        condition=condition if math.isfinite(condition) else None,
        entropy=-float(surprise_TN.sum(1).mean()) / math.log(N) if N > 1 else 0.0,
        load=tuple(_load(gates_TN, top_k).tolist()),
    )


def _load(gates_TN: Array, top_k: object) -> Array:
    """Each expert's share of the choices, or its mean gate where all are used. Among equal gates the first experts are chosen."""
    N = gates_TN.shape[1]
    if type(top_k) is not int or not 0 < top_k < N:
        mean_N: Array = gates_TN.mean(0)
        return mean_N
    chosen_TK = np.argsort(-gates_TN, axis=1, kind="stable")[:, :top_k]
    share_N: Array = np.bincount(chosen_TK.ravel(), minlength=N) / chosen_TK.size
    return share_N


def looks_like(w_ND: Array) -> str:
    """The initialisation that the values agree with: by the Gram matrix, then mean and kurtosis (normal 3, uniform 1.8) within five
    standard errors. What training has moved far enough is "other"."""
    if not w_ND.any():
        return "zeros"
    w_ND = w_ND / np.abs(w_ND).max()
    (N, D), count = w_ND.shape, w_ND.size
    gram_NN = w_ND @ w_ND.T
    if 1 < N <= D and np.abs(gram_NN / gram_NN.diagonal().mean() - np.eye(N)).max() < 1e-2:
        return "orthogonal"
    mean = float(w_ND.mean())
    square_ND = np.square(w_ND - mean)
    variance = float(square_ND.mean())
    if count < 64 or abs(mean) > 5 * math.sqrt(variance / count):
        return "other"
    kurtosis = float(np.square(square_ND).mean()) / variance**2
    for name, expected, error in (("normal", 3.0, math.sqrt(24 / count)), ("uniform", 1.8, math.sqrt(1.32 / count))):
        if abs(kurtosis - expected) < 5 * error:
            return name
    return "other"
