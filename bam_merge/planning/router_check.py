"""Whether a router can be initialised as the recipe asks: what is possible for its shape, and what its dtype can hold."""

from bam_merge import expressions

RANGES = {
    "F64": (2.0**-149, 2.0**128 * (1 - 2.0**-24)), "F32": (2.0**-149, 2.0**128 * (1 - 2.0**-24)),
    "F16": (2.0**-24, 65504.0), "BF16": (2.0**-133, 2.0**128 * (1 - 2.0**-8)),
}  # fmt: skip
"""The smallest and largest numbers that a router stored in a dtype can hold; float64 ones are drawn in float32."""


LARGEST_SUM = 2.0**128 / 1e8
"""What a router's logits allow: sums of hidden_size products with normed hidden states, which must be finite in float32."""


def router_problem(init: expressions.Init, dtype: str) -> str | None:
    """Why `init`, stored as `dtype`, cannot be what it is called, in words that follow the recipe's key; None where it can."""
    experts, width = init.shape
    misfit, size = init.method.misfit(experts, width), init.method.size()
    if misfit or size is None:
        return misfit
    key, scale, reach = size
    smallest, largest = RANGES.get(dtype, RANGES["F32"])
    largest = min(largest, LARGEST_SUM)
    where = f"{key} {scale:g}"
    if reach > largest:
        return f"{where}: values of up to {reach:.3g}, and a router in {dtype} computes with up to {largest:.3g}. Use a smaller {key}."
    if scale < smallest:
        return f"{where}: below {smallest:.3g}, the smallest number of {dtype}: values would be 0. Use a larger {key}, or init: zeros."
    return None
