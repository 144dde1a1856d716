"""The words that architecture tables are written in: roles, the letters of shapes, traits, keys of a config.json that mean one fact."""

from typing import Any

ROLES = (
    "embed", "head", "head.bias",
    *(f"norm.{where}{suffix}" for where in ("attn", "ffn", "final", "attn.post", "ffn.post") for suffix in ("", ".bias")),
    *(f"attn.{part}{suffix}" for part in "qkvo" for suffix in ("", ".bias")),
    *(f"attn.{part}_norm{suffix}" for part in "qk" for suffix in ("", ".bias")),
    "attn.gate", "attn.gate.bias",
    *(f"linear.{part}" for part in ("q", "k", "v", "z", "b", "a", "q_conv", "k_conv", "v_conv", "dt_bias", "A_log", "norm", "o")),
    *(f"ffn.{part}{suffix}" for part in ("gate", "up", "down") for suffix in ("", ".bias")),
    "layer.scale", "router.attn", "router.ffn",
)  # fmt: skip
"""Every role a recipe can name."""

SHARED_ROLES = tuple(f"ffn.shared.{part}" for part in ("gate", "up", "down", "router"))
"""Roles of an expert of every token, in layouts that have one: `ffn.shared_expert` of a recipe makes them."""

ROLE_GLOBS = tuple(f"{group}.*" for group in dict.fromkeys(role.partition(".")[0] for role in ROLES if "." in role))

SYMBOLS = {
    "V": "vocab_size", "d": "hidden_size", "f": "intermediate_size",
    "H": "num_attention_heads", "K": "num_key_value_heads", "D": "head_dim", "N": "num_experts",
    "S": "shared_expert_intermediate_size",
    "Hk": "linear_num_key_heads", "Hv": "linear_num_value_heads", "Dk": "linear_key_head_dim", "Dv": "linear_value_head_dim",
    "c": "linear_conv_kernel_dim",
}  # fmt: skip
"""The letters of symbolic shapes, and the facts they stand for."""

LAYER_SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
"""Sizes that layers of one kind may have otherwise than all."""

KINDS_OF_LAYERS = ("full_attention", "sliding_attention")

LINEAR = "linear_attention"
"""The kind of layers that have a gated delta net (arXiv 2412.06464) in the place of attention: a state of one size for any context."""

LINEAR_SIZES = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
)  # fmt: skip
"""Sizes of such layers: heads of queries and keys, and of values, of which a whole number stands to each; their channels; the tokens that
the convolution before them sees."""

TRAITS: dict[str, Any] = {
    "norm_type": None, "norm_bias": False, "norm_weights": True, "attention_clip": None,
    "pre_norms": True, "post_norms": False, "parallel_block": False, "parallel_norms": 2,
    "gated_ffn": False,
    "rope_interleaved": False, "qk_norm": False, "qk_norm_shape": None, "qk_norm_bias": False,
    "attention_bias": False, "attention_out_bias": False, "mlp_bias": False,
    "attention_gate": False, "value_norm": False, "values_are_keys": False, "layer_scale": False,
    "norm_offset": 0, "qk_norm_after_rotary": False, "head_bias": False, "attention_scale": None, "embedding_scale": None,
    "embedding_scale_in_dtype": False, "residual_scale": None, "logit_scale": None, "attention_softcap": None, "logit_softcap": None,
}  # fmt: skip
"""What a family's model type can imply, and what holds where its table is silent.

norm_weights               norms have weights, and do more than to centre or to scale
attention_clip             queries, keys and values are cut off at this and at minus this; None: they are not
pre_norms                  norms before attention and FFN
post_norms                 norms of what attention and FFN give, before it is scaled and added; of a mixture's, after the experts are mixed
attention_gate             what attention gives is multiplied with sigmoid(W x), channel by channel, before its output projection
value_norm                 values are normed, of each head and without weights
values_are_keys            in layers without a window there is no projection to values: these are the keys, not yet normed and turned
layer_scale                what a layer gives is multiplied with a number that is stored
norm_offset                added to the weights of norms before they multiply: 1 where files hold how far they are from 1
qk_norm                    norms of q and k, of each head unless qk_norm_shape says otherwise
qk_norm_shape              "head": one weight per channel, for all heads; "heads": one per head and channel; "heads in a row": as many, in
                           one vector; "all heads": as these, and the norm is of all heads of an attention together, not of each;
                           None: what is usual of a norm_type, "head" of RMS norms and "heads" of layer norms
qk_norm_bias               they have biases
qk_norm_after_rotary       q and k are normed after they are turned, not before
head_bias                  the head adds a bias to the logits
attention_scale            what q k^T is multiplied with; None: head_dim ** -0.5
embedding_scale            what the embeddings are multiplied with before the first block; None: nothing
embedding_scale_in_dtype   that factor is rounded to the dtype of the embeddings first
residual_scale             what attention and FFN are multiplied with before they are added to what went in; None: nothing
logit_scale                what the logits are multiplied with; None: nothing
attention_softcap          c: scaled scores x of q k^T become c tanh(x / c), so that none is above c; None: they stay
logit_softcap              the same of the logits, after they are scaled

"config:KEY" takes the value of a config.json's key, "config:KEY^POWER" that to a power: "config:logits_scaling^-1" divides by it.
"""

QK_NORM_SHAPES = ("head", "heads", "heads in a row", "all heads")
"""What the weights of a norm of q or k are for; TRAITS says it of each."""

TRAIT_WORDS = {"norm_type": ("rms_norm", "layer_norm"), "qk_norm_shape": QK_NORM_SHAPES}
"""Traits that are words, and which."""

QUIET: dict[str, Any] = {
    "norm_offset": 0, "qk_norm_after_rotary": False, "head_bias": False, "attention_scale": None, "embedding_scale": None,
    "embedding_scale_in_dtype": False, "residual_scale": None, "rope_layers": None, "query_growth": None, "pre_norms": True,
    "post_norms": False, "qk_norm_shape": None, "qk_norm_bias": False, "sliding_rope_parameters": None, "attention_softcap": None,
    "logit_softcap": None, "norm_weights": True, "attention_clip": None, "sizes_by_kind": None,
    "value_norm": False, "values_are_keys": False, "layer_scale": False, "attention_gate": False,
    **dict.fromkeys(LINEAR_SIZES),
}  # fmt: skip
"""Facts that most models lack, and what they are there: a mixture's config.json has them only where they are something else."""

UNSAID: dict[str, Any] = {
    **TRAITS, "rope_layers": None, "query_growth": None, "sliding_rope_parameters": None, "sizes_by_kind": None,
    "norm_type": "rms_norm",
}  # fmt: skip
"""What a layout that has no word for a fact takes it for: models of which it is something else cannot be written in it."""

GATING: dict[str, Any] = {"scoring_func": "softmax"}
"""Facts of a recipe's gates, and what a layout that has no word for one takes it for; a config.json has them only where they are something
else."""

DERIVED = ("untied", "second_norm", "twin_norms", "own_values")
"""Facts that follow from others and decide whether a tensor exists: a head of its own; a norm before the FFN beside the attention's; both
norms of a parallel block; of a layer, a projection to values."""

ROTARY_BASES = ("rope_theta", "rotary_emb_base")
"""Keys beside rope_parameters for the rotary base: of these a family has one, and passes over the others."""

SLIDING_BASES = ("rope_local_base_freq",)
"""Keys beside rope_parameters for the rotary base of layers with a sliding window, where these have one of their own."""

ROTARY_SHARES = ("partial_rotary_factor", "rotary_pct")
"""Keys beside rope_parameters for the share of a head that turns."""

ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
"""Keys for the activation of the FFN."""

LOOSE_ACTIVATION = "activation"
"""The one among them that other files write beside their own key, in words of their trainers ("swiglu"); what of it may matter,
sources/harmless_keys.toml says."""

MROPE = ("mrope_section", "mrope_interleaved")
"""Keys of rope_parameters that share out the channels among time, height and width of images; of text all three are the position."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys for the number of experts."""

CONTEXTS = ("inner", "outer")
"""Where the context before the rotary scaling stands: in rope_parameters, or in a key beside it."""

WINDOWS = (
    "none", "all", "all if used", "by layer", "every other layer", "stated",
    "by layer or all", "all but each last", "all but each last, never the last", "all but each first", "where nothing turns",
)  # fmt: skip
"""Which layers have sliding-window attention, in transformers.

none                none; use_sliding_window, sliding_window, max_window_layers and layer_types are ignored
all                 every layer if sliding_window is a number; the other three keys are ignored
all if used         every layer if use_sliding_window, else none; layer_types and max_window_layers are ignored
by layer            those that layer_types names, or, where it is left out, those from max_window_layers on; none unless use_sliding_window
every other layer   as by layer, but where layer_types is left out every other one of those before max_window_layers
stated              those that layer_types names, and there is no other key that could contradict it
by layer or all     those that layer_types names, or, where it is left out, every layer if sliding_window is a number
all but each last   those that layer_types names, or, where it is left out, all but the last of every sliding_window_pattern layers
..., never the last the same, but that the last layer of all has none, whatever layer_types says of it
all but each first  the same as before these, but for the first of so many
where nothing turns those that layer_types names, or, where it is left out, those without rotary embedding; none unless use_sliding_window
"""

TURNING = ("all", "where windows are", "where windows are, or all", "listed", "if rope")
"""Which layers have a rotary embedding.

all                 every layer
where windows are   those with sliding-window attention
..., or all         the same, but every layer where sliding_window is null
if rope             every layer if position_embedding_type is "rope", else none
listed              those with a 1 in no_rope_layers, or, where it is left out, all but the last of every no_rope_layer_interval layers
"""

WORKED_OUT = {"num_key_value_heads": "the number of key and value heads", "head_dim": "the size of a head"}
"""Facts that a family may always work out from others, whatever its config.json says, by the key that others have for them."""
