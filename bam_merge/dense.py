"""A dense checkpoint read through its family's table: what it computes (facts) and where each role's tensor is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from bam_merge.architecture import Architecture, Row, dense_families, evaluate, find_by_model_type, natural_order
from bam_merge.checkpoint import Checkpoint, open_checkpoint
from bam_merge.errors import CheckpointError, printable, some
from bam_merge.ops import Expr, Read, Slice

Site = tuple[str, int | None]
"""A role, and its layer where it has one."""

COMMON_FUNCTION = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "tie_word_embeddings",
)  # fmt: skip
ROPE_KEYS = (
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base",
    "original_max_position_embeddings",
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

TRAITS: dict[str, Any] = {
    "norm_type": None, "norm_bias": False, "parallel_block": False, "parallel_norms": 2, "gated_ffn": False,
    "rope_interleaved": False, "qk_norm": False, "attention_bias": False, "attention_out_bias": False, "mlp_bias": False,
}  # fmt: skip


@dataclass(frozen=True)
class DenseModel:
    """One source. `facts` is its configuration in one vocabulary for all families; `tensors` says where each role is.

    `dropped` names the tensors that are known and not used, with the reason; `unknown_keys` the config keys that no table knows.
    """

    name: str
    checkpoint: Checkpoint
    family: Architecture
    facts: Mapping[str, Any]
    tensors: Mapping[Site, Expr]
    dropped: Mapping[str, str]
    unknown_keys: Mapping[str, Any]


def read_dense(name: str, path: Path) -> DenseModel:
    """Open the source called `name` at `path`. Raises CheckpointError with all its problems, each prefixed with its name."""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in error.problems)) from None
    family = find_by_model_type(checkpoint.config.get("model_type"))
    if family is None or family.kind != "dense":
        known = ", ".join(a.name for a in dense_families())
        found = checkpoint.config.get("model_type")
        what = "a mixture already" if family else "not a dense family known here"
        raise CheckpointError(f"sources.{name}: model_type {printable(repr(found))} is {what}. Known dense families: {known}.")
    problems: list[str] = []
    if "quantization_config" in checkpoint.config:
        problems.append("config.json has a quantization_config; quantised weights cannot be merged. Use the full-precision model.")
    facts = describe(family, checkpoint.config, problems)
    locator = _Locator(name, family, facts, checkpoint, problems)
    if facts:
        locator.run()
    if problems:
        raise CheckpointError(*(f"sources.{name}: {problem}" for problem in problems))
    known_keys = {*COMMON_FUNCTION, *ROPE_KEYS, *NEUTRAL, *IGNORED, *family.function, *family.neutral}
    unknown = {k: v for k, v in checkpoint.config.items() if k not in known_keys and not k.startswith("_")}
    return DenseModel(name, checkpoint, family, facts, locator.found, locator.dropped, unknown)


# ---- the configuration, in one vocabulary ------------------------------------------------------------------------------


def describe(family: Architecture, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The facts of a dense model: what its config.json says and its family implies. Empty when a needed key is unusable."""

    def get(key: str) -> Any:
        value = config.get(key)
        return family.defaults.get(key) if value is None and key not in config else value

    facts: dict[str, Any] = {key: get(key) for key in (*COMMON_FUNCTION, *family.function)}
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or facts["num_attention_heads"]
    before = len(problems)
    for key in COMMON_FUNCTION[:6]:
        if not is_size(facts[key]):
            problems.append(f"config.json: {key} must be a positive integer, found {printable(repr(facts[key]), 60)}.")
    problems += _mistyped(family, config)
    if len(problems) > before:
        return {}
    facts["head_dim"] = facts["head_dim"] or facts["hidden_size"] // facts["num_attention_heads"]
    if facts["num_attention_heads"] % facts["num_key_value_heads"]:
        problems.append(
            f"config.json: num_attention_heads {facts['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads {facts['num_key_value_heads']}."
        )
    facts["rope_parameters"] = _rope(family, config, problems)
    facts["max_position_embeddings"] = config.get("max_position_embeddings")
    facts.update(_sliding(get, facts))
    for trait, default in TRAITS.items():
        value = family.traits.get(trait, default)
        facts[trait] = bool(get(value.removeprefix("config:"))) if str(value).startswith("config:") else value
    facts.setdefault("logit_scale", None)
    facts["tie_word_embeddings"] = bool(facts["tie_word_embeddings"])
    facts["untied"] = not facts["tie_word_embeddings"]
    return facts if len(problems) == before else {}


_KINDS = {bool: ((bool,), "true or false"), int: ((int,), "an integer"), float: ((int, float), "a number"), str: ((str,), "text")}
"""The types that a value may have where its key's default is of the given type, and their name."""

MAX_LAYERS = 10_000
"""More than any model has; a config.json that promises more is damaged."""


def _is_plain(value: object) -> bool:
    """Whether `value` is what a configuration may hold: it is copied into the output."""
    numbers = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    return value is None or numbers or isinstance(value, int | float | str)


def is_size(value: object) -> TypeGuard[int]:
    """Whether `value` can be a dimension of a tensor."""
    return type(value) is int and 1 <= value < 2**31


def _mistyped(family: Architecture, config: Mapping[str, Any]) -> Iterator[str]:
    """A message for every value whose type is not that of the key's default, or that no model can have."""
    for key, default in family.defaults.items():
        value = config.get(key)
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
    for key in ("sliding_window", "max_position_embeddings"):
        if config.get(key) is not None and config[key] != 0 and not is_size(config[key]):
            yield f"config.json: {key} must be a positive integer, found {printable(repr(config[key]), 60)}."
    for key in (*NEUTRAL, *family.neutral):
        if not _is_plain(config.get(key)):
            yield f"config.json: {key} must be a number, text or a list of numbers, found {printable(repr(config[key]), 60)}."


def _rope(family: Architecture, config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Rotary embedding in the one spelling of transformers 5, whichever of the older ones config.json uses."""
    raw = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        problems.append(f"config.json: rope_parameters must be an object, found {printable(repr(raw), 60)}.")
        return {}
    nested = [key for key, value in raw.items() if isinstance(value, dict)]
    if nested:
        problems.append(f"config.json: rope_parameters has one set per {some(nested)}; {family.name} has one for all layers.")
        return {}
    odd = [key for key, value in raw.items() if not _is_plain(value)]
    if odd:
        problems.append(f"config.json: {some(odd)} in rope_parameters must be a number, text or a list of numbers.")
        return {}
    rope = {key: value for key, value in raw.items() if key != "type" and value is not None}
    rope["rope_type"] = raw.get("rope_type") or raw.get("type") or "default"
    if family.name == "phi3" and rope["rope_type"] in ("su", "yarn"):
        rope["rope_type"] = "longrope"  # as transformers' Phi3Config reads older files
    defaults = family.defaults
    rope.setdefault("rope_theta", config.get("rope_theta", config.get("rotary_emb_base", defaults.get("rope_theta", 10000.0))))
    rope.setdefault(
        "partial_rotary_factor",
        config.get("partial_rotary_factor", config.get("rotary_pct", defaults.get("partial_rotary_factor", 1.0))),
    )
    for key in ("rope_theta", "partial_rotary_factor"):
        if type(rope[key]) not in (int, float):
            problems.append(f"config.json: {key} must be a number, found {printable(repr(rope[key]), 60)}.")
            return {}
        rope[key] = float(rope[key])
    if rope["rope_type"] in ("dynamic", "yarn", "longrope"):
        outer = config.get("original_max_position_embeddings")  # of two, transformers prefers this one
        rope["original_max_position_embeddings"] = (
            outer or rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        )
    return dict(sorted(rope.items()))


def _sliding(get: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding-window attention per layer; a window that no layer uses is no window."""
    layers = facts["num_hidden_layers"]
    window = get("sliding_window") if get("use_sliding_window") is not False else None
    first = get("max_window_layers") or 0
    types = get("layer_types") or ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    sliding = [kind == "sliding_attention" for kind in types]
    window = window if any(sliding) else None
    how = "none" if not window else "all" if all(sliding) else "mixed"
    return {"sliding_window": window, "layer_types": list(types), "sliding": how, "use_sliding_window": window is not None}


# ---- the tensors ---------------------------------------------------------------------------------------------------------


@dataclass
class _Locator:
    """Walks a family's table over one checkpoint, collecting where each role is, what is dropped, and what is wrong."""

    source: str
    family: Architecture
    facts: Mapping[str, Any]
    checkpoint: Checkpoint
    problems: list[str]
    found: dict[Site, Expr] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        layers = range(self.facts["num_hidden_layers"])
        used: set[str] = set()
        missing: list[str] = []
        for row in self.family.rows:
            wanted = row.when is None or bool(self.facts[row.when])
            for layer in layers if row.per_layer else (None,):
                spellings = [row.name(layer, spelling=s) for s in range(len(row.names))]
                present = [name for name in spellings if name in self.checkpoint.tensors]
                used.update(present)
                if wanted and not present:
                    missing.append(spellings[0])
                elif len(present) > 1:
                    self.problems.append(f"{' and '.join(present)} are two spellings of one tensor. Keep one.")
                elif present:
                    (self.cut if wanted else self.refuse)(row, layer, present[0])
        if missing:
            self.report_missing(missing)
        for name in (template.replace("{layer}", str(layer)) for template in self.family.dropped for layer in layers):
            if name in self.checkpoint.tensors:
                self.dropped[name] = "a buffer that loading recomputes"
        extra = [name for name in self.checkpoint.tensors if name not in used and name not in self.dropped]
        if extra:
            self.problems.append(
                f"{some(extra)}: {len(extra)} tensor(s) that {self.family.name} with {len(layers)} layers does not have. "
                "Nothing is dropped silently: remove them, or correct config.json."
            )

    def refuse(self, row: Row, layer: int | None, name: str) -> None:
        if row.roles == ("head",):
            self.dropped[name] = "the head is tied to the embeddings; loading ignores this copy"
        else:
            self.problems.append(
                f"{name} is present, but config.json has {row.when}=false, so that transformers would ignore it. "
                "Correct config.json or remove the tensor."
            )

    def cut(self, row: Row, layer: int | None, name: str) -> None:
        entry = self.checkpoint.tensors[name]
        shape = tuple(evaluate(size, self.facts) for size in row.shape)
        if entry.shape != shape:
            sizes = ", ".join(row.shape)
            self.problems.append(f"{name} is {printable(str(list(entry.shape)))}, config.json implies {list(shape)} ({sizes}).")
            return
        read = Read(self.source, name, entry.dtype, shape)
        if len(row.roles) == 1:
            self.found[row.roles[0], layer] = read
            return
        groups, start = evaluate(row.groups, self.facts), 0
        for role, part in zip(row.roles, row.parts, strict=True):
            rows = evaluate(part, self.facts)
            self.found[role, layer] = Slice(read, groups, start, rows, (groups * rows, *shape[1:]))
            start += rows

    def report_missing(self, missing: list[str]) -> None:
        heads = {name for row in self.family.rows if row.roles == ("head",) for name in row.names}
        untied = " (config.json has tie_word_embeddings=false, so the head must be there)" if heads & set(missing) else ""
        self.problems.append(f"{some(missing)} missing: {len(missing)} tensor(s){untied}. Is the download complete?")


def family_tensors(family: Architecture, facts: Mapping[str, Any], spelling: int = 0) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor that a model of `family` with these facts has, in the table's order, layer by layer."""
    for row, layer in natural_order(family, facts["num_hidden_layers"]):
        if row.when is None or facts[row.when]:
            yield row.name(layer, spelling=min(spelling, len(row.names) - 1)), tuple(evaluate(size, facts) for size in row.shape)


# ---- do the sources agree? -----------------------------------------------------------------------------------------------


def disagreements(models: list[DenseModel]) -> list[str]:
    """Every way in which the sources compute different functions, compared with the first one."""
    first, *others = models
    problems = []
    for model in others:
        if model.family.name != first.family.name:
            problems.append(
                f"sources.{model.name}: family {model.family.name}, sources.{first.name} is {first.family.name}. "
                "Experts must be branches of one architecture."
            )
            continue
        for key in dict.fromkeys((*model.facts, *first.facts)):
            mine, theirs = model.facts.get(key), first.facts.get(key)
            if mine != theirs and _matters(key, first.facts):
                problems.append(_disagreement(key, model.name, mine, first.name, theirs))
        for key in sorted({*model.unknown_keys, *first.unknown_keys}):
            mine, theirs = model.unknown_keys.get(key), first.unknown_keys.get(key)
            if mine != theirs:
                problems.append(
                    f"sources.{model.name}: config.json has {printable(key)} = {printable(repr(mine))}, sources.{first.name} has "
                    f"{printable(repr(theirs))}; {first.family.name}'s table does not know this key, so it may matter. Make them agree."
                )
    return problems


def _matters(key: str, facts: Mapping[str, Any]) -> bool:
    if key == "max_position_embeddings":  # a limit, unless the rotary scaling is worked out from it
        return facts["rope_parameters"]["rope_type"] in ("dynamic", "longrope")
    return key not in ("untied", "sliding", "use_sliding_window", *NEUTRAL)


def _disagreement(key: str, name: str, mine: Any, first: str, theirs: Any) -> str:
    if key == "rope_parameters":
        keys = [k for k in dict.fromkeys((*mine, *theirs)) if mine.get(k) != theirs.get(k)]
        values = ((key, *(printable(repr(side.get(key)), 60) for side in (mine, theirs))) for key in keys)
        shown = "; ".join(f"{printable(key)} {here} here, {there} there" for key, here, there in values)
        return f"sources.{name}: rotary embedding differs from sources.{first}: {shown}. Experts must share it."
    advice = {
        "vocab_size": "Embeddings are never cut; align the tokenizers first.",
        "tie_word_embeddings": "Tied and untied models cannot be mixed; untie the others first (save lm_head as a copy).",
    }.get(key, "Experts must share it.")
    return f"sources.{name}: {key} = {printable(repr(mine))}, sources.{first} has {printable(repr(theirs))} (config.json). {advice}"
