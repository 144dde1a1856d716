"""A dense FFN and experts side by side, as gemma4 has them: norms of their own before and after, and a router that sees the residual."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bam_merge.model.model_config import ModelConfig
from bam_merge.model.norms import Norm


class Branches(nn.Module):
    """What stands around two FFNs of one block: N1(dense(x)) + N2(sum of g_i FFN_i(N3 h)), where x is the normed h.

    Gates are made of W(s * u(h)) / sqrt(D), with u(h) of root mean square 1, and multiplied with a factor for each expert.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.after_dense, self.before_experts, self.after_experts = Norm(config, D), Norm(config, D), Norm(config, D)
        self.unit = Norm(replace(config, norm_weights=False), D)
        self.router_scale = nn.Parameter(torch.ones(D))
        self.gate_factors = nn.Parameter(torch.ones(config.num_experts))

    def seen_by_router(self, h_BTD: Tensor) -> Tensor:
        """What the router multiplies with [B, T, D]."""
        y_BTD: Tensor = self.unit(h_BTD) * self.router_scale * h_BTD.shape[-1] ** -0.5
        return y_BTD

    def together(self, dense_BTD: Tensor, experts_BTD: Tensor) -> Tensor:
        """Both outputs, each normed."""
        y_BTD: Tensor = self.after_dense(dense_BTD) + self.after_experts(experts_BTD)
        return y_BTD
