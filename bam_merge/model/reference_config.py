"""A config.json as the reference model reads it: by transformers' rules, told a second time.

Plans read a source through dense.py and facts.py. What verification compares their results with must not share a mistake of theirs, so
this reading has its own code: it follows, key by key, what transformers' configuration and modeling classes do. (The tables of the
architectures, which say what a family is, are common to both, and are tested against transformers.)
"""

from collections.abc import Mapping
from typing import Any

from bam_merge.architectures.tables import Architecture
from bam_merge.architectures.vocabulary import LAYER_SIZES, LINEAR_SIZES, MROPE

ORIGINAL = "original_max_position_embeddings"


NUMBERS = ("attention_clip", "attention_scale", "embedding_scale", "residual_scale", "logit_scale", "attention_softcap", "logit_softcap")


def reference_values(table: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of model.ModelConfig that `config` means, by name, for a dense family or a public mixture.

    `config` has passed the checks of dense.describe or facts.mixture_values: values have the types that their keys need.
    """
    key_of = _keys(table)
    config = _under_their_names(table, config)

    def get(word: str) -> Any:
        if word in table.quirks.taken_from:
            return _from_its_own_key(table, config, word)
        key = key_of.get(word, word)
        return config[key] if key in config else table.defaults.get(key)

    heads = get("num_attention_heads")
    values = {
        "vocab_size": get("vocab_size"),
        "hidden_size": get("hidden_size"),
        "intermediate_size": get("intermediate_size"),
        "num_hidden_layers": get("num_hidden_layers"),
        "num_attention_heads_per_expert": heads,
        "num_key_value_heads_per_expert": get("num_key_value_heads") or heads,
        "head_dim": get("head_dim") or get("hidden_size") // heads,
        "tie_word_embeddings": get("tie_word_embeddings") is True,
        "hidden_act": _activation(table, get),
        "max_position_embeddings": get("max_position_embeddings"),
        **_layers(table, config),
        **_block(table, get),
    }
    values |= {key: get(key) for key in LINEAR_SIZES}
    values |= _rotary_embeddings(table, config, values)
    values |= _sizes(table, config, values)
    for eps in ("rms_norm_eps", "layer_norm_eps"):
        if get(eps) is not None:
            values[eps] = get(eps)
    if table.quirks.query_growth:
        values["query_growth"] = values["rope_parameters"].pop("llama_4_scaling_beta", None)
    if table.quirks.norm_eps is not None:
        values["layer_norm_eps" if values["norm_type"] == "layer_norm" else "rms_norm_eps"] = get(table.quirks.norm_eps)
    values |= _together(table, get)
    return values | (_experts(table, config, get) if table.kind == "mixture" else {})


def _activation(table: Architecture, get: Any) -> Any:
    """By the one key that the modeling code asks for, under the name that ACT2FN is asked for."""
    stated = get(table.quirks.activation)
    return table.quirks.activations.get(stated, stated)


def _under_their_names(table: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `config` under the names that the configuration class keeps them by (its attribute_map)."""
    names = table.quirks.renamed
    return {key: value for key, value in config.items() if key not in names} | {names[key]: config[key] for key in names if key in config}


def _from_its_own_key(table: Architecture, config: Mapping[str, Any], word: str) -> Any:
    """A fact that the configuration class calls otherwise, or what its __post_init__ fills in: FalconConfig's `4 * hidden_size`."""
    names = table.quirks.taken_from[word].split(" or ")
    stated = config.get(names[0], table.defaults.get(names[0]))
    if stated is not None or len(names) == 1:
        return stated
    product = names[1].split(" * ")
    return config[product[-1]] * (int(product[0]) if len(product) == 2 else 1)


def _together(table: Architecture, get: Any) -> dict[str, Any]:
    """What keys say only together, under the names that ModelConfig has for it."""
    per_expert = {"num_attention_heads": "num_attention_heads_per_expert", "num_key_value_heads": "num_key_value_heads_per_expert"}
    said: dict[str, Any] = {}
    for case in table.cases:
        if any(get(key) != wanted for key, wanted in case.where.items()):
            continue
        for fact, value in case.facts.items():
            said[per_expert.get(fact, fact)] = get(value) if isinstance(value, str) else value
    return said


def _keys(table: Architecture) -> dict[str, str]:
    """The key under which a mixture's config.json has what bam calls by another name, from the table that writes such files."""
    keys: dict[str, str] = {}
    for key, value in table.config.items():
        if isinstance(value, str) and value.startswith("$") and value[1:] not in keys:
            keys[value[1:]] = key
    return keys


def _block(table: Architecture, get: Any) -> dict[str, Any]:
    """How a block is wired, and which biases and norms it has: given by the model type, or by a key that it names."""

    def trait(name: str, default: Any) -> Any:
        if table.kind == "mixture" and name not in table.traits:  # a layout has a key for it, or takes one value only
            fixed = table.accepts.get(name, default)
            return get(name) if name in _keys(table) else default if isinstance(fixed, list) else fixed
        value = table.traits.get(name, default)
        return bool(get(value.partition(":")[2])) if isinstance(value, str) and value.startswith("config:") else value

    def number(name: str) -> float | None:
        """A factor: of a model type, of a key, or of a power of a key's value; of a mixture, of a key or none."""
        if table.kind == "mixture" and name in _keys(table):
            own: float | None = get(name)
            return own
        value = table.traits.get(name)
        if table.kind == "mixture" and value is None:  # a layout takes one value only, or has a key for it
            fixed = table.accepts.get(name)
            value = f"config:{_keys(table)[name]}" if name in _keys(table) else fixed if isinstance(fixed, int | float) else None
        if not isinstance(value, str):
            return value
        key, power = value.partition(":")[2].partition("^")[::2]
        stated = get(key)
        factor = stated if not power or stated is None else float(stated ** float(power))
        neutral = factor == 1 and (name in ("embedding_scale", "residual_scale") or (name == "logit_scale" and bool(power)))
        return None if neutral else factor

    bias = bool(trait("attention_bias", False))
    out_bias = bool(trait("attention_out_bias", bias and table.kind == "mixture"))  # a layout may have one key for q, k, v and o
    return {
        "norm_type": trait("norm_type", "rms_norm"),
        "norm_bias": bool(trait("norm_bias", False)),
        "norm_weights": bool(trait("norm_weights", True)),
        "pre_norms": bool(trait("pre_norms", True)),
        "post_norms": bool(trait("post_norms", False)),
        "parallel_block": bool(trait("parallel_block", False)),
        "parallel_norms": trait("parallel_norms", 2),
        "gated_ffn": bool(trait("gated_ffn", False)),
        "rope_interleaved": bool(trait("rope_interleaved", False)),
        "qk_norm": bool(trait("qk_norm", False)),
        "qk_norm_shape": trait("qk_norm_shape", None) if trait("qk_norm", False) else None,
        "qk_norm_bias": bool(trait("qk_norm", False) and trait("qk_norm_bias", False)),
        "attention_bias": bias,
        "attention_out_bias": out_bias,
        "mlp_bias": bool(trait("mlp_bias", False)),
        "attention_gate": bool(trait("attention_gate", False)),
        **{name: bool(trait(name, False)) for name in ("value_norm", "values_are_keys", "layer_scale")},
        "norm_offset": trait("norm_offset", 0),
        "qk_norm_after_rotary": bool(trait("qk_norm", False) and trait("qk_norm_after_rotary", False)),
        "head_bias": bool(trait("head_bias", False)),
        "embedding_scale_in_dtype": bool(trait("embedding_scale_in_dtype", False)),
        **{name: number(name) for name in NUMBERS},
    }


def _sizes(table: Architecture, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of layers of one kind, by the keys that the modeling code asks for in such layers; as Gemma4TextConfig makes a per_layer_config
    of them where there is none."""
    in_bam = {size: f"{size}_per_expert" if size.endswith("heads") else size for size in LAYER_SIZES}
    own: dict[str, dict[str, Any]] = {}
    for kind in (kind for kind in table.sizes if kind in values["layer_types"]):
        if config.get("per_layer_config") is not None:
            own[kind] = config["per_layer_config"].get(str(values["layer_types"].index(kind)), {})
            continue
        for size, key in table.sizes[kind].items():
            name, *condition = key.split(" if ")
            if all(config.get(flag, table.defaults.get(flag)) for flag in condition):
                own.setdefault(kind, {})[size] = config.get(name, table.defaults.get(name))
    own = {kind: {size: n for size, n in sizes.items() if n and n != values[in_bam[size]]} for kind, sizes in own.items()}
    if len(set(values["layer_types"])) == 1:
        return {in_bam[size]: n for sizes in own.values() for size, n in sizes.items()}
    return {"sizes_by_kind": {kind: sizes for kind, sizes in own.items() if sizes} or None}


def _rotary_embeddings(table: Architecture, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """One set for all layers, or one each for those without and with a window, as Gemma3TextConfig and Olmo3Config make them."""
    if not table.quirks.rotary_by_kind:
        return {"rope_parameters": rotary(table, config)}
    nested, older = config.get("rope_parameters") or table.quirks.rope_sets, config.get("rope_scaling") or {}
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    far = rotary(table, {**plain, "rope_parameters": {**(nested.get("full_attention") or {}), **older}})
    beside = table.quirks.sliding_base
    local = plain.get(beside, table.defaults.get(beside)) if beside else table.defaults.get("rope_theta", 10_000.0)
    near = rotary(table, {**plain, table.quirks.rotary_base: local, "rope_parameters": nested.get("sliding_attention") or {}})
    kinds = set(values["layer_types"]) if values["sliding_window"] else {"full_attention"}
    if kinds == {"sliding_attention"}:
        return {"rope_parameters": near}
    return {"rope_parameters": far, "sliding_rope_parameters": near if near != far and "sliding_attention" in kinds else None}


def rotary(table: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as convert_rope_params_to_dict and standardize_rope_params of transformers' RotaryEmbeddingConfigMixin leave
    them, and as the overrides of GPTNeoXConfig and Phi3Config and the rotary embedding of HunYuanDenseV1 do."""
    older, newer = config.get("rope_scaling"), config.get("rope_parameters")
    rope = {key: value for key, value in (older if older else newer if newer else {}).items() if value is not None}
    for images in MROPE if table.quirks.mrope else ():
        rope.pop(images, None)
    legacy = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or legacy or "default"
    theta_key, share_key = table.quirks.rotary_base, table.quirks.rotary_share
    beside = {key: config[key] for key in (theta_key, share_key) if key and config.get(key) is not None}
    if "rope_theta" not in rope:
        rope["rope_theta"] = beside.get(theta_key, table.defaults.get("rope_theta", 10_000.0))
    if rope["rope_type"] == "proportional":
        rope.setdefault("partial_rotary_factor", 1.0)
    elif share_key is None:  # the attention does not ask rope_parameters for it: whole heads turn
        rope["partial_rotary_factor"] = 1.0
    elif "partial_rotary_factor" not in rope:
        rope["partial_rotary_factor"] = beside.get(share_key, table.defaults.get("partial_rotary_factor", 1.0))
    for older_type, newer_type in table.quirks.rope_types.items():
        if rope["rope_type"] == older_type:
            rope["rope_type"] = newer_type
            break
    if table.quirks.alpha and rope["rope_type"] == "dynamic" and rope.get("alpha"):
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        base = rope["rope_theta"] * rope["alpha"] ** (size / (size - 2))
        return {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": rope["partial_rotary_factor"]}
    if table.quirks.context == "outer":
        if rope["rope_type"] == "longrope":
            rope[ORIGINAL] = config.get(ORIGINAL) or table.defaults.get(ORIGINAL) or config.get("max_position_embeddings")
    elif rope["rope_type"] in ("llama3", "yarn", "longrope") and ORIGINAL not in rope:
        rope[ORIGINAL] = config.get("max_position_embeddings")
    return rope


def _layers(table: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have a window, and which a rotary embedding, where these are not all of them."""
    layers = config["num_hidden_layers"]
    rotated: list[bool] = [True] * layers
    if table.quirks.turning == "if rope":
        rotated = [config.get("position_embedding_type") == "rope"] * layers
    if table.quirks.turning == "listed":
        stated, step = config.get("no_rope_layers"), config.get("no_rope_layer_interval", table.defaults.get("no_rope_layer_interval", 4))
        rotated = [bool(stated[layer] if stated is not None else (layer + 1) % step) for layer in range(layers)]
    windows = _windows(table, config, rotated)
    everywhere = table.quirks.turning == "where windows are, or all" and not config.get(
        "sliding_window", table.defaults.get("sliding_window")
    )
    if table.quirks.turning.startswith("where windows are") and not everywhere:
        rotated = [windows["sliding_window"] is not None and kind == "sliding_attention" for kind in windows["layer_types"]]
    return {**windows, "rope_layers": None if all(rotated) else [layer for layer in range(layers) if rotated[layer]]}


def _windows(table: Architecture, config: Mapping[str, Any], rotated: list[bool]) -> dict[str, Any]:
    """The sliding window and which layers have it: by the keys that the model type has at all."""
    known = {*table.function, *table.neutral, *table.config}
    layers = config["num_hidden_layers"]
    if table.quirks.linear is not None:  # Qwen3_5TextConfig.__post_init__: each of so many layers is full, the others linear
        every = config.get(table.quirks.linear, table.defaults.get(table.quirks.linear))
        listed = config.get("layer_types") or ["linear_attention" if (n + 1) % every else "full_attention" for n in range(layers)]
        return {"sliding_window": None, "layer_types": listed}

    def get(key: str) -> Any:
        return config[key] if key in config else table.defaults.get(key)

    window = get("sliding_window") if "sliding_window" in known else None
    if "use_sliding_window" in known and not get("use_sliding_window"):
        window = None
    if not window:
        return {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    if "layer_types" in known and config.get("layer_types"):
        kinds = [{"attention": "full_attention"}.get(kind, kind) for kind in config["layer_types"]]  # remap_legacy_layer_types
        if table.quirks.windows.endswith("never the last"):
            kinds[-1] = "full_attention"
        return {"sliding_window": window, "layer_types": kinds}
    how = table.quirks.windows
    if how.startswith("all but each"):
        every = get("sliding_window_pattern") if table.quirks.pattern_is_read else table.defaults["sliding_window_pattern"]
        if isinstance(every, str):  # which transformers does not load without layer_types: refused elsewhere
            every = len(every)
        place = 0 if how == "all but each first" else every - 1
        types = ["full_attention" if layer % every == place else "sliding_attention" for layer in range(layers)]
        if how.endswith("never the last"):
            types[-1] = "full_attention"
        return {"sliding_window": window if "sliding_attention" in types else None, "layer_types": types}
    if how == "where nothing turns":
        types = ["full_attention" if turns else "sliding_attention" for turns in rotated]
        return {"sliding_window": window if "sliding_attention" in types else None, "layer_types": types}
    first = (get("max_window_layers") or 0) if "max_window_layers" in known else 0
    types = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    return {"sliding_window": window if first < layers else None, "layer_types": types}


def _experts(table: Architecture, config: Mapping[str, Any], get: Any) -> dict[str, Any]:
    """What a mixture's feed-forward network is. Where its count has two keys, the table of the model type says which wins."""
    keys = _keys(table)
    order = (*table.quirks.experts, "num_local_experts", "num_experts")  # a name that is not read may stand alone, with the right number
    result = {
        "num_experts": next((config[key] for key in (*order, keys.get("num_experts", "")) if config.get(key) is not None), None),
        "num_experts_per_tok": get("num_experts_per_tok"),
        "norm_topk_prob": get("norm_topk_prob") if "norm_topk_prob" in keys else table.accepts.get("norm_topk_prob") is True,
        "scoring_func": get("scoring_func") if "scoring_func" in keys else table.accepts.get("scoring_func", "softmax"),
        "gate_scale": get("gate_scale") if "gate_scale" in keys else 1.0,
    }
    if "dense_intermediate_size" in keys:
        result["dense_intermediate_size"] = config[keys["dense_intermediate_size"]]
    return result | _beside_experts(table, config, get)


def _beside_experts(table: Architecture, config: Mapping[str, Any], get: Any) -> dict[str, Any]:
    """The shared expert, and the bias of the choice of experts, where a table has rows for them.

    A shared expert has a width of its own (qwen2_moe), or that of as many experts as a key says, or that of one.
    """
    roles, keys = {role for row in table.rows for role in row.roles}, _keys(table)
    values: dict[str, Any] = {"choice_bias": "router.ffn.bias" in roles}
    if "ffn.shared.up" not in roles:
        return values
    own = "shared_expert_intermediate_size"
    count = get("shared_experts") if "shared_experts" in keys else 1
    mix = "gated" if "ffn.shared.router" in roles else get("shared_expert_mix") if "shared_expert_mix" in keys else "sum"
    return {**values, own: get(own) if own in keys else count * get("intermediate_size"), "shared_expert_mix": mix}
