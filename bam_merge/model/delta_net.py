"""The gated delta net of the reference model (arXiv 2412.06464, equation 10), token by token: the recurrence as it is written.

Shape suffixes: B sequences, T tokens of this call, D hidden_size, X channels of all heads, W tokens that a convolution sees,
K query and key heads, H value heads (H / K to each of those), C channels of a key, E channels of a value
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from bam_merge.model.activations import ACTIVATIONS, wide
from bam_merge.model.model_config import ModelConfig
from bam_merge.model.norms import Linear
from bam_merge.model.positions import Cache

L2_EPS = 1e-6
"""Added to the squared length of a query or key, which is divided by its length."""


class Taps(nn.Module):
    """Convolution over the last W tokens, each channel by itself: the weight of this token is the last."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))

    def forward(self, x_BTX: Tensor, cache: Cache, key: tuple[int, str]) -> Tensor:
        """What is seen [B, T, X]; of tokens before the first, zeros. `key`: where the cache keeps the last W - 1 tokens."""
        width = self.weight.shape[-1]
        earlier = cache.kept(*key)
        earlier = x_BTX.new_zeros(x_BTX.shape[0], width - 1, x_BTX.shape[-1]) if earlier is None else earlier
        whole = torch.cat((earlier, x_BTX), 1)
        cache.keep(*key, whole[:, whole.shape[1] - width + 1 :])
        return sum((self.weight[:, 0, i] * whole[:, i : i + x_BTX.shape[1]] for i in range(width)), torch.zeros_like(x_BTX))


class DeltaNet(nn.Module):
    """For every value head a state S [C, E], which for each token forgets, looks up, corrects and answers:

        S <- exp(g) S;  S <- S + k (beta (v - k^T S));  y = q^T S          g = -exp(A_log) softplus(a x + dt_bias),  beta = sigmoid(b x)

    q, k and v are act(conv(W x)), q and k of length 1, q then by C^-0.5; heads' outputs are normed, times silu(z x), and projected.
    `built` false: no parameters, of a mixture whose experts have them.
    """

    def __init__(self, config: ModelConfig, built: bool = True) -> None:
        super().__init__()
        self.config = config
        D, K, H, C, E, W = config.hidden_size, *config.linear_sizes
        if not built:
            return
        self.in_proj_q, self.in_proj_k = Linear(D, K * C, False), Linear(D, K * C, False)
        self.in_proj_v, self.in_proj_z = Linear(D, H * E, False), Linear(D, H * E, False)
        self.in_proj_b, self.in_proj_a = Linear(D, H, False), Linear(D, H, False)
        self.conv_q, self.conv_k, self.conv_v = Taps(K * C, W), Taps(K * C, W), Taps(H * E, W)
        self.dt_bias, self.A_log = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.zeros(H))
        self.norm = HeadScale(config, E)
        self.out_proj = Linear(H * E, D, False)

    def mixed(self, x_BTD: Tensor, cache: Cache, key: tuple[int, str]) -> Tensor:
        """y [B, T, D] of tokens that follow those whose state the cache has under `key`: a layer, and a name."""
        (layer, name), act = key, ACTIVATIONS[self.config.hidden_act]
        K, H, C, E, _ = self.config.linear_sizes
        q_BTKC, k_BTKC, v_BTHE = (
            by_head(wide(act(conv(proj(x_BTD), cache, (layer, f"{part} {name}")))), heads)
            for part, proj, conv, heads in (
                ("q", self.in_proj_q, self.conv_q, K),
                ("k", self.in_proj_k, self.conv_k, K),
                ("v", self.in_proj_v, self.conv_v, H),
            )
        )
        q_BTHC, k_BTHC = (unit(z_BTKC).repeat_interleave(H // K, 2) for z_BTKC in (q_BTKC, k_BTKC))
        beta_BTH = wide(self.in_proj_b(x_BTD).sigmoid())
        g_BTH = -wide(self.A_log).exp() * softplus(wide(self.in_proj_a(x_BTD)) + wide(self.dt_bias))
        state_BHCE = cache.kept(layer, f"state {name}")
        if state_BHCE is None:
            state_BHCE = v_BTHE.new_zeros(x_BTD.shape[0], H, C, E)
        y = []
        for t in range(x_BTD.shape[1]):
            k_BHC1, v_BHE = k_BTHC[:, t, :, :, None], v_BTHE[:, t]
            state_BHCE = state_BHCE * g_BTH[:, t, :, None, None].exp()
            wrong_BHE = beta_BTH[:, t, :, None] * (v_BHE - (k_BHC1 * state_BHCE).sum(-2))
            state_BHCE = state_BHCE + k_BHC1 * wrong_BHE[:, :, None]
            y.append((C**-0.5 * q_BTHC[:, t, :, :, None] * state_BHCE).sum(-2))
        cache.keep(layer, f"state {name}", state_BHCE)
        gate_BTHE = by_head(wide(self.in_proj_z(x_BTD)), H)
        heads_BTHE = self.norm(torch.stack(y, 1).to(x_BTD.dtype)) * silu(gate_BTHE)
        y_BTD: Tensor = self.out_proj(heads_BTHE.flatten(-2).to(x_BTD.dtype))
        return y_BTD


class HeadScale(nn.Module):
    """RMS norm of each value head, with one weight per channel for all: never of 1 + w, whatever the model's other norms are."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.eps, self.weight = config.rms_norm_eps, nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        z = wide(x)
        return self.weight * (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def by_head(x_BTX: Tensor, heads: int) -> Tensor:
    """Channels of all heads as those of each [B, T, heads, channels of one]."""
    return x_BTX.reshape(*x_BTX.shape[:-1], heads, -1)


def unit(x: Tensor) -> Tensor:
    """Vectors along the last axis at length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)
