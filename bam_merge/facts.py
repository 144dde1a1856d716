"""The facts of any known config.json, dense or mixture: its sizes and choices in bam's words, whatever the model type calls them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bam_merge.architecture import Architecture
from bam_merge.dense import MAX_LAYERS, ROPE_KEYS, TRAITS, describe, is_size
from bam_merge.errors import printable, some

ALIASES = {"num_local_experts": "num_experts"}
"""Keys that some version of transformers writes for another one."""

BAM_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads_per_expert",
    "num_key_value_heads_per_expert", "head_dim", "num_experts", "num_experts_per_tok",
)  # fmt: skip


def facts_of(architecture: Architecture, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """What config.json says of a model of `architecture`, in bam's words; head counts are those of one attention expert.

    Empty, with the reasons appended to `problems`, when a size that is needed is missing or unusable.
    """
    before = len(problems)
    if architecture.name == "bam":
        for key in BAM_SIZES:
            if not is_size(config.get(key)):
                problems.append(f"config.json: {key} must be a positive integer, found {printable(repr(config.get(key)), 60)}.")
        if len(problems) == before and config["num_hidden_layers"] > MAX_LAYERS:
            problems.append(f"config.json: num_hidden_layers {config['num_hidden_layers']}, expected at most {MAX_LAYERS}.")
        for key in ("num_attention_experts", "num_attention_experts_per_tok", "parallel_norms"):
            if config.get(key) and not is_size(config[key]):
                problems.append(f"config.json: {key} must be an integer, found {printable(repr(config[key]), 60)}.")
        shared = config.get("shared_kv_layers")
        if shared is not None and not (isinstance(shared, list) and all(type(layer) is int for layer in shared)):
            problems.append(f"config.json: shared_kv_layers must be a list of layers, found {printable(repr(shared), 60)}.")
        heads = {key: config.get(f"{key}_per_expert") for key in ("num_attention_heads", "num_key_value_heads")}
        facts = {**config, **heads, "untied": not config.get("tie_word_embeddings")}
    elif architecture.kind == "dense":
        facts = describe(architecture, config, problems)
    else:
        facts = mixture_values(architecture, config, problems)
    return facts if len(problems) == before else {}


def mixture_values(layout: Architecture, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Config values of a public mixture, in bam's words: the layout's [config] read backwards, and what [accepts] implies."""
    keys: dict[str, str] = {}
    for key, value in layout.config.items():
        keys.setdefault(value.removeprefix("$") if isinstance(value, str) else key, key)
    defaults = {word: layout.defaults[key] for word, key in keys.items() if key in layout.defaults}
    aliased = {word: config[alias] for alias, word in ALIASES.items() if alias in config and keys.get(word) not in config}
    spelled = {**defaults, **aliased, **{word: config[key] for word, key in keys.items() if key in config}}
    needed = ("hidden_act", "rms_norm_eps", "num_experts", "num_experts_per_tok", "norm_topk_prob", "attention_bias", "use_sliding_window")
    missing = [keys[word] for word in needed if word in keys and word not in spelled]
    if missing:
        problems.append(f"config.json: {some(missing)} missing; {layout.name} needs it, or its meaning would be a guess. Add it.")
    if spelled.get("use_sliding_window") and "layer_types" in keys and "layer_types" not in spelled:
        problems.append("config.json: use_sliding_window is true, and layer_types does not say which layers slide. Add layer_types.")
    implied = {word: None if value == "none" else value for word, value in layout.accepts.items() if not isinstance(value, list)}
    traits = {trait: implied.get(trait, f"config:{trait}") for trait in TRAITS if trait in implied or trait in keys}
    traits.setdefault("attention_out_bias", traits.get("attention_bias", False))  # one key for both, where a layout has no other
    extra = {key: value for key, value in layout.defaults.items() if key in ROPE_KEYS}
    family = replace(layout, traits=traits, function=("rms_norm_eps",), defaults={**defaults, **extra})
    rope = {key: config[key] for key in ROPE_KEYS if key in config}
    return {**implied, **spelled, **describe(family, {**rope, **spelled}, problems)}


def dense_layers(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """The layers of a public mixture that have one FFN and no experts.

    Qwen: those in mlp_only_layers, and those not at a multiple of decoder_sparse_step. DeepSeek: the first first_k_dense_replace, and
    those not at a multiple of moe_layer_freq. (transformers' configuration classes; the latter in DeepSeek's own modeling code.)
    """

    def number(key: str, default: int) -> int:
        value = config.get(key)
        return value if type(value) is int and value >= default else default

    listed = config.get("mlp_only_layers")
    only = set(filter(lambda item: type(item) is int, listed)) if isinstance(listed, list) else set()
    step, first, every = number("decoder_sparse_step", 1), number("first_k_dense_replace", 0), number("moe_layer_freq", 1)
    return frozenset(layer for layer in range(layers) if layer in only or (layer + 1) % step or layer < first or layer % every)
