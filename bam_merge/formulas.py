"""Formulas: how a source's tensor that no file holds is computed, row by row, from stored ones. Frozen, plain data, no torch.

One record per formula. Its kernel is in merging/formulas.py, its second way in verifying/formulas.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from bam_merge.records import Formula

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LowRank(Formula):
    """W + sum_i s_i B_i A_i (LoRA, arXiv 2106.09685, section 4.1). Inputs: W [R, C]; then of each adapter A_i [r, C] and B_i [R, r].

    `transposed`, for embeddings: W + sum_i s_i (B_i A_i)^T, of A_i [r, R] and B_i [C, r].
    """

    adapters: tuple[str, ...]
    scales: tuple[float, ...]
    transposed: bool = False
    name: ClassVar = "lora"

    def shown(self, inputs: Sequence[str]) -> str:
        return f"{inputs[0]} + lora({', '.join(self.adapters)})"

    def held(self, shapes: Sequence[Shape], rows: int) -> int:
        ranks = [a[0] for a in shapes[1::2]]
        kept = shapes[2::2] if self.transposed else shapes[1::2]
        return 28 * rows * shapes[0][1] + 16 * rows * sum(ranks) + 16 * sum(map(prod, kept))
