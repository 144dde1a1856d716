"""Configuration of BAM checkpoints (Branch-Attend-Mix, arXiv 2408.08274) for transformers. Travels with a checkpoint.

Written by bam-merge. Needs transformers 5.10 or later; 5.23 for tensor-parallel or compiled training.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class BamConfig(PreTrainedConfig):
    """A mixture of dense models: FFN experts, and attention experts or one attention.

    Sizes are those of a dense model, but for `num_attention_heads` and `num_key_value_heads`: the totals over all attention
    experts, which caches and serving engines read. `..._per_expert` are one expert's.

    Training. Per router and layer, over the tokens that are no padding, with p = softmax of the router's logits
    (of sigmoid gates: each expert's share of all sigmoids, as in DeepSeek-V3):

        balance  N * sum_i f_i P_i   f_i: share of the tokens sent to expert i, divided by k; P_i: mean of p_i. 1 at best
                                     (under soft routing f_i = P_i: what expert i is sent is its share of the gates)
        z        mean of logsumexp(logits)^2

    reduced over layers as `router_loss_reduction` says. With the coefficients below,

        total = router_aux_loss_coef * balance of the FFN routers
              + attention_router_aux_loss_coef * balance of the attention routers
              + router_z_loss_coef * (z of the FFN routers + z of the attention routers)

    A forward with labels returns `loss` = NLL + total, and `aux_loss` = total / router_aux_loss_coef: transformers and TRL
    multiply a model's aux_loss with router_aux_loss_coef, and so get the total. (router_aux_loss_coef = 0 cannot be divided by;
    aux_loss is the total then.) `output_router_logits`: None adds the losses where labels are given, True computes them
    always, False never: pass it with the labels to measure plain NLL.

    `gate_scale` multiplies the FFN gates. `norm_topk_prob`: gates of the chosen FFN experts sum to one (BTX, Mixtral). `scoring_func`: they
    are of the router's softmax, or of sigmoids, each expert's by itself (DeepSeek-V3).
    `attention_routing` "soft" mixes all attention experts; "top_k" the best `num_attention_experts_per_tok`, whose gates
    p_i / sum of the chosen p sum to one, the sum being held constant for the gradient.

    Of families that are unlike most, None or the default where theirs is: `pre_norms` are those before attention and FFN, `post_norms`
    those of what the experts of either give together; norms have `norm_weights`; queries, keys and values are cut off at `attention_clip`
    and at minus that; `norm_offset` is added to the weights of norms before they multiply;
    `qk_norm_shape` says what the weights of a norm of q or k are for: any "head", each of the "heads" (or "heads in a row", in one
    vector), or "all heads" of an expert, whose norm is then of all of them together (None: "head" of RMS norms, "heads" of layer norms);
    with `value_norm` the values of each head are normed, without weights; `values_are_keys` says that layers without a window have no
    projection to values, which are the keys as projected; `layer_scale` that what a layer gives is multiplied with a stored number;
    `sliding_rope_parameters` are the rope_parameters of layers with a window; `rope_layers` are the layers with rotary embedding;
    queries grow by 1 + `query_growth` ln(1 + floor(position / original context)); `attention_scale` (of q k^T), `embedding_scale`,
    `residual_scale` (of attention and FFN before they are added) and `logit_scale` are factors. `attention_softcap` c puts c tanh(x / c)
    in the place of a scaled score x, which torch's fused attention does not: such a model has eager attention; `logit_softcap` does so
    with logits. With `attention_gate` what attention gives is multiplied with sigmoid(W x) before its output projection.

    Hybrids have layers of kind "linear_attention" in `layer_types`: gated delta nets (arXiv 2412.06464), whose sizes the `linear_...` are,
    of one expert. `attention_linear`: whether such layers have experts as attention has, each with a state of its own, or one for all.
    """

    model_type = "bam"
    # A list: the Trainer's evaluation adds one to it.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss", "router_logits", "attention_router_logits", "attention_gates"]  # noqa: RUF012
    ignore_keys_at_rope_validation = frozenset({"partial_rotary_factor"})
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    base_model_type: str | None = None
    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    num_attention_heads_per_expert: int | None = None
    num_key_value_heads_per_expert: int | None = None
    head_dim: int | None = None
    sizes_by_kind: dict[str, dict[str, int]] | None = None
    hidden_act: str = "silu"
    gated_ffn: bool = True
    max_position_embeddings: int | None = 2048
    initializer_range: float | int = 0.02
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_bias: bool = False
    rms_norm_eps: float | int = 1e-6
    layer_norm_eps: float | int = 1e-5
    norm_offset: int = 0
    norm_weights: bool = True
    attention_clip: float | int | None = None
    pre_norms: bool = True
    post_norms: bool = False
    attention_gate: bool = False
    qk_norm: bool = False
    qk_norm_shape: Literal["head", "heads", "heads in a row", "all heads"] | None = None
    qk_norm_bias: bool = False
    qk_norm_after_rotary: bool = False
    value_norm: bool = False
    values_are_keys: bool = False
    layer_scale: bool = False
    parallel_block: bool = False
    parallel_norms: int = 2
    attention_bias: bool = False
    attention_out_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    rope_parameters: dict[str, Any] | None = None
    sliding_rope_parameters: dict[str, Any] | None = None
    rope_interleaved: bool = False
    rope_layers: list[int] | None = None
    query_growth: float | int | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    attention_scale: float | int | None = None
    residual_scale: float | int | None = None
    embedding_scale: float | int | None = None
    embedding_scale_in_dtype: bool = False
    head_bias: bool = False
    logit_scale: float | int | None = 1.0
    attention_softcap: float | int | None = None
    logit_softcap: float | int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int | None = None
    attention_linear: Literal["expert", "shared"] | None = None
    num_experts: int = 4
    expert_names: list[str] | None = None
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    gate_scale: float | int = 1.0
    num_attention_experts: int = 4
    attention_kv: Literal["expert", "shared"] | None = "expert"
    shared_kv_layers: list[int] | None = None
    attention_routing: Literal["soft", "top_k"] | None = "soft"
    num_attention_experts_per_tok: int | None = None
    output_router_logits: bool | None = None
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    attention_router_aux_loss_coef: float | int = 0.0
    router_loss_reduction: Literal["mean", "sum"] = "mean"
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        experts = max(self.num_attention_experts, 1)
        own_kv = experts if self.attention_kv == "expert" else 1
        self.num_attention_heads_per_expert = self.num_attention_heads_per_expert or self.num_attention_heads // experts
        self.num_key_value_heads_per_expert = self.num_key_value_heads_per_expert or self.num_key_value_heads // own_kv
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads_per_expert
        if self.sliding_window is None or self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            linear = [self.is_linear(layer) for layer in range(self.num_hidden_layers)]
            self.layer_types = ["linear_attention" if one else kind for one in linear]
        self.logit_scale = 1.0 if self.logit_scale is None else self.logit_scale  # vLLM multiplies with what is there
        self.base_model_tp_plan = self.tensor_parallel_plan() or None  # an attribute: some releases of transformers add to it
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Head counts that belong together, and no more experts per token than there are."""
        heads, kv_heads = self.num_attention_heads_per_expert, self.num_key_value_heads_per_expert
        experts = max(self.num_attention_experts, 1)
        own_kv = experts if self.attention_kv == "expert" else 1
        if (self.num_attention_heads, self.num_key_value_heads) != (heads * experts, kv_heads * own_kv):
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} and num_key_value_heads = {self.num_key_value_heads} must be the "
                f"totals of the attention experts, {heads * experts} and {kv_heads * own_kv}"
            )
        if heads % kv_heads:
            raise ValueError(f"{heads} attention heads of an expert are not a multiple of {kv_heads} key and value heads")
        for layer in range(self.num_hidden_layers if self.sizes_by_kind else 0):
            heads, kv_heads = self.size("num_attention_heads", layer), self.size("num_key_value_heads", layer)
            if heads % kv_heads:
                raise ValueError(f"{heads} attention heads of an expert in layer {layer} are not a multiple of {kv_heads}")
        if "linear_attention" in self.layer_types:
            sizes = [self.linear_num_key_heads, self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim]
            if not all([*sizes, self.linear_conv_kernel_dim]) or sizes[1] % sizes[0]:
                raise ValueError(f"linear attention of {sizes[0]} key and {sizes[1]} value heads, channels {sizes[2:]}")
        for chosen, of in (
            (self.num_experts_per_tok, self.num_experts),
            (self.num_attention_experts_per_tok or experts, experts),
        ):
            if not 1 <= chosen <= of:
                raise ValueError(f"{chosen} experts per token of {of}")

    @property
    def qk_norm_weights(self) -> str:
        """`qk_norm_shape`, or what is usual of such norms."""
        return self.qk_norm_shape or ("heads" if self.norm_type == "layer_norm" else "head")

    @property
    def attn_logit_softcapping(self) -> float | int | None:
        """`attention_softcap` by the name that vLLM reads."""
        return self.attention_softcap

    @property
    def final_logit_softcapping(self) -> float | None:
        """`logit_softcap` by the name that vLLM reads, which multiplies with logit_scale s after it caps: s (c/s) tanh(x / (c/s))."""
        return None if self.logit_softcap is None else self.logit_softcap / self.logit_scale

    def size(self, name: str, layer: int) -> int:
        """head_dim, intermediate_size, or num_attention_heads or num_key_value_heads of one expert, in `layer`."""
        usual = getattr(self, f"{name}_per_expert" if name.endswith("heads") else name)
        return (self.sizes_by_kind or {}).get(self.layer_types[layer], {}).get(name, usual)

    def is_linear(self, layer: int) -> bool:
        """Whether `layer` has a gated delta net in the place of attention."""
        return self.layer_types is not None and layer < len(self.layer_types) and self.layer_types[layer] == "linear_attention"

    def shares_kv(self, layer: int) -> bool:
        """Whether the attention experts of `layer` have one k and v between them (without experts: yes)."""
        return self.num_attention_experts == 0 or self.attention_kv == "shared" or layer in (self.shared_kv_layers or ())

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Tensor parallelism: heads and FFN columns are cut, routers and norms are not. Cuts fall between the k/v heads of an expert,
        so their number must be a multiple of the processes. FFNs with biases stay whole (no style of transformers cuts them), and so
        does attention where a norm is of all its heads."""
        attention, experts = "layers.*.self_attn.", "layers.*.self_attn.experts."
        own = experts if self.num_attention_experts else attention
        kv = {attention if self.shares_kv(layer) else experts for layer in range(self.num_hidden_layers)}
        columns = [
            own + "q_proj",
            *([own + "gate_proj"] if self.attention_gate else ()),
            *(prefix + name for prefix in sorted(kv) for name in ("k_proj", "v_proj")),
        ]
        plan = dict.fromkeys(columns, "colwise") | {own + "o_proj": "rowwise"}
        if self.qk_norm and (self.qk_norm_weights == "all heads" or self.qk_norm_bias):
            plan = {}
        elif self.num_attention_experts:
            plan[attention + "gates"] = "packed_colwise"  # on a module without weights: only its sum of the gradients
        if plan and self.qk_norm:
            for norm in (own + "q_norm", *(prefix + "k_norm" for prefix in sorted(kv))):
                if self.qk_norm_weights == "head":
                    plan[norm] = "replicated_with_grad_allreduce"
                else:
                    plan |= {norm: "local_params", norm + ".weight": "colwise"}
        if not self.mlp_bias:
            ffn = "layers.*.mlp.experts"
            up = "packed_colwise" if self.gated_ffn else "colwise"
            plan |= {f"{ffn}.gate_up_proj": up, f"{ffn}.down_proj": "rowwise", ffn: "moe_tp_experts"}
        return plan


__all__ = ["BamConfig"]
