"""What a forward pass of the reference model depends on, beside its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

QkNormShape = Literal["head", "heads", "heads in a row", "all heads"]
KindOfLayer = Literal["full_attention", "sliding_attention", "linear_attention"]


@dataclass(frozen=True)
class ModelConfig:
    """What a forward pass needs of a bam config.json, under the same names. Head counts are those of one expert."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads_per_expert: int
    num_key_value_heads_per_expert: int
    head_dim: int
    sizes_by_kind: Mapping[str, Mapping[str, int]] | None = None  # of layers of one kind, where they are not those above
    tie_word_embeddings: bool = False
    head_bias: bool = False
    logit_scale: float | None = None
    logit_softcap: float | None = None  # c: c tanh(x / c) in the place of a logit x
    embedding_scale: float | None = None
    embedding_scale_in_dtype: bool = False  # rounded as the embeddings are
    residual_scale: float | None = None  # of attention and FFN, before they are added
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_bias: bool = False
    norm_weights: bool = True
    attention_clip: float | None = None  # queries, keys and values are at most so large, either way
    norm_offset: int = 0  # to the weights of all norms: 1 where they say how far they are from 1
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    pre_norms: bool = True  # before attention and FFN
    post_norms: bool = False  # of what attention and FFN give, all experts together
    parallel_block: bool = False
    parallel_norms: int = 2  # of a parallel block: 1 for attention and FFN together, or 2
    attention_bias: bool = False  # of q, k and v
    attention_out_bias: bool = False
    value_norm: bool = False  # of the values of each head, without weights
    values_are_keys: bool = False  # in layers without a window: no projection to values, they are the keys as projected
    layer_scale: bool = False  # what a layer gives is multiplied with a number of its own
    attention_gate: bool = False  # what attention gives is multiplied with sigmoid(gate x) before its output projection
    qk_norm: bool = False  # of q and k, of the kind norm_type
    qk_norm_shape: QkNormShape | None = None  # None: "head" of RMS norms, "heads" of layer norms
    qk_norm_bias: bool = False
    qk_norm_after_rotary: bool = False
    attention_scale: float | None = None  # of q k^T; None: head_dim ** -0.5
    attention_softcap: float | None = None  # the same of scaled scores
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    sliding_rope_parameters: Mapping[str, Any] | None = None  # of layers with a window; None: as all
    rope_interleaved: bool = False
    query_growth: float | None = None  # beta: queries are multiplied with 1 + beta ln(1 + floor(position / original context))
    rope_layers: Sequence[int] | None = None  # the layers that rotate; None: all
    max_position_embeddings: int | None = None
    sliding_window: int | None = None
    layer_types: Sequence[KindOfLayer] | None = None  # None: every layer slides if there is a window
    linear_num_key_heads: int = 0  # of layers with linear attention; of one expert, as all sizes
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    attention_linear: Literal["expert", "shared"] | None = None  # whether such layers have experts as the others have
    num_attention_experts: int = 0  # 0: one attention (dense, BTX, Sparse Upcycling)
    attention_kv: Literal["expert", "shared"] | None = None
    shared_kv_layers: Sequence[int] | None = None  # layers that share k and v although attention_kv is "expert"
    attention_routing: Literal["soft", "top_k"] | None = None
    num_attention_experts_per_tok: int | None = None
    hidden_act: str = "silu"
    gated_ffn: bool = True
    mlp_bias: bool = False
    num_experts: int = 0  # 0: one FFN
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"  # what makes gates of the FFN router's logits
    choice_bias: bool = False  # a number for each expert is added to its score where experts are chosen; bam has none
    gate_scale: float = 1.0
    dense_intermediate_size: int = 0  # of an FFN for all tokens beside the experts, each with norms of its own, as gemma4 has one
    shared_expert_intermediate_size: int = 0  # of an FFN that every token goes through; bam has none
    shared_expert_mix: Literal["gated", "sum", "average"] = "gated"  # it is weighted by a gate of its own; added; added, and both halved

    @property
    def qk_norm_weights(self) -> QkNormShape:
        """Of each head with weights [C] for all (qwen3), [H, C] (cohere) or [H * C] (stablelm); or of all heads together, with weights
        [H * C] (olmo2)."""
        return self.qk_norm_shape or ("heads" if self.norm_type == "layer_norm" else "head")

    @property
    def linear_sizes(self) -> tuple[int, int, int, int, int]:
        """Of layers with linear attention: key heads, value heads, channels of a key and of a value, tokens that a convolution sees."""
        key_heads, value_heads = self.linear_num_key_heads, self.linear_num_value_heads
        return key_heads, value_heads, self.linear_key_head_dim, self.linear_value_head_dim, self.linear_conv_kernel_dim

    def is_linear(self, layer: int) -> bool:
        """Whether `layer` has linear attention."""
        return self.layer_types is not None and self.layer_types[layer] == "linear_attention"

    def slides(self, layer: int) -> bool:
        """Whether `layer` has a sliding window."""
        return self.sliding_window is not None and (self.layer_types is None or self.layer_types[layer] == "sliding_attention")

    def at(self, layer: int) -> "ModelConfig":
        """The configuration with the sizes that `layer` has."""
        own = self.of_kind("sliding_attention" if self.slides(layer) else "full_attention")
        return replace(own, values_are_keys=False) if own.values_are_keys and self.slides(layer) else own

    def of_kind(self, kind: str) -> "ModelConfig":
        """The configuration with the sizes that layers of this kind have."""
        own = (self.sizes_by_kind or {}).get(kind, {})
        sizes: dict[str, Any] = {f"{size}_per_expert" if size.endswith("heads") else size: value for size, value in own.items()}
        return replace(self, **sizes, sizes_by_kind=None) if self.sizes_by_kind else self

    def rope_of(self, layer: int) -> Mapping[str, Any]:
        """The rotary embedding of `layer`."""
        own = self.sliding_rope_parameters if self.slides(layer) else None
        return self.rope_parameters if own is None else own

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """From a bam config.json; keys that no forward pass needs are left. Raises TypeError when a size is missing."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in known and value is not None})
