"""Whether a router can be initialised as the recipe asks: what is possible for its shape, and what its dtype can hold."""

from bam_merge import expressions
from bam_merge.checkpoints.dtypes import DTYPES

LARGEST_SUM = 2.0**128 / 1e8
"""What a router's logits allow: sums of hidden_size products with normed hidden states, which must be finite in float32."""


def router_problem(init: expressions.Init, dtype: str) -> str | None:
    """Why `init`, stored as `dtype`, cannot be what it is called, in words that follow the recipe's key; None where it can."""
    experts, width = init.shape
    misfit, size = init.method.misfit(experts, width), init.method.size()
    if misfit or size is None:
        return misfit
    key, scale, reach = size
    held = DTYPES[dtype if dtype in ("F16", "BF16") else "F32"]  # float64 ones are drawn in float32
    smallest, largest = held.least, min(held.largest, LARGEST_SUM)
    where = f"{key} {scale:g}"
    if reach > largest:
        return f"{where}: values of up to {reach:.3g}, and a router in {dtype} computes with up to {largest:.3g}. Use a smaller {key}."
    if scale < smallest:
        return f"{where}: below {smallest:.3g}, the smallest number of {dtype}: values would be 0. Use a larger {key}, or init: zeros."
    return None
