"""Norms of the reference model, what it computes them in, and its linear layers."""

import torch
from torch import Tensor, nn

from bam_merge.model.activations import wide
from bam_merge.model.model_config import ModelConfig


def capped(x: Tensor, cap: float | None) -> Tensor:
    """c tanh(x / c): about x where x is small, and never above c."""
    return x if cap is None else cap * (x / cap).tanh()


class Linear(nn.Linear):
    """A linear layer that draws its weights only where there is memory for them: a block without any is built to be filled."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Norm(nn.Module):
    """RMS norm over the last axis. Layer norm is the same of the centred vector."""

    def __init__(self, config: ModelConfig, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.centred = config.norm_type == "layer_norm"
        self.eps = config.layer_norm_eps if self.centred else config.rms_norm_eps
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.ones(shape)) if config.norm_weights else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        z = wide(x)
        z = z - z.mean(-1, keepdim=True) if self.centred else z
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
        weight, bias = (None if w is None else self.laid_out(w) for w in (self.weight, self.bias))
        if weight is not None:
            z = (self.offset + wide(weight) if self.offset else weight) * z
        return (z if bias is None else z + bias).to(x.dtype)

    def laid_out(self, weight: Tensor) -> Tensor:
        """Weights or biases as they are multiplied or added."""
        return weight
