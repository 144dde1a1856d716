"""BAM (Branch-Attend-Mix, arXiv 2408.08274) and BTX (2403.07816) mixtures for transformers. Travels with a checkpoint.

All attention experts are one attention call. Its heads stand in the order (k/v head, expert, query head of the group), so that
grouped-query attention finds each expert's keys (Expert-KV), or the shared ones (Shared-KV: larger groups); each head's output is
multiplied with its expert's gate, and one o_proj adds them up. Files hold one tensor per expert and projection; loading fuses
them, and saving cuts them again, without changing a bit.

Shape suffixes:  B sequences of the batch    T tokens of this call    D hidden_size    F intermediate_size    N experts
                 K key/value heads of one expert    G query heads to each    C channels of a head    P rotary pairs of channels
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_bam import BamConfig

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What this release of transformers calls a cache, in its functions and outputs; forward passes take either name."""


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 where it is: what norms, rotations and gates are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def capped(x: Tensor, cap: float | None) -> Tensor:
    """c tanh(x / c): about x where x is small, and never above c."""
    return x if cap is None else cap * (x / cap).tanh()


# ---- norms and positions ---------------------------------------------------------------------------------------------------


class BamLayerNorm(nn.Module):
    """RMS norm over the last axis; layer norm is the same of the centred vector."""

    def __init__(self, config: BamConfig, *shape: int, bias: bool = False, weighted: bool = True) -> None:
        super().__init__()
        self.centred = config.norm_type == "layer_norm"
        self.eps = config.layer_norm_eps if self.centred else config.rms_norm_eps
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.full(shape, 1.0 - self.offset)) if weighted and config.norm_weights else None
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


class BamHeadLayerNorm(BamLayerNorm):
    """Norm of q or k [B, T, heads, C], whose heads stand in the order (k/v head, expert, query head of the group).

    Weights, by what they are for (qk_norm_shape): "head" [C], of experts [N, 1, C]; "heads" [heads, C], "heads in a row" [heads * C];
    "all heads" [H * C], of experts [N, H * C], and there the norm is of the H heads of an expert together.
    """

    def __init__(self, config: BamConfig, experts: int, heads: int, group: int, channels: int) -> None:
        shapes = {
            "head": (*((experts, 1) if experts else ()), channels),
            "heads": (heads, channels),
            "heads in a row": (heads * channels,),
            "all heads": (*((experts,) if experts else ()), heads // max(experts, 1) * channels),
        }
        super().__init__(config, *shapes[config.qk_norm_weights], bias=config.qk_norm_bias)
        self.together = config.qk_norm_weights == "all heads"
        of_each = config.qk_norm_weights.startswith("heads")
        self.channels = channels if config.qk_norm_weights == "heads in a row" else None
        self.by_expert = (experts, group) if experts and not of_each else None

    def laid_out(self, weight: Tensor) -> Tensor:
        return weight if self.channels is None else weight.view(-1, self.channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_expert is None:
            return super().forward(x.flatten(-2)).view_as(x) if self.together else super().forward(x)
        x = x.unflatten(-2, (-1, *self.by_expert))
        if self.together:
            by_expert = x.transpose(-4, -3)
            return super().forward(by_expert.flatten(-3)).view(by_expert.shape).transpose(-4, -3).flatten(-4, -2)
        return super().forward(x).flatten(-4, -2)


class BamScale(nn.Module):
    """A stored number to multiply with, which training leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class BamRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles, in float32 or wider, from the configuration alone.

    Without buffers, so that no cast of the model rounds the frequencies, and in the precision of the model, which transformers'
    own functions (always float32) are not. Where frequencies depend on the length (dynamic, longrope), each sequence has its own.
    """

    def __init__(self, config: BamConfig) -> None:
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """[B or 1, T, 1, P] each, for layers such as `layer`."""
        sliding = self.config.sliding_rope_parameters if self.config.layer_types[layer] == "sliding_attention" else None
        rope, channels = sliding or self.config.rope_parameters, self.config.size("head_dim", layer)
        position_BT = position_ids.to(torch.promote_types(x.dtype, torch.float32))
        device_type = x.device.type if x.device.type != "mps" else "cpu"
        with torch.autocast(device_type, enabled=False):
            freqs_BP, factor = self.frequencies(rope, channels, position_BT.amax(-1, keepdim=True) + 1)
            angles_BTxP = (position_BT[..., None] * freqs_BP[:, None])[:, :, None]
            return angles_BTxP.cos() * factor, angles_BTxP.sin() * factor

    def frequencies(self, rope: dict[str, Any], channels: int, lengths_Bx: Tensor) -> tuple[Tensor, float]:
        """Radians per position [B or 1, P], and the factor on cosines and sines (arXiv 2104.09864, section 3.4.2).

        linear: arXiv 2306.15595; dynamic NTK and YaRN: 2309.00071; LongRoPE: 2402.13753; llama3: Llama 3.1.
        """
        kind, theta, most = rope.get("rope_type", "default"), rope["rope_theta"], self.config.max_position_embeddings or 1
        original = rope.get("original_max_position_embeddings") or most
        factor = rope.get("factor") or most / original
        rotary = int(channels * (rope.get("partial_rotary_factor") or 1.0))
        pairs_P = torch.arange(0, rotary, 2, dtype=lengths_Bx.dtype, device=lengths_Bx.device)
        freqs_P = 1.0 / theta ** (pairs_P / rotary)
        if kind == "default":
            return freqs_P[None], 1.0
        if kind == "linear":
            return freqs_P[None] / factor, 1.0
        if kind == "dynamic":
            stretch_Bx = factor * lengths_Bx.clamp(min=most) / most - (factor - 1)
            return 1.0 / (theta * stretch_Bx ** (rotary / (rotary - 2))) ** (pairs_P / rotary), 1.0
        if kind == "llama3":
            few, many = rope["low_freq_factor"], rope["high_freq_factor"]
            kept_P = ((original * freqs_P / (2 * math.pi) - few) / (many - few)).clamp(0, 1)
            return (kept_P * freqs_P + (1 - kept_P) * freqs_P / factor)[None], 1.0
        if kind == "yarn":
            first, last = (
                rotary * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
            )
            if rope.get("truncate", True):
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, rotary - 1)
            stretched_P = ((pairs_P / 2 - first) / (last - first if last != first else 0.001)).clamp(0, 1)
            return (stretched_P * freqs_P / factor + (1 - stretched_P) * freqs_P)[None], _yarn_factor(rope, factor)
        if kind == "proportional":  # the first pairs turn as if all did, the others stay
            turning = int((rope.get("partial_rotary_factor") or 1.0) * channels // 2)
            freqs_P = 1.0 / theta ** (torch.arange(0, 2 * turning, 2).to(pairs_P) / channels) / (rope.get("factor") or 1.0)
            return nn.functional.pad(freqs_P, (0, channels // 2 - turning))[None], 1.0
        if kind == "longrope":
            short_P, long_P = (torch.tensor(rope[key]).to(pairs_P) for key in ("short_factor", "long_factor"))
            scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return freqs_P / torch.where(lengths_Bx > original, long_P, short_P), float(rope.get("attention_factor") or scale)
        raise ValueError(f"rope_type {kind!r} is not known here")


def _yarn_factor(rope: dict[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4), or DeepSeek's ratio of two such terms."""

    def term(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    both = rope.get("mscale") and rope.get("mscale_all_dim")
    return float(rope.get("attention_factor") or (term(rope["mscale"]) / term(rope["mscale_all_dim"]) if both else term(1)))


def rotate(x_BThC: Tensor, cos_BTxP: Tensor, sin_BTxP: Tensor, interleaved: bool) -> Tensor:
    """Turn each pair of channels by its angle; channels beyond the pairs pass. A pair is (i, i + P), or neighbours if interleaved."""
    P = cos_BTxP.shape[-1]
    turning, passing = x_BThC[..., : 2 * P], x_BThC[..., 2 * P :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :P], turning[..., P:])
    turned = (a * cos_BTxP - b * sin_BTxP, b * cos_BTxP + a * sin_BTxP)
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((turned.to(x_BThC.dtype), passing), -1)


# ---- routers ---------------------------------------------------------------------------------------------------------------


class BamRouter(nn.Module):
    """Logits [B, T, N] of the experts: W x, without bias. No nn.Linear, so that adapters and quantisers leave it alone."""

    def __init__(self, config: BamConfig, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return nn.functional.linear(x_BTD, self.weight)


def attention_gates(config: BamConfig, logits_BTN: Tensor) -> Tensor:
    """Gates [B, T, N] in float32 or wider: softmax over all; of top_k, p_i / detach(sum of the chosen p), else 0."""
    p_BTN = wide(logits_BTN).softmax(-1)
    if config.attention_routing != "top_k":
        return p_BTN
    chosen = p_BTN.topk(config.num_attention_experts_per_tok or config.num_attention_experts, -1).indices
    kept_BTN = p_BTN * torch.zeros_like(p_BTN).scatter(-1, chosen, 1.0)
    return kept_BTN / kept_BTN.sum(-1, keepdim=True).detach()


def ffn_gates(config: BamConfig, logits_BTN: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen experts [B, T, k] and their gates, in float32 or wider: p_i, or softmax over the chosen (norm_topk_prob); of sigmoids
    s_i, or their shares of the chosen ones' sum."""
    logits_BTN = wide(logits_BTN)
    if config.scoring_func == "sigmoid":
        s_BTk, chosen_BTk = logits_BTN.sigmoid().topk(config.num_experts_per_tok, -1)
        gates_BTk = s_BTk / (s_BTk.sum(-1, keepdim=True) + 1e-20) if config.norm_topk_prob else s_BTk
        return chosen_BTk, gates_BTk * config.gate_scale
    p_BTk, chosen_BTk = logits_BTN.softmax(-1).topk(config.num_experts_per_tok, -1)
    gates_BTk = logits_BTN.gather(-1, chosen_BTk).softmax(-1) if config.norm_topk_prob else p_BTk
    return chosen_BTk, gates_BTk * config.gate_scale


def router_losses(logits_XN: Tensor, k: int | None, counts_X: Tensor | None, sigmoid: bool = False) -> tuple[Tensor, Tensor]:
    """(balance, z) of one router over X tokens, of which those with `counts_X` = 0 are padding. `k` None: soft routing. See BamConfig."""
    logits_XN = wide(logits_XN)
    weights_X = torch.ones_like(logits_XN[:, 0]) if counts_X is None else counts_X.to(logits_XN)
    weights_X = weights_X / weights_X.sum().clamp(min=1)
    p_XN = logits_XN.sigmoid() / (logits_XN.sigmoid().sum(-1, keepdim=True) + 1e-20) if sigmoid else logits_XN.softmax(-1)
    sent_XN = p_XN if k is None else torch.zeros_like(p_XN).scatter(-1, p_XN.topk(k, -1).indices, 1.0 / k)
    balance = logits_XN.shape[-1] * ((weights_X @ sent_XN) * (weights_X @ p_XN)).sum()
    return balance, weights_X @ logits_XN.logsumexp(-1).square()


# ---- attention -------------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scaling + mask) v: [B, T, heads, C], and the weights [B, heads, T, S]. q [B, heads, T, C]; k and v have fewer heads."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = capped(torch.matmul(query, key.transpose(2, 3)) * scaling, softcap)
    scores = wide(scores if attention_mask is None else scores + attention_mask)
    weights = nn.functional.dropout(scores.softmax(-1).to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class BamAttentionExperts(nn.Module):
    """The projections and norms that stand per expert, fused; files call them `experts.{e}.*`."""


class BamAttention(nn.Module):
    """All attention experts in one call; or one attention, where the mixture has no attention experts."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        N, D, C = config.num_attention_experts, config.hidden_size, config.size("head_dim", layer_idx)
        H, K = config.size("num_attention_heads", layer_idx), config.size("num_key_value_heads", layer_idx)
        heads = max(N, 1) * H
        self.mixed, self.shares_kv = N > 0, config.shares_kv(layer_idx)
        kv_experts = 0 if self.shares_kv else N
        kv_heads, group = K * max(kv_experts, 1), H // K
        self.channels_per_gate = group * C  # that stand together under one gate: one expert's query heads of one key/value head
        self.head_dim, self.attention_dropout, self.is_causal = C, config.attention_dropout, True
        self.scaling = C**-0.5 if config.attention_scale is None else config.attention_scale
        self.rotates = config.rope_layers is None or layer_idx in config.rope_layers
        self.num_key_value_groups = heads // kv_heads
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        if self.mixed:
            self.router = BamRouter(config, N)
            self.gates = nn.Identity()  # under tensor parallelism it adds up the processes' gradients of the gates
            self.experts = BamAttentionExperts()
        own, kv = self.parts()
        own.q_proj = nn.Linear(D, heads * C, bias=config.attention_bias)
        kv.k_proj = nn.Linear(D, kv_heads * C, bias=config.attention_bias)
        self.value_is_key = config.values_are_keys and self.sliding_window is None
        if not self.value_is_key:
            kv.v_proj = nn.Linear(D, kv_heads * C, bias=config.attention_bias)
        self.value_norm = BamLayerNorm(config, weighted=False) if config.value_norm else nn.Identity()
        own.o_proj = nn.Linear(heads * C, D, bias=config.attention_out_bias and not self.mixed)
        self.mixed_bias = config.attention_out_bias and self.mixed
        if self.mixed_bias:
            own.o_proj_bias = nn.Linear(N, D, bias=False)  # the sum of the experts' biases, weighted by their gates
        if config.attention_gate:
            own.gate_proj = nn.Linear(D, heads * C, bias=config.attention_bias)
        if config.qk_norm:
            own.q_norm = BamHeadLayerNorm(config, N, heads, group, C)
            kv.k_norm = BamHeadLayerNorm(config, kv_experts, kv_heads, 1, C)

    def parts(self) -> tuple[nn.Module, nn.Module]:
        """The modules that hold q and o, and k and v."""
        own = self.experts if self.mixed else self
        return own, self if self.shares_kv else own

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        gates: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """y [B, T, D], and the attention weights where the implementation gives them. `gates` [B, T, N] of a mixture."""
        own, kv = self.parts()
        shape_BT = hidden_states.shape[:-1]
        key = kv.k_proj(hidden_states)
        projected = (own.q_proj(hidden_states), key, key if self.value_is_key else kv.v_proj(hidden_states))
        if self.config.attention_clip is not None:
            projected = (x.clamp(-self.config.attention_clip, self.config.attention_clip) for x in projected)
        query, key, value = (x.view(*shape_BT, -1, self.head_dim) for x in projected)
        value = self.value_norm(value)
        if self.config.qk_norm and not self.config.qk_norm_after_rotary:
            query, key = own.q_norm(query), kv.k_norm(key)
        if self.rotates:
            query, key = (rotate(x, *position_embeddings, self.config.rope_interleaved) for x in (query, key))
        if self.config.qk_norm and self.config.qk_norm_after_rotary:
            query, key = own.q_norm(query), kv.k_norm(key)
        if self.config.query_growth is not None:
            query = self.grown(query, kwargs["position_ids"])
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        heads, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **({} if self.config.attention_softcap is None else {"softcap": self.config.attention_softcap}),
            **kwargs,
        )
        if self.config.attention_gate:
            heads = heads.reshape(*shape_BT, -1) * own.gate_proj(hidden_states).sigmoid()
        if gates is not None:
            heads_BTKNx = heads.reshape(*shape_BT, -1, gates.shape[-1], self.channels_per_gate)
            heads = (wide(heads_BTKNx) * self.gates(gates)[..., None, :, None]).to(hidden_states.dtype)
        y_BTD = own.o_proj(heads.reshape(*shape_BT, -1).contiguous())
        if self.mixed_bias:
            y_BTD = y_BTD + own.o_proj_bias(gates.to(y_BTD.dtype))
        return y_BTD, weights

    def grown(self, query: Tensor, position_ids: Tensor) -> Tensor:
        """Queries [B, T, heads, C] times 1 + query_growth ln(1 + floor(position / original context))."""
        original = self.config.rope_parameters["original_max_position_embeddings"]
        turns_BT = (position_ids.clamp(min=0) / original).floor().to(torch.promote_types(query.dtype, torch.float32))
        return query * (1 + self.config.query_growth * turns_BT.log1p())[..., None, None].to(query.dtype)


# ---- linear attention ------------------------------------------------------------------------------------------------------


CHUNK = 64
"""Tokens that the delta rule takes at a time."""


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gated delta rule (arXiv 2412.06464, section 3.3) in chunks, and the state [B, heads, C, E] after it: y [B, heads, T, E].

    q and k [B, heads, T, C], v [B, heads, T, E], g and beta [B, heads, T]. Token t makes of the state S before it

        S_t = exp(g_t) S_{t-1} + k_t u_t^T,  u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t),  y_t = S_t^T q_t

    Within a chunk, with G_t the sum of its g up to t: u_t + beta_t sum over s < t of exp(G_t - G_s) (k_t k_s) u_s
    = beta_t (v_t - exp(G_t) S^T k_t), a triangular system for all its u at once.
    """
    T, E = v.shape[-2:]
    size = min(CHUNK, T)
    missing = -T % size
    q, k, v = (nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, size)) for x in (q, k, v))
    g, beta = (nn.functional.pad(x, (0, missing)).unflatten(2, (-1, size)) for x in (g, beta))
    decay = g.cumsum(-1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(q.new_ones(size, size, dtype=torch.bool).triu(1), -torch.inf).exp()
    system = beta[..., None] * (k @ k.transpose(-1, -2)) * between
    right = torch.cat((beta[..., None] * v, (beta * decay.exp())[..., None] * k), -1)
    written, read = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split((E, k.shape[-1]), -1)
    seen = (q @ k.transpose(-1, -2)) * between
    asking, kept = q * decay.exp()[..., None], k * (decay[..., -1:] - decay).exp()[..., None]
    state = q.new_zeros(*q.shape[:2], q.shape[-1], E) if state is None else state.to(q)
    outputs = []
    for chunk in range(q.shape[2]):
        u = written[:, :, chunk] - read[:, :, chunk] @ state
        outputs.append(asking[:, :, chunk] @ state + seen[:, :, chunk] @ u)
        state = state * decay[:, :, chunk, -1, None, None].exp() + kept[:, :, chunk].transpose(-1, -2) @ u
    return torch.cat(outputs, 2)[:, :, :T], state


def unit(x: Tensor) -> Tensor:
    """Vectors along the last axis at length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class BamHeadScale(nn.Module):
    """RMS norm of each head [..., N, heads, E], its weight [E], or [N, 1, E] of N experts; never of 1 + w."""

    def __init__(self, config: BamConfig, *shape: int) -> None:
        super().__init__()
        self.eps, self.weight = config.rms_norm_eps, nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        z = wide(x)
        return self.weight * (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class BamLinearAttention(nn.Module):
    """The gated delta nets of all experts as one of as many heads, expert after expert; or one, where the layer has no experts.

    q, k and v are act(conv(W x)); each head's output is normed, times silu(z x), times its expert's gate, and one out_proj adds all up.
    """

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.mixed = config.attention_linear == "expert" and config.num_attention_experts > 0
        self.num_experts = N = config.num_attention_experts if self.mixed else 1
        K, H, C, E = (
            config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
        )  # fmt: skip
        self.per_key, self.key_dim, self.value_dim, self.width = H // K, C, E, config.linear_conv_kernel_dim
        self.act_fn = ACT2FN[config.hidden_act]
        if self.mixed:
            self.router = BamRouter(config, N)
            self.experts = BamAttentionExperts()
        own, D = self.experts if self.mixed else self, config.hidden_size
        for part, rows in (("q", K * C), ("k", K * C), ("v", H * E), ("z", H * E), ("b", H), ("a", H)):
            setattr(own, f"in_proj_{part}", nn.Linear(D, N * rows, bias=False))
        for part, rows in (("q", K * C), ("k", K * C), ("v", H * E)):
            setattr(own, f"conv_{part}", nn.Conv1d(N * rows, N * rows, self.width, groups=N * rows, bias=False))
        own.dt_bias, own.A_log = nn.Parameter(torch.ones(N * H)), nn.Parameter(torch.zeros(N * H))
        own.norm = BamHeadScale(config, *((N, 1) if self.mixed else ()), E)
        own.out_proj = nn.Linear(N * H * E, D, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        gates: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """y [B, T, D]. `attention_mask` [B, T] is 0 at padding, which leaves no trace in the states; `gates` [B, T, N] of a mixture."""
        own, dtype = self.experts if self.mixed else self, hidden_states.dtype
        x_BTD = hidden_states if attention_mask is None else hidden_states * attention_mask[..., None].to(dtype)
        before, state = self.states(cache)
        qkv_BXT = torch.cat([proj(x_BTD) for proj in (own.in_proj_q, own.in_proj_k, own.in_proj_v)], -1).transpose(1, 2)
        query, key, value = self.seen(own, qkv_BXT, before, cache)
        query, key = (unit(x.unflatten(-1, (-1, self.key_dim))).repeat_interleave(self.per_key, 2) for x in (query, key))
        value = value.unflatten(-1, (-1, self.value_dim))
        g = -wide(own.A_log).exp() * nn.functional.softplus(wide(own.in_proj_a(x_BTD)) + own.dt_bias)
        beta = wide(own.in_proj_b(x_BTD).sigmoid())
        by_head = [x.transpose(1, 2) for x in (query * self.key_dim**-0.5, key, value, g, beta)]
        heads, state = delta_rule(*by_head, state)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        heads = heads.transpose(1, 2).to(dtype).unflatten(2, (self.num_experts, -1))
        z = wide(own.in_proj_z(x_BTD)).view(heads.shape)
        heads = (own.norm(heads) * nn.functional.silu(z)).to(dtype)
        if gates is not None:
            heads = (wide(heads) * gates[..., None, None]).to(dtype)
        return own.out_proj(heads.flatten(2)), None

    def states(self, cache: Cache | None) -> tuple[Tensor | None, Tensor | None]:
        """What earlier tokens left: the last of what the convolutions saw [B, X, at least W - 1], and the state."""
        if cache is None:
            return None, None
        if hasattr(cache, "get_conv_state"):
            return cache.get_conv_state(self.layer_idx), cache.get_recurrent_state(self.layer_idx)
        layer = cache.layers[self.layer_idx]  # of transformers before 5.20
        return (layer.conv_states, layer.recurrent_states) if layer.has_previous_state else (None, None)

    def seen(self, own: nn.Module, new_BXT: Tensor, before: Tensor | None, cache: Cache | None) -> tuple[Tensor, ...]:
        """q, k and v [B, T, X] of all heads, in float32 or wider: what the convolutions make of these tokens and the last ones before."""
        sizes, T = [own.in_proj_q.out_features, own.in_proj_k.out_features, own.in_proj_v.out_features], new_BXT.shape[-1]
        before = new_BXT.new_zeros(*new_BXT.shape[:2], self.width) if before is None else before.to(new_BXT.dtype)
        whole_BXS = torch.cat((before, new_BXT), -1)
        if cache is not None:
            kept = new_BXT if hasattr(cache, "get_conv_state") else whole_BXS[..., -self.width :]
            cache.update_conv_state(kept, self.layer_idx, conv_kernel_size=self.width)
        weight = torch.cat([conv.weight for conv in (own.conv_q, own.conv_k, own.conv_v)])
        seen_BXT = nn.functional.conv1d(whole_BXS[..., -T - self.width + 1 :], weight, groups=weight.shape[0])
        return wide(self.act_fn(seen_BXT).transpose(1, 2)).split(sizes, -1)


# ---- feed-forward network --------------------------------------------------------------------------------------------------


@use_experts_implementation
class BamExperts(nn.Module):
    """The FFN experts' weights [N, ...]: down(act(gate x) * up x), or down(act(up x)) where the family's FFN is not gated.

    transformers' implementations read `up_proj` of an FFN without gate; here it has the name `gate_up_proj` all the same, so that
    one conversion serves both.
    """

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        N, D, F = config.num_experts, config.hidden_size, config.size("intermediate_size", layer_idx)
        rows = 2 * F if config.gated_ffn else F
        self.num_experts, self.hidden_dim, self.intermediate_dim = N, D, F
        self.act_fn = ACT2FN[config.hidden_act]
        self.gate_up_proj = nn.Parameter(torch.empty(N, rows, D))
        self.down_proj = nn.Parameter(torch.empty(N, D, F))
        if config.mlp_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(N, rows))
            self.down_proj_bias = nn.Parameter(torch.empty(N, D))

    @property
    def up_proj(self) -> Tensor:
        return self.gate_up_proj

    @property
    def up_proj_bias(self) -> Tensor:
        return self.gate_up_proj_bias

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y [X, D] of X tokens [X, D], their k experts [X, k] and gates [X, k]."""
        y_XD = wide(torch.zeros_like(hidden_states))
        for e in range(self.num_experts):
            token, place = torch.where(top_k_index == e)
            bias = (self.gate_up_proj_bias[e], self.down_proj_bias[e]) if self.has_bias else (None, None)
            up = nn.functional.linear(hidden_states[token], self.gate_up_proj[e], bias[0])
            z = nn.functional.linear(self._apply_gate(up) if self.has_gate else self.act_fn(up), self.down_proj[e], bias[1])
            y_XD = y_XD.index_add(0, token, (z * top_k_weights[token, place, None]).to(y_XD.dtype))
        return y_XD.to(hidden_states.dtype)


class BamSparseMoe(nn.Module):
    """gate_scale * sum over the chosen i of g_i(x) FFN_i(x)."""

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.router = BamRouter(config, config.num_experts)
        self.experts = BamExperts(config, layer_idx)
        self.experts.has_gate, self.experts.has_bias = config.gated_ffn, config.mlp_bias

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, T, D] and the router's logits [B, T, N]."""
        logits_BTN = self.router(x_BTD)
        chosen_BTk, gates_BTk = ffn_gates(self.config, logits_BTN)
        y_XD = self.experts(x_BTD.flatten(0, 1), chosen_BTk.flatten(0, 1), gates_BTk.flatten(0, 1))
        return y_XD.view(x_BTD.shape), logits_BTN


# ---- the model -------------------------------------------------------------------------------------------------------------


class BamDecoderLayer(GradientCheckpointingLayer):
    """Sequential: h = x + attention(LN1 x); h + ffn(LN2 h). Parallel: x + attention(LN1 x) + ffn(LN1 x or LN2 x).

    Without config.pre_norms there is neither LN1 nor LN2. With config.post_norms what attention and FFN give is normed, all experts
    together. What is added is multiplied with residual_scale first; with config.layer_scale what comes out with a stored number.
    """

    def __init__(self, config: BamConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = self.norm(config.pre_norms)
        self.self_attn = (BamLinearAttention if config.is_linear(layer_idx) else BamAttention)(config, layer_idx)
        self.mlp = BamSparseMoe(config, layer_idx)
        self.scale = 1.0 if config.residual_scale is None else config.residual_scale
        self.one_norm = config.parallel_block and config.parallel_norms == 1
        if not self.one_norm:
            self.post_attention_layernorm = self.norm(config.pre_norms)
        self.post_self_attn_layernorm, self.post_mlp_layernorm = self.norm(config.post_norms), self.norm(config.post_norms)
        self.layer_scale = BamScale() if config.layer_scale else nn.Identity()

    def norm(self, there: bool) -> nn.Module:
        return BamLayerNorm(self.config, self.config.hidden_size, bias=self.config.norm_bias) if there else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states [B, T, D], and the logits [B, T, N] of the FFN's and the attention's router.

        Logits are returned, not recorded by hooks, so that auxiliary losses reach the routers through either kind of checkpointing.
        """
        normed = self.input_layernorm(hidden_states)
        logits = self.self_attn.router(normed) if self.self_attn.mixed else None
        attention, _ = self.self_attn(
            hidden_states=normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            gates=None if logits is None else attention_gates(self.config, logits),
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        h = hidden_states + self.scale * self.post_self_attn_layernorm(attention)
        if not self.one_norm:
            normed = self.post_attention_layernorm(hidden_states if self.config.parallel_block else h)
        ffn, ffn_logits = self.mlp(normed)
        return self.layer_scale(h + self.scale * self.post_mlp_layernorm(ffn)), ffn_logits, logits


@dataclass
class BamModelOutputWithPast(BaseModelOutputWithPast):
    """`router_logits`: of each layer's FFN router [B * T, N]; `attention_router_logits` likewise; `attention_gates` [B, T, N]."""

    router_logits: tuple[Tensor, ...] | None = None
    attention_router_logits: tuple[Tensor, ...] | None = None
    attention_gates: tuple[Tensor, ...] | None = None


@dataclass
class BamCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`loss` is NLL plus the routers' losses, `aux_loss` these over router_aux_loss_coef (see BamConfig); the rest as in BamModel."""

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    attention_router_logits: tuple[Tensor, ...] | None = None
    attention_gates: tuple[Tensor, ...] | None = None


class BamPreTrainedModel(PreTrainedModel):
    config_class = BamConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BamDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(BamDecoderLayer, index=0),
        "attentions": OutputRecorder(BamAttention, index=1),
    }

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        """Not where scores are capped, which it has no way to do: eager is then the default, and flex attention another way."""
        if self.config.attention_softcap is not None:
            raise ValueError('attention_softcap is not computed by "sdpa": use attn_implementation="eager" or "flex_attention"')
        return super()._sdpa_can_dispatch(is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, BamRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, BamLayerNorm) and module.weight is not None:
            init.constant_(module.weight, 1.0 - module.offset)
        elif isinstance(module, BamHeadScale):
            init.ones_(module.weight)
        elif isinstance(module, BamLinearAttention | BamAttentionExperts) and hasattr(module, "A_log"):
            init.ones_(module.dt_bias)
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(0.01, 16).log_())
        elif isinstance(module, BamScale):
            init.ones_(module.weight)
        elif isinstance(module, BamExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
            if self.config.mlp_bias:
                init.zeros_(module.gate_up_proj_bias)
                init.zeros_(module.down_proj_bias)


class BamModel(BamPreTrainedModel):
    """All but the head."""

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BamDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = BamLayerNorm(config, config.hidden_size, bias=config.norm_bias)
        self.rotary_emb = BamRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._is_stateful = "linear_attention" in config.layer_types
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_attention_gates: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BamModelOutputWithPast:
        """`attention_mask` [B, S] is 0 at padding; or a prepared mask, or one for each kind of layer."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.embedding_scale is not None:
            inputs_embeds = inputs_embeds * self._embedding_scale(inputs_embeds)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        masks = self._masks(inputs_embeds, attention_mask, cache, position_ids)
        types = self.config.layer_types
        if self.config.sliding_rope_parameters or self.config.sizes_by_kind:
            turns = {kind: self.rotary_emb(inputs_embeds, position_ids, types.index(kind)) for kind in dict.fromkeys(types)}
        else:
            turns = dict.fromkeys(types, self.rotary_emb(inputs_embeds, position_ids, 0))
        hidden_states, ffn_logits, attention_logits = inputs_embeds, (), ()
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states, of_ffn, of_attention = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=turns[kind],
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
            ffn_logits += (of_ffn,)
            attention_logits += (of_attention,) if of_attention is not None else ()
        want_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        gates = tuple(attention_gates(self.config, logits) for logits in attention_logits) if output_attention_gates else None
        return BamModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE: cache},
            router_logits=tuple(logits.flatten(0, 1) for logits in ffn_logits) if want_logits else None,
            attention_router_logits=tuple(logits.flatten(0, 1) for logits in attention_logits) if want_logits else None,
            attention_gates=gates,
        )

    def _embedding_scale(self, inputs_embeds: Tensor) -> Any:
        """The factor on embeddings, also on those that are given instead of ids: embed_tokens' own output is without it."""
        scale = self.config.embedding_scale
        return torch.tensor(scale, dtype=inputs_embeds.dtype).item() if self.config.embedding_scale_in_dtype else scale

    def _masks(self, inputs_embeds: Tensor, attention_mask: Any, cache: Cache | None, position_ids: Tensor) -> dict[str, Any]:
        """The mask of each kind of layer."""
        if isinstance(attention_mask, dict):
            return attention_mask
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and inputs_embeds.shape[1] > 1:
            there = attention_mask[:, -inputs_embeds.shape[1] :]  # a token that is decoded alone is no padding
        else:
            there = None
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {
            kind: there
            if kind == "linear_attention"
            else makers[kind](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            )
            for kind in dict.fromkeys(self.config.layer_types)
        }


class BamForCausalLM(BamPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: BamConfig) -> None:
        super().__init__(config)
        self.model = BamModel(config)
        self.vocab_size = config.vocab_size
        self._is_stateful = self.model._is_stateful
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_attention_gates: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BamCausalLMOutputWithPast:
        """Logits [B, T, V]; with `labels` [B, T] (-100: not predicted) the loss. What is in it, and when: see BamConfig."""
        shown = self.config.output_router_logits if output_router_logits is None else output_router_logits
        routed = shown or (shown is None and labels is not None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=bool(routed),
            output_attention_gates=output_attention_gates,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        if self.config.logit_scale is not None:
            logits = logits * self.config.logit_scale
        logits = capped(logits, self.config.logit_softcap)
        total = self.router_loss(outputs, attention_mask, hidden_states) if routed else None
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            if total is not None:
                loss = loss + total.to(loss) * _share(labels, **kwargs)
        return BamCausalLMOutputWithPast(
            loss=loss,
            aux_loss=None if total is None else total / (self.config.router_aux_loss_coef or 1.0),
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if shown else None,
            attention_router_logits=outputs.attention_router_logits if shown else None,
            attention_gates=outputs.attention_gates,
        )

    def router_loss(self, outputs: BamModelOutputWithPast, attention_mask: Any, hidden_states: Tensor) -> Tensor:
        """The weighted sum of all routers' losses: `total` in BamConfig."""
        config, counts_X = self.config, None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            counts_X = attention_mask[:, -hidden_states.shape[1] :].flatten()
        soft = config.attention_routing != "top_k"
        attention_k = None if soft else config.num_attention_experts_per_tok or config.num_attention_experts
        total = wide(hidden_states.new_zeros(()))
        for layers, k, coefficient, sigmoid in (
            (outputs.router_logits, config.num_experts_per_tok, config.router_aux_loss_coef, config.scoring_func == "sigmoid"),
            (outputs.attention_router_logits, attention_k, config.attention_router_aux_loss_coef, False),
        ):
            for logits_XN in layers:
                counts = None if counts_X is None else counts_X.to(logits_XN.device)
                balance, z = router_losses(logits_XN, k, counts, sigmoid)
                total = total + (coefficient * balance + config.router_z_loss_coef * z).to(total.device)
        return total / config.num_hidden_layers if config.router_loss_reduction == "mean" else total


def _share(labels: Tensor, num_items_in_batch: Any = None, shift_labels: Tensor | None = None, **kwargs: Any) -> Any:
    """This call's part of the tokens that the optimiser's step predicts: over accumulated calls the parts add up to one, as NLL does."""
    if num_items_in_batch is None:
        return 1.0
    predicted = labels[..., 1:] if shift_labels is None else shift_labels
    items = num_items_in_batch.to(labels.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    return predicted.ne(-100).sum() / items


# ---- from files with one tensor per expert, and back -------------------------------------------------------------------------


class BamFuseHeads(ConversionOps):
    """The tensors of all attention experts as one, heads in the order (k/v head, expert, head of the group) along axis `dim`.

    `unit` says what stands together: an expert's "query" heads or "key" head of one k/v head, in channels or (for the norm of each of
    the heads) in heads; "expert": the tensor as a whole. Sizes are taken from the tensors: under tensor parallelism they are parts.
    """

    def __init__(self, unit: str, dim: int = 0) -> None:
        self.unit, self.dim = unit, dim

    def rows(self, config: BamConfig, full_layer_name: str = "", **kwargs: Any) -> int | None:
        layer = int(re.search(r"layers\.(\d+)\.", full_layer_name)[1]) if config.sizes_by_kind else 0  # all are alike
        heads, kv_heads, channels = (config.size(size, layer) for size in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        group = heads // kv_heads
        if self.unit == "expert" or (self.unit.endswith("norm") and not config.qk_norm_weights.startswith("heads")):
            return None
        channels_of_norm = channels if config.qk_norm_weights == "heads in a row" else 1
        return {"query": group * channels, "key": channels, "query norm": group * channels_of_norm, "key norm": channels_of_norm}[self.unit]

    def of_any_head(self, config: BamConfig) -> bool:
        return self.unit.endswith("norm") and config.qk_norm_weights == "head"

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], config: BamConfig, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors, rows, dim = input_dict.pop(source_patterns[0]), self.rows(config, **kwargs), self.dim
        if rows is None:
            fused = torch.stack([tensor[None] for tensor in tensors] if self.of_any_head(config) else tensors, dim)
        elif tensors[0].shape[dim] % rows:
            raise ValueError(
                f"{tensors[0].shape[dim]} rows are not whole k/v heads of {rows} rows: num_key_value_heads_per_expert must be a "
                "multiple of the processes that share the model (tp_size)"
            )
        else:
            fused = torch.stack([tensor.unflatten(dim, (-1, rows)) for tensor in tensors], dim + 1).flatten(dim, dim + 2)
        return {target_patterns[0]: fused}

    @property
    def reverse_op(self) -> ConversionOps:
        return BamSplitHeads(self.unit, self.dim)


class BamSplitHeads(BamFuseHeads):
    """One fused tensor as those of the attention experts."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], config: BamConfig, **kwargs: Any
    ) -> dict[str, Tensor]:
        fused, rows, dim = _only(input_dict.pop(source_patterns[0])), self.rows(config, **kwargs), self.dim
        if rows is None:
            tensors = [part.squeeze(0) if self.of_any_head(config) else part for part in fused.unbind(dim)]
        else:
            parts = fused.unflatten(dim, (-1, config.num_attention_experts, rows)).unbind(dim + 1)
            tensors = [part.flatten(dim, dim + 1) for part in parts]
        return _named(target_patterns[0], tensors)

    @property
    def reverse_op(self) -> ConversionOps:
        return BamFuseHeads(self.unit, self.dim)


class BamJoinExperts(ConversionOps):
    """The tensors of all experts of linear attention as one, behind one another along `dim`; or, with `new`, on an axis of their own."""

    def __init__(self, dim: int = 0, new: bool = False) -> None:
        self.dim, self.new = dim, new

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = input_dict.pop(source_patterns[0])
        return {target_patterns[0]: torch.stack([tensor[None] for tensor in tensors]) if self.new else torch.cat(tensors, self.dim)}

    @property
    def reverse_op(self) -> ConversionOps:
        return BamPartExperts(self.dim, self.new)


class BamPartExperts(BamJoinExperts):
    """One tensor as those of the experts."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], config: BamConfig, **kwargs: Any
    ) -> dict[str, Tensor]:
        joined, N = _only(input_dict.pop(source_patterns[0])), config.num_attention_experts
        return _named(target_patterns[0], joined[:, 0].unbind(0) if self.new else joined.chunk(N, self.dim))

    @property
    def reverse_op(self) -> ConversionOps:
        return BamJoinExperts(self.dim, self.new)


class BamFuseFfn(ConversionOps):
    """The `up` and (of a gated FFN) `gate` tensors of all experts as one: gate before up along axis 1."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        up, gate = source_patterns
        parts = [torch.stack(input_dict.pop(name)) for name in (gate, up) if name in input_dict]
        return {target_patterns[0]: torch.cat(parts, 1)}

    @property
    def reverse_op(self) -> ConversionOps:
        return BamSplitFfn()


class BamSplitFfn(ConversionOps):
    """One fused tensor as the experts' `up` and `gate`."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], config: BamConfig, **kwargs: Any
    ) -> dict[str, Tensor]:
        fused, (up, gate) = _only(input_dict.pop(source_patterns[0])), target_patterns
        parts = dict(zip((gate, up), fused.chunk(2, 1), strict=True)) if config.gated_ffn else {up: fused}
        return {name: tensor for pattern, part in parts.items() for name, tensor in _named(pattern, part.unbind(0)).items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return BamFuseFfn()


def _only(tensors: Any) -> Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


def _named(pattern: str, tensors: Any) -> dict[str, Tensor]:
    """`pattern` with each expert's number, and a tensor that shares no memory with the others."""
    return {pattern.replace("*", str(e)): t.clone(memory_format=torch.contiguous_format) for e, t in enumerate(tensors)}


def _conversions() -> list[WeightConverter]:
    heads, ffn = "self_attn.experts.", "mlp.experts."
    fused = {
        **{f"q_proj.{kind}": BamFuseHeads("query") for kind in ("weight", "bias")},
        **{f"{part}_proj.{kind}": BamFuseHeads("key") for part in "kv" for kind in ("weight", "bias")},
        "o_proj.weight": BamFuseHeads("query", 1),
        **{f"gate_proj.{kind}": BamFuseHeads("query") for kind in ("weight", "bias")},
        **{f"in_proj_{part}.weight": BamJoinExperts() for part in "qkvzba"},
        **{f"conv_{part}.weight": BamJoinExperts() for part in "qkv"},
        **{name: BamJoinExperts() for name in ("dt_bias", "A_log")},
        "norm.weight": BamJoinExperts(new=True),
        "out_proj.weight": BamJoinExperts(1),
        **{f"q_norm.{kind}": BamFuseHeads("query norm") for kind in ("weight", "bias")},
        **{f"k_norm.{kind}": BamFuseHeads("key norm") for kind in ("weight", "bias")},
    }
    return [
        *(WeightConverter(f"{heads}*.{name}", f"{heads}{name}", operations=[op]) for name, op in fused.items()),
        WeightConverter(f"{heads}*.o_proj.bias", f"{heads}o_proj_bias.weight", operations=[BamFuseHeads("expert", 1)]),
        WeightConverter([f"{ffn}*.up_proj.weight", f"{ffn}*.gate_proj.weight"], f"{ffn}gate_up_proj", operations=[BamFuseFfn()]),
        WeightConverter([f"{ffn}*.up_proj.bias", f"{ffn}*.gate_proj.bias"], f"{ffn}gate_up_proj_bias", operations=[BamFuseFfn()]),
        WeightConverter(f"{ffn}*.down_proj.weight", f"{ffn}down_proj", operations=[MergeModulelist(dim=0)]),
        WeightConverter(f"{ffn}*.down_proj.bias", f"{ffn}down_proj_bias", operations=[MergeModulelist(dim=0)]),
    ]


register_checkpoint_conversion_mapping("bam", _conversions(), overwrite=True)

__all__ = ["BamForCausalLM", "BamModel", "BamPreTrainedModel"]
