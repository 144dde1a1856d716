"""The functions that a config.json's `hidden_act` can name."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

gelu_tanh = partial(gelu, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    return relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu, "swish": silu, "relu": relu, "gelu": gelu, "gelu_python": gelu, "gelu_new": gelu_tanh, "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh, "gelu_tanh": gelu_tanh, "gelu_python_tanh": gelu_tanh, "relu2": relu_squared,
}  # fmt: skip
"""What `hidden_act` names."""


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 where it is: what norms and softmaxes are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
