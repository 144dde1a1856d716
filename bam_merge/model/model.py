"""The reference model: what a checkpoint computes, written to be read. Plain torch, one device, a loop over the experts.

It is this project's definition of the method (BAM, arXiv 2408.08274; BTX, 2403.07816; Sparse Upcycling, 2212.05055) and the
oracle that proves merges right, so it shares no code with the merge, and nothing in it is clever. One class runs dense models,
dense and mixed attention, dense and mixed FFNs; its parameters have the names of a bam checkpoint's tensors. A `Block` can be
built and run alone, so that a verifier never holds a whole model.

Shape suffixes:  B sequences of the batch    T tokens of this call    S tokens so far: cached ones and these
                 D hidden_size    F intermediate_size    V vocab_size    N experts
                 H query heads and K key/value heads of one expert    C channels of a head (head_dim)
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bam_merge.model.activations import ACTIVATIONS, wide
from bam_merge.model.branches import Branches
from bam_merge.model.delta_net import DeltaNet
from bam_merge.model.gates import SIGMOIDS, route
from bam_merge.model.model_config import ModelConfig
from bam_merge.model.norms import Linear, Norm, capped
from bam_merge.model.positions import Cache, grown, rotate, turns, visible


class HeadNorm(Norm):
    """Norm of the queries or keys [B, T, H, C] of one attention: of each head, or of all its heads as one vector."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        C, kind = config.head_dim, config.qk_norm_weights
        shape = {"head": (C,), "heads": (heads, C), "heads in a row": (heads * C,), "all heads": (heads * C,)}[kind]
        super().__init__(config, *shape, bias=config.qk_norm_bias)
        self.together, self.channels = kind == "all heads", C if kind == "heads in a row" else None

    def laid_out(self, weight: Tensor) -> Tensor:
        return weight if self.channels is None else weight.view(-1, self.channels)

    def forward(self, x_BTHC: Tensor) -> Tensor:
        return super().forward(x_BTHC.flatten(-2)).view_as(x_BTHC) if self.together else super().forward(x_BTHC)


# ---- attention -------------------------------------------------------------------------------------------------------------


Turn = tuple[Tensor, Tensor] | None
"""Cosines and sines of positions; None where nothing rotates."""


class Heads(nn.Module):
    """One multi-head attention MHA(x) with grouped keys and values; or of an expert the part that it does not share."""

    def __init__(self, config: ModelConfig, query: bool = True, key_value: bool = True) -> None:
        super().__init__()
        self.config = config
        D, C, bias = config.hidden_size, config.head_dim, config.attention_bias
        H, K = config.num_attention_heads_per_expert, config.num_key_value_heads_per_expert

        def norm(heads: int) -> nn.Module:
            return HeadNorm(config, heads) if config.qk_norm else nn.Identity()

        if query:
            self.q_proj, self.q_norm = Linear(D, H * C, bias), norm(H)
            self.gate_proj = Linear(D, H * C, bias) if config.attention_gate else None
            self.o_proj = Linear(H * C, D, config.attention_out_bias)
        if key_value:
            self.k_proj, self.k_norm = Linear(D, K * C, bias), norm(K)
            self.v_proj = None if config.values_are_keys else Linear(D, K * C, bias)
            self.v_norm = Norm(replace(config, norm_weights=False)) if config.value_norm else nn.Identity()

    def placed(self, norm: nn.Module, x_BTHC: Tensor, turn: Turn) -> Tensor:
        """Queries or keys, normed and rotated, in the order that the family has; as they are where neither is done."""
        late = self.config.qk_norm_after_rotary
        x_BTHC = x_BTHC if late else norm(x_BTHC)
        x_BTHC = x_BTHC if turn is None else rotate(x_BTHC, *turn, self.config.rope_interleaved)
        return norm(x_BTHC) if late else x_BTHC

    def heads(self, x_BTX: Tensor) -> Tensor:
        """What a projection gives, clipped, as its heads [B, T, H or K, C]."""
        most, shape = self.config.attention_clip, (*x_BTX.shape[:-1], -1, self.config.head_dim)
        return x_BTX.reshape(shape) if most is None else x_BTX.clamp(-most, most).reshape(shape)

    def keys_values(self, x_BTD: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """The rotated keys, and the values, of these tokens, each [B, T, K, C]. `turn`: cosines and sines of their positions."""
        k_BTKC = self.heads(self.k_proj(x_BTD))
        v_BTKC = k_BTKC if self.v_proj is None else self.heads(self.v_proj(x_BTD))
        return self.placed(self.k_norm, k_BTKC, turn), self.v_norm(v_BTKC)

    def attend(self, x_BTD: Tensor, at: tuple[Turn, Tensor], k_BSKC: Tensor, v_BSKC: Tensor, seen_BTS: Tensor) -> Tensor:
        """o(softmax(scale q k^T) v) [B, T, D]; with a gate, o(softmax(scale q k^T) v * sigmoid(gate x)). `at`: the turn of these tokens and
        their positions [B, T]."""
        C, scale = self.config.head_dim, self.config.attention_scale
        q_BTHC = self.placed(self.q_norm, self.heads(self.q_proj(x_BTD)), at[0])
        q_BTHC = grown(self.config.query_growth, self.config.rope_parameters, at[1], q_BTHC)
        k_BSHC, v_BSHC = (z.repeat_interleave(q_BTHC.shape[2] // z.shape[2], 2) for z in (k_BSKC, v_BSKC))
        scores_BHTS = wide(torch.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC) * (C**-0.5 if scale is None else scale))
        scores_BHTS = capped(scores_BHTS, self.config.attention_softcap)
        hidden = torch.finfo(scores_BHTS.dtype).min  # not -inf: padding sees nothing, and must not become NaN
        weights_BHTS = scores_BHTS.masked_fill(~seen_BTS[:, None], hidden).softmax(-1).to(x_BTD.dtype)
        seen_BTX = torch.einsum("bhts,bshc->bthc", weights_BHTS, v_BSHC).flatten(-2)
        y_BTD: Tensor = self.o_proj(seen_BTX if self.gate_proj is None else seen_BTX * self.gate_proj(x_BTD).sigmoid())
        return y_BTD


def gates_of_attention(config: ModelConfig) -> tuple[int, str]:
    """What `route` needs to know of a router of attention experts."""
    N = config.num_attention_experts
    soft = config.attention_routing != "top_k"
    return (N, "softmax_then_topk") if soft else (config.num_attention_experts_per_tok or N, "renormalised")


class Attention(Heads):
    """The dense attention MHA(x), or the mixture sum_j g_j(x) MHA_j(x), whose experts may share keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        N, shares_kv = config.num_attention_experts, config.attention_kv == "shared" or layer in (config.shared_kv_layers or ())
        super().__init__(config, query=N == 0, key_value=N == 0 or shares_kv)
        self.layer, self.shares_kv = layer, shares_kv
        self.window = config.sliding_window if config.slides(layer) else None
        self.rotates = config.rope_layers is None or layer in config.rope_layers
        if N:
            self.router, self.gates = Linear(config.hidden_size, N, bias=False), gates_of_attention(config)
        self.experts = cast(Sequence[Heads], nn.ModuleList(Heads(config, key_value=not shares_kv) for _ in range(N)))

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, cache: Cache, force_expert: int | None) -> tuple[Tensor, Tensor | None]:
        """y [B, T, D], and the gates [B, T, N] of a mixture."""
        config = self.config
        turn: Turn = None
        if self.rotates:
            turn = turns(config.rope_of(self.layer), config.head_dim, config.max_position_embeddings, positions_BT, x_BTD.dtype)
        seen_BTS = visible(positions_BT, cache.extend(self.layer, "positions", positions_BT), self.window)

        def cached(heads: Heads, name: str) -> tuple[Tensor, Tensor]:
            k_BTKC, v_BTKC = heads.keys_values(x_BTD, turn)
            return cache.extend(self.layer, f"k {name}", k_BTKC), cache.extend(self.layer, f"v {name}", v_BTKC)

        if not self.experts:
            return self.attend(x_BTD, (turn, positions_BT), *cached(self, "all"), seen_BTS), None
        gates_BTN = route(self.router, x_BTD, *self.gates, force_expert)
        shared = cached(self, "all") if self.shares_kv else None
        y_BTD = wide(torch.zeros_like(x_BTD))
        for j, expert in enumerate(self.experts):
            keys_values = shared or cached(expert, str(j))  # of every expert: later tokens may choose it
            if gates_BTN[..., j].any():
                y_BTD = y_BTD + gates_BTN[..., j, None] * expert.attend(x_BTD, (turn, positions_BT), *keys_values, seen_BTS)
        return y_BTD.to(x_BTD.dtype), gates_BTN


class LinearAttention(DeltaNet):
    """One gated delta net in the place of attention, or the mixture sum_j g_j(x) DeltaNet_j(x), each with a state of its own."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        N = config.num_attention_experts if config.attention_linear == "expert" else 0
        super().__init__(config, built=N == 0)
        self.layer, self.shares_kv = layer, False
        if N:
            self.router, self.gates = Linear(config.hidden_size, N, bias=False), gates_of_attention(config)
        self.experts = cast(Sequence[DeltaNet], nn.ModuleList(DeltaNet(config) for _ in range(N)))

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, cache: Cache, force_expert: int | None) -> tuple[Tensor, Tensor | None]:
        """y [B, T, D], and the gates [B, T, N] of a mixture. Padding leaves no trace in the states."""
        cache.extend(self.layer, "positions", positions_BT)
        there_BTD = x_BTD.masked_fill(positions_BT[..., None] < 0, 0)
        if not self.experts:
            return self.mixed(there_BTD, cache, (self.layer, "all")), None
        gates_BTN = route(self.router, x_BTD, *self.gates, force_expert)
        y_BTD = wide(torch.zeros_like(x_BTD))
        for j, expert in enumerate(self.experts):  # of every expert: what it keeps of these tokens may matter later
            y_BTD = y_BTD + gates_BTN[..., j, None] * expert.mixed(there_BTD, cache, (self.layer, str(j)))
        return y_BTD.to(x_BTD.dtype), gates_BTN


# ---- feed-forward network --------------------------------------------------------------------------------------------------


class Ffn(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where the family's FFN is not gated."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        D, bias = config.hidden_size, config.mlp_bias
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = Linear(D, width, bias) if config.gated_ffn else None
        self.up_proj, self.down_proj = Linear(D, width, bias), Linear(width, D, bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up = self.up_proj(x_BTD)
        y_BTD: Tensor = self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x_BTD)) * up)
        return y_BTD


class FfnMixture(nn.Module):
    """gate_scale * sum over i in T of g_i(x) FFN_i(x), and with a shared expert its output besides: weighted by sigmoid(w x) (gated), as
    it is (sum), or as it is and half of both taken (average). With a dense FFN beside it (gemma4) what `Branches` says, of x and of `h`,
    from which x was normed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        N, D, shared = config.num_experts, config.hidden_size, config.shared_expert_intermediate_size
        kinds = SIGMOIDS if config.scoring_func == "sigmoid" else ("softmax_then_topk", "topk_then_softmax")
        self.gates = (config.num_experts_per_tok, kinds[config.norm_topk_prob])
        self.gate_scale, self.shared_mix = config.gate_scale, config.shared_expert_mix
        self.router = Linear(D, N, bias=False)
        self.choice_bias = nn.Parameter(torch.zeros(N)) if config.choice_bias else None
        self.experts = nn.ModuleList(Ffn(config, config.intermediate_size) for _ in range(N))
        self.shared_expert = Ffn(config, shared) if shared else None
        self.shared_expert_gate = Linear(D, 1, bias=False) if shared and self.shared_mix == "gated" else None
        beside = config.dense_intermediate_size
        self.dense = Ffn(config, beside) if beside else None
        self.branches = Branches(config) if beside else None

    def forward(self, x_BTD: Tensor, force_expert: int | None, h_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y [B, T, D] and the gates [B, T, N], before gate_scale. A forced expert is not scaled: it stands for its dense model."""
        if self.dense is not None and self.branches is not None and h_BTD is not None:
            return self.beside_dense(self.dense, self.branches, x_BTD, h_BTD, force_expert)
        gates_BTN = route(self.router, x_BTD, *self.gates, force_expert, self.choice_bias)
        y_BTD = self.sum(x_BTD, gates_BTN)
        y_BTD = y_BTD if force_expert is not None else self.gate_scale * y_BTD
        if self.shared_expert is not None:
            y_BTD = self.beside(x_BTD, y_BTD, self.shared_expert(x_BTD))
        return y_BTD.to(x_BTD.dtype), gates_BTN

    def beside(self, x_BTD: Tensor, y_BTD: Tensor, shared_BTD: Tensor) -> Tensor:
        """What the chosen experts give, `y_BTD`, with what the shared one gives."""
        if self.shared_expert_gate is not None:
            gate_BT1: Tensor = self.shared_expert_gate(x_BTD).sigmoid()
            return y_BTD + gate_BT1 * shared_BTD
        return (y_BTD + shared_BTD) / (2 if self.shared_mix == "average" else 1)

    def beside_dense(self, dense: Ffn, around: Branches, x_BTD: Tensor, h_BTD: Tensor, force_expert: int | None) -> tuple[Tensor, Tensor]:
        """The same of experts beside a dense FFN."""
        gates_BTN = route(self.router, around.seen_by_router(h_BTD), *self.gates, force_expert)
        weights_BTN = gates_BTN if force_expert is not None else gates_BTN * around.gate_factors
        experts_BTD = self.sum(around.before_experts(h_BTD), weights_BTN).to(x_BTD.dtype)
        return around.together(dense(x_BTD), experts_BTD), gates_BTN

    def sum(self, x_BTD: Tensor, gates_BTN: Tensor) -> Tensor:
        """sum over i of g_i FFN_i(x), in float32 or wider."""
        y_BTD = wide(torch.zeros_like(x_BTD))
        for i, expert in enumerate(self.experts):
            sent_BT = gates_BTN[..., i] != 0
            y_BTD[sent_BT] += gates_BTN[..., i][sent_BT][:, None] * expert(x_BTD[sent_BT])
        return y_BTD


# ---- the model -------------------------------------------------------------------------------------------------------------


class BlockOutput(NamedTuple):
    """Hidden states [B, T, D]; the gates [B, T, N] of attention and of the FFN, None where it is no mixture."""

    hidden: Tensor
    attention_gates: Tensor | None
    ffn_gates: Tensor | None


class Scale(nn.Module):
    """A number to multiply with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    """Block `layer`. Sequential: h = x + attention(LN1 x); h + ffn(LN2 h). Parallel: x + attention(LN1 x) + ffn(LN1 x or LN2 x).

    Families without `pre_norms` have neither LN1 nor LN2. With `post_norms` what attention and FFN give is normed, after the experts are
    mixed: N(sum_j g_j A_j(x)), which has the size that the block was trained with, however unlike the experts are. What is then added to
    x or h is multiplied with `residual_scale` first, and what comes out at last with the number that `layer_scale` says it has.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        config = config.at(layer)
        self.parallel, self.scale = config.parallel_block, 1.0 if config.residual_scale is None else config.residual_scale
        one_norm = config.parallel_block and config.parallel_norms == 1

        def norm(there: bool) -> nn.Module:
            return Norm(config, config.hidden_size, bias=config.norm_bias) if there else nn.Identity()

        self.input_layernorm = norm(config.pre_norms)
        self.post_attention_layernorm = None if one_norm else norm(config.pre_norms)  # before the FFN; llama's name for it
        self.post_self_attn_layernorm, self.post_mlp_layernorm = norm(config.post_norms), norm(config.post_norms)
        self.layer_scale = Scale() if config.layer_scale else nn.Identity()
        self.self_attn: Attention | LinearAttention = (LinearAttention if config.is_linear(layer) else Attention)(config, layer)
        self.mlp: FfnMixture | Ffn = FfnMixture(config) if config.num_experts else Ffn(config, config.intermediate_size)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, cache: Cache | None = None, force_expert: int | None = None) -> BlockOutput:
        """`positions_BT` count from 0 in each sequence, -1 is padding. `force_expert`: gate 1 for that expert, 0 for the others."""
        normed_BTD = self.input_layernorm(x_BTD)
        attention_BTD, attention_gates = self.self_attn(normed_BTD, positions_BT, cache or Cache(), force_expert)
        h_BTD = x_BTD + self.scale * self.post_self_attn_layernorm(attention_BTD)
        if self.post_attention_layernorm is not None:
            normed_BTD = self.post_attention_layernorm(x_BTD if self.parallel else h_BTD)
        mixed = isinstance(self.mlp, FfnMixture)
        ffn_BTD, ffn_gates = self.mlp(normed_BTD, force_expert, h_BTD) if mixed else (self.mlp(normed_BTD), None)
        return BlockOutput(self.layer_scale(h_BTD + self.scale * self.post_mlp_layernorm(ffn_BTD)), attention_gates, ffn_gates)


class Trunk(nn.Module):
    """All but the head: the parameters under `model.` in a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rows_VD = torch.empty(config.vocab_size, config.hidden_size)  # drawing them would have torch import its compiler, for nothing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=rows_VD)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Norm(config, config.hidden_size, bias=config.norm_bias)


def scaled_embeddings(config: ModelConfig, x_BTD: Tensor) -> Tensor:
    """What the first block gets of the embeddings `x_BTD`."""
    if config.embedding_scale is None:
        return x_BTD
    scale = torch.tensor(config.embedding_scale, dtype=torch.float64)
    return x_BTD * (scale.to(x_BTD.dtype) if config.embedding_scale_in_dtype else config.embedding_scale)


def head(config: ModelConfig, norm: nn.Module, weight_VD: Tensor, bias_V: Tensor | None, x_BTD: Tensor) -> Tensor:
    """Logits [B, T, V] of the last block's hidden states; `weight_VD` is the embedding where it is tied."""
    return as_logits(config, linear(norm(x_BTD), weight_VD, bias_V))


def as_logits(config: ModelConfig, y_BTV: Tensor) -> Tensor:
    """What the head gives, scaled and capped."""
    return capped(y_BTV * (1.0 if config.logit_scale is None else config.logit_scale), config.logit_softcap)


class Head(nn.Module):
    """The parameters under `lm_head.`: a weight unless it is the embedding's, a bias where the family has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        tied, V = config.tie_word_embeddings, config.vocab_size
        self.weight = None if tied else nn.Parameter(torch.empty(V, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(V)) if config.head_bias else None


class Model(nn.Module):
    """A language model, dense where `config` has no experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Head(config)

    def forward(
        self, input_ids_BT: Tensor, cache: Cache | None = None, attention_mask_BT: Tensor | None = None,
        force_expert: int | None = None, record: list[BlockOutput] | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, T, V]. `attention_mask_BT` is 0 at padding, left of the text; `record` gets every block's output."""
        cache = cache or Cache()
        positions_BT = cache.next_positions(torch.ones_like(input_ids_BT) if attention_mask_BT is None else attention_mask_BT)
        x_BTD = scaled_embeddings(self.config, self.model.embed_tokens(input_ids_BT))
        for block in self.model.layers:
            output = block(x_BTD, positions_BT, cache, force_expert)
            x_BTD = output.hidden
            if record is not None:
                record.append(output)
        weight_VD = self.model.embed_tokens.weight if self.lm_head.weight is None else self.lm_head.weight
        return head(self.config, self.model.norm, weight_VD, self.lm_head.bias, x_BTD)

    @torch.no_grad()
    def generate(
        self, input_ids_BT: Tensor, count: int, temperature: float = 0.0, seed: int = 0, attention_mask_BT: Tensor | None = None
    ) -> Tensor:
        """The input and `count` more tokens [B, T + count]: the likeliest at temperature 0, else drawn by a generator of its own."""
        generator = torch.Generator(input_ids_BT.device).manual_seed(seed)
        cache, new_BT, mask_BT = Cache(), input_ids_BT, attention_mask_BT
        for _ in range(count):
            logits_BV = wide(self(new_BT, cache, mask_BT)[:, -1])
            if temperature == 0:
                new_BT = logits_BV.argmax(-1, keepdim=True)
            else:
                new_BT = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
            input_ids_BT, mask_BT = torch.cat((input_ids_BT, new_BT), 1), None
        return input_ids_BT
