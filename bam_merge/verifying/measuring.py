"""How far apart two results of the same computation may be, and by what means and how deep one looks."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bam_merge.checkpoints.dtypes import DTYPE_BITS
from bam_merge.checkpoints.pieces import numel
from bam_merge.model.loading import StoredModel
from bam_merge.model.streaming import Computing
from bam_merge.text import ranges, some
from bam_merge.verifying.levels import Level
from bam_merge.verifying.report import Check

TOLERANCE = 1e-5
"""Largest difference of hidden states or logits, relative to their root mean square, that float32 arithmetic may cause."""


@dataclass
class Worst:
    """The largest of several measurements, and every place where one was beyond the tolerance."""

    name: str
    tolerance: float = field(default_factory=lambda: TOLERANCE)
    value: float = 0.0
    places: list[str] = field(default_factory=list)

    def add(self, value: float, place: str) -> None:
        value = value if value == value else float("inf")
        self.value = max(self.value, value)
        if value > self.tolerance:
            self.places.append(f"{place} ({value:.3g})")

    def check(self, passed: str) -> Check:
        return Check(self.name, not self.places, some(self.places, 6) if self.places else passed, self.value, self.tolerance)


def difference(a: Tensor, b: Tensor, carried: Tensor | None = None) -> float:
    """Largest absolute difference, relative to the root mean square of `b`, or to a tenth of its largest element where that is more:
    the rounding of one huge channel reaches all others through the products it stands in.

    What a block adds to the residual stream is known only to the rounding of the sum `carried`, whose few huge channels in real models
    (arXiv 2402.17762) would otherwise look like errors of the block: four roundings of each element are not counted.
    """
    scale = torch.maximum(b.square().mean().sqrt(), b.abs().max() / 10).clamp(min=1e-12)
    error = (a - b).abs()
    if carried is not None:
        error = (error - carried.abs() * 2 * torch.finfo(carried.dtype).eps).clamp(min=0).where(torch.isfinite(error), error)
    return float(error.max() / scale)


def positions_of(x_BTD: Tensor) -> Tensor:
    return torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[:2])


@dataclass(frozen=True)
class Way:
    """How a function is looked at: how deep, by what means, and who hears of the layers that have been run."""

    level: Level
    computing: Computing
    ran: Callable[[int], None] = lambda layer: None

    @property
    def precisions(self) -> tuple[Computing, ...]:
        """What to compute in, one after the other until no doubt is left."""
        wide = self.computing.in_float64()
        return (wide,) if self.level.thorough else (self.computing, wide)


def bytes_by_layer(*models: StoredModel) -> Counter[int]:
    """Bytes of the parameters of each layer of some models, as they are stored."""
    sizes: Counter[int] = Counter()
    for model in models:
        for name, leaf in model.leaves.items():
            if name.startswith("model.layers."):
                sizes[int(name.split(".", 3)[2])] += numel(leaf) * DTYPE_BITS[leaf.dtype] // 8
    return sizes


def of_layers(asked: Collection[int], layers: int) -> str:
    """Which layers an answer is of, where it is not all of them."""
    return "" if len(asked) == layers else f" (layers {ranges(sorted(asked)).strip('{}')})"
