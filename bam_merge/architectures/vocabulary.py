"""The words that architecture tables are written in: roles, the letters of shapes, traits."""

from typing import Any

ROLES = (
    "embed", "head", "head.bias",
    *(f"norm.{where}{suffix}" for where in ("attn", "ffn", "final") for suffix in ("", ".bias")),
    *(f"attn.{part}{suffix}" for part in "qkvo" for suffix in ("", ".bias")), "attn.q_norm", "attn.k_norm",
    *(f"ffn.{part}{suffix}" for part in ("gate", "up", "down") for suffix in ("", ".bias")),
    "router.attn", "router.ffn",
)  # fmt: skip
"""Every role a recipe can name."""

ROLE_GLOBS = tuple(f"{group}.*" for group in dict.fromkeys(role.partition(".")[0] for role in ROLES if "." in role))

SYMBOLS = {
    "V": "vocab_size", "d": "hidden_size", "f": "intermediate_size",
    "H": "num_attention_heads", "K": "num_key_value_heads", "D": "head_dim",
}  # fmt: skip
"""The letters of symbolic shapes, and the facts they stand for."""

TRAITS: dict[str, Any] = {
    "norm_type": None, "norm_bias": False, "parallel_block": False, "parallel_norms": 2, "gated_ffn": False,
    "rope_interleaved": False, "qk_norm": False, "attention_bias": False, "attention_out_bias": False, "mlp_bias": False,
}  # fmt: skip
"""What a family's model type can imply, and what holds where its table is silent."""
