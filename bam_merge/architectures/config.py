"""The facts of any known config.json, dense or mixture: its sizes and choices in bam's words, whatever the model type calls them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from bam_merge.architectures.layer_sizes import are_sizes_by_kind, of_own_keys, sizes_by_kind
from bam_merge.architectures.mixture_keys import odd_keys
from bam_merge.architectures.nulls import without_nulls
from bam_merge.architectures.quantisation import quantisation
from bam_merge.architectures.rotary_sets import SETS, set_problems, settled, with_one_set
from bam_merge.architectures.spellings import conflicts
from bam_merge.architectures.tables import Architecture
from bam_merge.architectures.traits import (
    INTERVAL,
    LEGACY,
    PATTERN,
    beyond,
    facts_of_cases,
    interval_problems,
    kinds_of_hybrid,
    linear_problems,
    listed_as_turning,
    own_key,
    query_growth,
    renamed,
    stated_traits,
    under_common_keys,
    without_idle_pattern,
)
from bam_merge.architectures.vocabulary import MROPE, TRAITS
from bam_merge.architectures.window_spellings import is_text_pattern
from bam_merge.text import printable, some
from bam_merge.validation_words import shown

COMMON_FUNCTION = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "tie_word_embeddings",
)  # fmt: skip


ROPE_KEYS = (
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base",
    "original_max_position_embeddings", "rope_local_base_freq",
)  # fmt: skip


NEUTRAL = (
    "max_position_embeddings", "initializer_range", "attention_dropout", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "sep_token_id",
)  # fmt: skip
"""Keys that do not change the function: sources may differ, the output takes the seed's."""


IGNORED = (
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "auto_map", "trust_remote_code", "_name_or_path",
    "_attn_implementation", "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "return_dict",
    "use_return_dict", "torchscript", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "chunk_size_feed_forward",
    "id2label", "label2id", "problem_type", "task_specific_params", "tokenizer_class", "prefix", "finetuning_task", "pruned_heads",
)  # fmt: skip
"""Keys never copied: bookkeeping, or a way to load code."""


_KINDS = {bool: ((bool,), "true or false"), int: ((int,), "an integer"), float: ((int, float), "a number"), str: ((str,), "text")}
"""The types that a value may have where its key's default is of the given type, and their name."""


BY_LAYER = (PATTERN, INTERVAL, "no_rope_layers", "no_rope_layer_interval")
"""Keys that say of layers what `layer_types` and `rope_layers` say of them in bam's words."""


NO_NUMBERS = [{"__float__": word} for word in ("Infinity", "-Infinity", "NaN")]
"""How transformers writes what JSON has no numbers for."""


MAX_LAYERS = 10_000
"""More than any model has; a config.json that promises more is damaged."""


ALIASES = {"num_local_experts": "num_experts", "num_experts": "num_experts"}
"""Keys that some version of transformers writes or reads for another one."""


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
                problems.append(f"config.json: {key} must be a positive integer, found {shown(config.get(key))}.")
        if len(problems) == before and config["num_hidden_layers"] > MAX_LAYERS:
            problems.append(f"config.json: num_hidden_layers {config['num_hidden_layers']}, expected at most {MAX_LAYERS}.")
        for key in ("num_attention_experts", "num_attention_experts_per_tok", "parallel_norms"):
            if config.get(key) and not is_size(config[key]):
                problems.append(f"config.json: {key} must be an integer, found {printable(repr(config[key]), 60)}.")
        shared = config.get("shared_kv_layers")
        if shared is not None and not (isinstance(shared, list) and all(type(layer) is int for layer in shared)):
            problems.append(f"config.json: shared_kv_layers must be a list of layers, found {printable(repr(shared), 60)}.")
        if not are_sizes_by_kind(config.get("sizes_by_kind")):
            found = printable(repr(config["sizes_by_kind"]), 60)
            problems.append(f"config.json: sizes_by_kind must have sizes by kind of layer, found {found}.")
        heads = {key: config.get(f"{key}_per_expert") for key in ("num_attention_heads", "num_key_value_heads")}
        facts = {**config, **heads, "untied": not config.get("tie_word_embeddings")}
    elif architecture.kind == "dense":
        facts = describe(architecture, config, problems)
    else:
        facts = mixture_values(architecture, config, problems)
    usable = len(problems) == before
    problems += conflicts(architecture, config)  # what transformers takes of two spellings is described all the same
    return facts if usable else {}


def mixture_values(layout: Architecture, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Config values of a public mixture, in bam's words: the layout's [config] read backwards, and what [accepts] implies."""
    config, keys = renamed(layout, config, problems), dict[str, str]()
    for key, value in layout.config.items():
        keys.setdefault(value[1:] if isinstance(value, str) and value.startswith("$") else key, key)
    defaults = {word: layout.defaults[key] for word, key in keys.items() if key in layout.defaults}
    aliased = {word: config[alias] for alias, word in ALIASES.items() if alias in config and keys.get(word) not in config}
    beside = {key: config[key] for key in layout.quirks.only if key in config}
    spelled = {**beside, **defaults, **aliased, **{word: config[key] for word, key in keys.items() if key in config}}
    needed = (
        "hidden_act", "rms_norm_eps", "num_experts", "num_experts_per_tok", "norm_topk_prob", "attention_bias", "use_sliding_window",
        "shared_experts",
    )  # fmt: skip
    missing = [keys[word] for word in needed if word in keys and word not in spelled]
    if missing:
        problems.append(f"config.json: {some(missing)} missing; {layout.name} needs it, or its meaning would be a guess. Add it.")
    if spelled.get("use_sliding_window") and "layer_types" in keys and "layer_types" not in spelled:
        problems.append("config.json: use_sliding_window is true, and layer_types does not say which layers slide. Add layer_types.")
    problems += odd_keys(keys, spelled)
    implied = {word: None if value == "none" else value for word, value in layout.accepts.items() if not isinstance(value, list)}
    traits = {trait: implied.get(trait, f"config:{trait}") for trait in TRAITS if trait in implied or trait in keys}
    traits.setdefault("attention_out_bias", traits.get("attention_bias", False))  # one key for both, where a layout has no other
    own = [str(value).removeprefix("config:").partition("^")[0] for value in layout.traits.values()]
    extra = {key: value for key, value in layout.defaults.items() if key in (*ROPE_KEYS, PATTERN, *own, *layout.function)}
    family = replace(
        layout, traits={**traits, **layout.traits}, function=("rms_norm_eps", *own, *layout.function), defaults={**defaults, **extra}
    )
    beside = {key: config[key] for key in (*ROPE_KEYS, *own, *layout.function) if key in config}
    return {**implied, **spelled, **describe(family, {**beside, **spelled}, problems)}


def dense_layers(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """The layers of a public mixture that have one FFN and no experts.

    Qwen: those in mlp_only_layers, and those not at a multiple of decoder_sparse_step. DeepSeek: the first first_k_dense_replace, and
    those not at a multiple of moe_layer_freq. Command A+ and others: those that mlp_layer_types calls dense. ERNIE: those outside
    of moe_layer_start_index to moe_layer_end_index, and those not at a multiple of moe_layer_interval. (transformers' configuration
    classes; moe_layer_freq in DeepSeek's own modeling code.)
    """

    def number(key: str, default: int) -> int:
        value = config.get(key)
        return value if type(value) is int and value >= default else default

    listed = config.get("mlp_only_layers")
    only = set(filter(lambda item: type(item) is int, listed)) if isinstance(listed, list) else set()
    kinds = config.get("mlp_layer_types")
    only |= {layer for layer, kind in enumerate(kinds) if kind == "dense"} if isinstance(kinds, list) else set()
    step, first, every = number("decoder_sparse_step", 1), number("first_k_dense_replace", 0), number("moe_layer_freq", 1)
    start, last, stride = number("moe_layer_start_index", 0), number("moe_layer_end_index", -1), number("moe_layer_interval", 1)
    only |= {layer for layer in range(layers) if layer < start or -1 < last < layer or (layer + 1) % stride}
    return frozenset(layer for layer in range(layers) if layer in only or (layer + 1) % step or layer < first or layer % every)


# ---- the configuration, in one vocabulary ------------------------------------------------------------------------------


def describe(family: Architecture, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The facts of a dense model: what its config.json says and its family implies. Empty when a needed key is unusable."""

    before = len(problems)
    config = without_idle_pattern(family, renamed(family, config, problems))
    config = under_common_keys(family, without_nulls(family, config, problems))

    def get(key: str) -> Any:
        return config[key] if key in config else family.defaults.get(key)

    facts: dict[str, Any] = {key: get(key) for key in (*COMMON_FUNCTION, *family.function) if key not in BY_LAYER}
    facts["hidden_act"] = get(family.quirks.activation)
    facts["hidden_act"] = "silu" if facts["hidden_act"] == "swish" else facts["hidden_act"]  # one function, two names
    facts["hidden_act"] = next((new for old, new in family.quirks.activations.items() if old == facts["hidden_act"]), facts["hidden_act"])
    cases = facts_of_cases(family, get, problems)
    facts["num_key_value_heads"] = cases.get("num_key_value_heads") or facts["num_key_value_heads"] or facts["num_attention_heads"]
    for key in COMMON_FUNCTION[:6]:
        if not is_size(facts[key]) and (key != "num_key_value_heads" or get(key)):  # one that follows from another is said once
            problems.append(f"config.json: {own_key(family, key)} must be a positive integer, found {shown(facts[key])}.")
    problems += [*_mistyped(family, config), *linear_problems(family, facts)]
    if len(problems) > before:
        return {}
    facts["head_dim"] = facts["head_dim"] or facts["hidden_size"] // facts["num_attention_heads"]
    if facts["num_attention_heads"] % facts["num_key_value_heads"]:
        problems.append(
            f"config.json: num_attention_heads {facts['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads {facts['num_key_value_heads']}."
        )
    sets = _ropes(family, config, problems)
    facts["rope_parameters"] = sets[0]
    facts["query_growth"] = query_growth(family, facts["rope_parameters"], problems)
    facts["max_position_embeddings"] = config.get("max_position_embeddings")
    turning = listed_as_turning(family, get, facts["num_hidden_layers"], problems)
    facts.update(_sliding(family, get, {**facts, "turning": turning}))
    windows = facts["layer_types"] if facts["sliding_window"] else ()
    slides = [kind == "sliding_attention" for kind in windows]
    facts["rope_parameters"], facts["sliding_rope_parameters"] = settled(sets, slides)
    if family.quirks.turning == "where windows are" or (family.quirks.turning.endswith("or all") and get("sliding_window")):
        turning = [layer for layer, kind in enumerate(windows) if kind == "sliding_attention"]
    facts["rope_layers"] = turning if turning is not None and len(turning) < facts["num_hidden_layers"] else None
    facts.update(sizes_by_kind(family, get, facts, problems))
    facts.update(of_own_keys(family, facts))
    facts.update({**stated_traits(family, get, problems), **cases})
    if not facts["qk_norm"]:
        facts |= {key: TRAITS[key] for key in ("qk_norm_shape", "qk_norm_bias", "qk_norm_after_rotary")}
    if family.quirks.norm_eps:
        facts["layer_norm_eps" if facts["norm_type"] == "layer_norm" else "rms_norm_eps"] = get(family.quirks.norm_eps)
    usual = facts["head_dim"] ** -0.5 if facts["head_dim"] else None
    scaled_by = str(family.traits.get("attention_scale", "")).removeprefix("config:")
    if scaled_by in facts and facts[scaled_by] is None:  # which a configuration class then fills in
        facts[scaled_by] = usual
    if facts["attention_scale"] == usual and not facts["sizes_by_kind"]:  # else None is another one in each kind of layer
        facts["attention_scale"] = None
    windows_somewhere = bool(facts.get("layer_types") or facts.get("sliding_window"))
    facts["own_values"] = windows_somewhere or not facts["values_are_keys"]  # but in single layers
    facts["twin_norms"] = bool(facts["parallel_block"]) and facts["parallel_norms"] == 2
    facts["second_norm"] = facts["pre_norms"] and (not facts["parallel_block"] or facts["parallel_norms"] == 2)
    facts["tie_word_embeddings"] = bool(facts["tie_word_embeddings"])
    facts["untied"] = not facts["tie_word_embeddings"]
    return facts if len(problems) == before else {}


def _is_plain(value: object) -> bool:
    """Whether `value` is what a configuration may hold: it is copied into the output."""
    numbers = isinstance(value, list) and all(isinstance(item, int | float) or item in NO_NUMBERS for item in value)
    return value is None or numbers or isinstance(value, int | float | str)


def is_size(value: object) -> TypeGuard[int]:
    """Whether `value` can be a dimension of a tensor."""
    return type(value) is int and 1 <= value < 2**31


def _mistyped(family: Architecture, config: Mapping[str, Any]) -> Iterator[str]:
    """A message for every value whose type is not that of the key's default, or that no model can have."""
    for key, default in family.defaults.items():
        value = config.get(key)
        if key == PATTERN and family.quirks.pattern_is_text and is_text_pattern(value):
            continue
        kinds, expected = _KINDS[type(default)]
        if value is not None and type(value) not in kinds:
            yield f"config.json: {key} must be {expected}, found {printable(repr(value), 60)}."
    layers, types, head_dim = (config.get(key) for key in ("num_hidden_layers", "layer_types", "head_dim"))
    if is_size(layers) and layers > MAX_LAYERS:
        yield f"config.json: num_hidden_layers {layers}, expected at most {MAX_LAYERS}."
    elif types is not None and (not isinstance(types, list) or len(types) != layers or not all(isinstance(t, str) for t in types)):
        yield f"config.json: layer_types must name the kind of each of the {layers} layers, found {printable(repr(types), 60)}."
    if head_dim is not None and not is_size(head_dim):
        yield f"config.json: head_dim must be a positive integer, found {printable(repr(head_dim), 60)}."
    yield from beyond(family, config)
    yield from interval_problems(family, config)
    for key in ("sliding_window", "max_position_embeddings"):
        if config.get(key) is not None and config[key] != 0 and not is_size(config[key]):
            yield f"config.json: {key} must be a positive integer, found {printable(repr(config[key]), 60)}."
    pattern = config.get(PATTERN, 1)
    if family.quirks.pattern_is_read and not (
        is_size(pattern) or (family.quirks.pattern_is_text and (pattern is None or is_text_pattern(pattern)))
    ):
        yield f"config.json: {PATTERN} must be a positive integer, found {shown(config[PATTERN])}."
    for key in (*NEUTRAL, *family.neutral):
        if not _is_plain(config.get(key)):
            yield f"config.json: {key} must be a number, text or a list of numbers, found {printable(repr(config[key]), 60)}."


def _ropes(family: Architecture, config: Mapping[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """The rotary embedding of all layers; or that of those without a sliding window, and that of those with one."""
    if not family.quirks.rotary_by_kind:
        return [_rope(family, config, problems)]
    wrong = set_problems(family, config)
    problems += wrong
    return [{}, {}] if wrong else [_rope(family, with_one_set(family, config, kind), problems) for kind in SETS]


def _rope(family: Architecture, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Rotary embedding in the one spelling of transformers 5, whichever of the older ones config.json uses."""
    raw = config.get("rope_scaling") or config.get("rope_parameters") or {}  # of two, transformers takes the older
    if not isinstance(raw, dict):
        problems.append(f"config.json: rope_parameters must be an object, found {printable(repr(raw), 60)}.")
        return {}
    if family.quirks.rope_needed and not raw:
        problems.append(
            f"config.json: rope_parameters is missing; {family.name} without it is given a scaling that no file says. Write what it was "
            "trained with."
        )
        return {}
    nested = [key for key, value in raw.items() if isinstance(value, dict)]
    if nested:
        problems.append(f"config.json: rope_parameters has one set per {some(nested)}; {family.name} has one for all layers.")
        return {}
    odd = [key for key, value in raw.items() if not _is_plain(value)]
    if odd:
        problems.append(f"config.json: {some(odd)} in rope_parameters must be a number, text or a list of numbers.")
        return {}
    if raw.get("rope_type") == "proportional" and family.kind == "dense" and not family.quirks.rope_sets:
        problems.append(f"config.json: rope_type 'proportional' is not known here of {family.name}, only of Gemma 4.")
        return {}
    images = MROPE if family.quirks.mrope else ()
    rope = {key: value for key, value in raw.items() if key not in ("type", *images) and value is not None}
    stated = raw.get("rope_type") or raw.get("type") or "default"
    rope["rope_type"] = next((new for old, new in family.quirks.rope_types.items() if old == stated), stated)
    base, share = family.quirks.rotary_base, family.quirks.rotary_share or "partial_rotary_factor"
    rope.setdefault("rope_theta", config.get(base, family.defaults.get("rope_theta", 10000.0)))
    rope.setdefault("partial_rotary_factor", config.get(share, family.defaults.get("partial_rotary_factor", 1.0)))
    for key in ("rope_theta", "partial_rotary_factor"):
        if type(rope[key]) not in (int, float):
            problems.append(f"config.json: {key} must be a number, found {printable(repr(rope[key]), 60)}.")
            return {}
        rope[key] = float(rope[key])
    if family.quirks.alpha and rope["rope_type"] == "dynamic" and rope.get("alpha"):
        return _stretched_once(rope, config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"], problems)
    if rope["rope_type"] in ("dynamic", "yarn", "longrope"):
        inner, outer = rope.get("original_max_position_embeddings"), config.get("original_max_position_embeddings")
        if family.quirks.context == "outer":
            inner = outer or family.defaults.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = inner or config.get("max_position_embeddings")
    return dict(sorted(rope.items()))


def _stretched_once(rope: Mapping[str, Any], head_dim: int, problems: list[str]) -> dict[str, Any]:
    """A scaling that is called dynamic and is not: alpha stretches the base, whatever the length."""
    alpha = rope["alpha"]
    if type(alpha) not in (int, float) or not 1e-30 < alpha < 1e30 or head_dim <= 2:
        wanted = "a number above 0, and less than 1e30, for heads of more than 2"
        problems.append(f"config.json: alpha in rope_parameters must be {wanted}, found {printable(repr(alpha), 60)}.")
        return {}
    theta = rope["rope_theta"] * alpha ** (head_dim / (head_dim - 2))
    return {"partial_rotary_factor": rope["partial_rotary_factor"], "rope_theta": theta, "rope_type": "default"}


def _sliding(family: Architecture, get: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding-window attention per layer; a window that no layer uses is no window."""
    layers, how = facts["num_hidden_layers"], family.quirks.windows
    window = get("sliding_window") if get("use_sliding_window") is not False else None
    first = get("max_window_layers") or 0
    slides = [layer >= first or how == "by layer or all" for layer in range(layers)]
    if how.startswith("all but each"):
        every = get(PATTERN) if family.quirks.pattern_is_read else family.defaults[PATTERN]
        every = every if is_size(every) else 1  # a text, or null: layer_types is there
        full = 0 if how.endswith("first") else every - 1
        slides = [layer % every != full for layer in range(layers)]
    elif how == "where nothing turns":
        slides = [layer not in facts["turning"] for layer in range(layers)]
    stated = [LEGACY.get(kind, kind) for kind in get("layer_types") or ()]
    types = ["sliding_attention" if window and slide else "full_attention" for slide in slides]
    types = stated or kinds_of_hybrid(family, get, layers) or types
    if how.endswith("never the last"):
        types = [*types[:-1], "full_attention"]
    sliding = [kind == "sliding_attention" for kind in types]
    window = window if any(sliding) else None
    how = "none" if not window else "all" if all(sliding) else "mixed"
    return {"sliding_window": window, "layer_types": types, "sliding": how, "use_sliding_window": window is not None}


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that the weights are quantised; null and {} say that they are not."""
    return quantisation(config) is not None
