"""The element of a whole tensor that so many others reach, in bounded memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SURVEY_BINS, SURVEY_SORTED = 2**12, 2**20
"""Bins of a histogram, and the most elements that are sorted, where a whole tensor is searched for a threshold."""


def kth_largest(blocks: Callable[[], Iterator[Tensor]], k: int) -> float:
    """The k-th largest of all elements of the blocks, none of them negative.

    Exact in bounded memory: the range that holds it is cut into equal bins again and again, until what is left in it can be sorted
    or is all the same. (The merge counts bit patterns.)
    """
    low, high = 0.0, max(float(block.max()) for block in blocks())
    while low < high:

        def binned(block: Tensor, low: float = low, high: float = high) -> tuple[Tensor, Tensor]:
            inside = block[(block >= low) & (block <= high)]
            return inside, ((inside.double() - low) / (high - low) * SURVEY_BINS).long().clamp_(max=SURVEY_BINS - 1)  # rises with the value

        counts = torch.stack([torch.bincount(binned(block)[1], minlength=SURVEY_BINS) for block in blocks()]).sum(0)
        above = counts.flip(0).cumsum(0).flip(0)  # elements of this bin or a higher one
        chosen = int((above >= k).nonzero()[-1])
        k -= int(above[chosen] - counts[chosen])
        kept = (inside[bins == chosen] for inside, bins in map(binned, blocks()))
        if counts[chosen] <= SURVEY_SORTED:
            return float(torch.cat(list(kept)).sort(descending=True).values[k - 1])
        ends = [(float(values.min()), float(values.max())) for values in kept if len(values)]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    return low
