"""What routers do before anyone asks them about text: how they look initialised, and where they send random tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bam_merge.architectures.anatomy import Anatomy
from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import Read, Slice, leaf_runs, numel, stored
from bam_merge.checkpoints.reading import read_runs
from bam_merge.values.tensors import TORCH_DTYPES, buffer, decode

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
    inputs: dict[int, Tensor] = {}
    found = []
    for (role, layer, _), leaf in anatomy.leaves.items():
        if role in ("router.attn", "router.ffn") and len(leaf.shape) == 2 and min(leaf.shape) > 0 and leaf.dtype in TORCH_DTYPES:
            w_ND = _read(anatomy, leaf)
            if bool(w_ND.isfinite().all()):
                D = leaf.shape[1]
                if D not in inputs:
                    inputs = {D: random_inputs(D)}
                found.append(_describe(anatomy, role, layer, stored(leaf).tensor, w_ND, inputs[D]))
    return sorted(found, key=lambda router: (router.role, router.layer or 0))


def random_inputs(d: int) -> Tensor:
    """TOKENS random vectors of unit root mean square, float32 [T, D]; the same ones every time."""
    x_TD = torch.randn(TOKENS, d, generator=torch.Generator().manual_seed(SEED))
    return x_TD / x_TD.square().mean(1, keepdim=True).sqrt()


def _read(anatomy: Anatomy, leaf: Read | Slice) -> Tensor:
    size = DTYPE_BITS[leaf.dtype] // 8
    bytes_B, view = buffer(numel(leaf) * size)
    runs = ((first * size, count * size) for first, count in leaf_runs(leaf, 0, numel(leaf)))
    read_runs(anatomy.checkpoint, anatomy.checkpoint.tensors[stored(leaf).tensor], runs, view)
    return decode(bytes_B, leaf.dtype).reshape(leaf.shape).to(torch.float64)


def _describe(anatomy: Anatomy, role: str, layer: int | None, name: str, w_ND: Tensor, x_TD: Tensor) -> RouterStats:
    N, facts = len(w_ND), anatomy.facts
    size = float(w_ND.abs().max()) or 1.0
    w_ND = w_ND / size  # so that no square leaves float64
    gram_NN = w_ND @ w_ND.T
    norms_N = gram_NN.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    cosines_NN = (gram_NN / norms_N[:, None] / norms_N).fill_diagonal_(0)
    singular = torch.linalg.svdvals(w_ND)
    logits_TN = x_TD.double() @ w_ND.T
    gates_TN = torch.softmax((logits_TN - logits_TN.max(1, keepdim=True).values) * size, 1)
    condition = float(singular[0] / singular[-1])
    entropy = -float(torch.special.xlogy(gates_TN, gates_TN).sum(1).mean())
    soft = role == "router.attn" and facts.get("attention_routing") != "top_k"
    top_k = None if soft else facts.get("num_attention_experts_per_tok" if role == "router.attn" else "num_experts_per_tok")
    return RouterStats(
        name=name,
        role=role,
        layer=layer,
        experts=N,
        std=float(w_ND.std(correction=0)) * size,
        init=looks_like(w_ND),
        cosine=float(cosines_NN.abs().max()),
        condition=condition if math.isfinite(condition) else None,
        entropy=entropy / math.log(N) if N > 1 else 0.0,
        load=tuple(float(share) for share in _load(gates_TN, top_k)),
    )


def _load(gates_TN: Tensor, top_k: object) -> Tensor:
    if type(top_k) is not int or not 0 < top_k < gates_TN.shape[1]:
        return gates_TN.mean(0)
    chosen_TK = gates_TN.topk(top_k, 1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=gates_TN.shape[1]).double() / chosen_TK.numel()


def looks_like(w_ND: Tensor) -> str:
    """The initialisation that the values agree with: by the Gram matrix, then mean and kurtosis (normal 3, uniform 1.8) within five
    standard errors. What training has moved far enough is "other"."""
    if not bool(w_ND.any()):
        return "zeros"
    w_ND = w_ND / w_ND.abs().max()
    (N, D), count = w_ND.shape, w_ND.numel()
    gram_NN = w_ND @ w_ND.T
    scale = gram_NN.diagonal().mean()
    if 1 < N <= D and float((gram_NN / scale - torch.eye(N, dtype=w_ND.dtype)).abs().max()) < 1e-2:
        return "orthogonal"
    centred = w_ND - w_ND.mean()
    variance = centred.square().mean()
    if count < 64 or abs(float(w_ND.mean())) > 5 * math.sqrt(float(variance) / count):
        return "other"
    kurtosis = float(centred.pow(4).mean() / variance.square())
    for name, expected, error in (("normal", 3.0, math.sqrt(24 / count)), ("uniform", 1.8, math.sqrt(1.32 / count))):
        if abs(kurtosis - expected) < 5 * error:
            return name
    return "other"
