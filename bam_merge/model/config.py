"""config.json as the reference model's configuration."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bam_merge.architectures.computable import uncomputable
from bam_merge.architectures.config import describe, is_quantised, mixture_values
from bam_merge.architectures.spellings import conflicts
from bam_merge.architectures.tables import architecture_names, find_by_model_type
from bam_merge.architectures.vocabulary import KINDS_OF_LAYERS, LAYER_SIZES
from bam_merge.errors import CheckpointError
from bam_merge.model.model_config import ModelConfig
from bam_merge.model.reference_config import reference_values, rotary
from bam_merge.text import printable
from bam_merge.validation_words import expectation, shown

# ---- the configuration -----------------------------------------------------------------------------------------------------


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """What the reference model needs of a config.json. Raises CheckpointError with every problem, each naming its key."""
    architecture = find_by_model_type(config.get("model_type"), config)
    if architecture is None or architecture.kind == "foreign":
        found = printable(repr(config.get("model_type")))
        raise CheckpointError(f"config.json: model_type {found} is not known here. Known: {', '.join(architecture_names())}.")
    problems: list[str] = []
    if is_quantised(config):
        problems.append("config.json has a quantization_config; quantised weights are not read. Use the full-precision model.")
    if architecture.name == "bam":
        values = dict(config)
        if isinstance(config.get("rope_scaling"), dict) and config["rope_scaling"]:
            values["rope_parameters"] = rotary(architecture, config)
    else:  # the plan's reading finds what is wrong, another one says what is meant
        (describe if architecture.kind == "dense" else mixture_values)(architecture, config, problems)
        values = {} if problems else reference_values(architecture, config)
    problems += conflicts(architecture, config)
    if problems:
        raise CheckpointError(*problems)
    known = {item.name for item in fields(ModelConfig)}
    values = {key: value for key, value in values.items() if key in known and value is not None}
    try:
        result = TypeAdapter(ModelConfig).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise CheckpointError(*(_explained(item) for item in error.errors())) from None
    problems = list(_inconsistencies(result))
    if problems:
        raise CheckpointError(*problems)
    return result


def _explained(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"config.json: {key} is missing. Add it."
    return f"config.json: {key} must be {expectation(error)}, found {shown(error['input'], 200)}."


def _odd_kinds(config: ModelConfig) -> Iterator[str]:
    """What is wrong with sizes of layers of one kind."""
    for kind, sizes in (config.sizes_by_kind or {}).items():
        odd = [size for size in sizes if size not in LAYER_SIZES] + ([kind] if kind not in KINDS_OF_LAYERS else [])
        if odd or min(sizes.values(), default=1) < 1:
            yield f"config.json: sizes_by_kind has sizes of {' and '.join(KINDS_OF_LAYERS)}: {', '.join(LAYER_SIZES)}, each above 0."
            return
        own = config.of_kind(kind)
        heads, kv_heads = own.num_attention_heads_per_expert, own.num_key_value_heads_per_expert
        if heads % kv_heads:
            yield f"config.json: of {kind} layers {heads} attention heads are not a multiple of {kv_heads} key and value heads."


def _inconsistencies(config: ModelConfig) -> Iterator[str]:
    """What is well-typed and still cannot be run."""
    yield from uncomputable(vars(config))
    heads, kv_heads = config.num_attention_heads_per_expert, config.num_key_value_heads_per_expert
    if min(config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads, kv_heads, config.head_dim) < 1:
        yield "config.json: sizes, and counts of layers and heads, must be positive."
    elif heads % kv_heads:
        yield f"config.json: {heads} attention heads (of one expert) are not a multiple of {kv_heads} key and value heads."
    yield from _odd_kinds(config)
    if config.layer_types is not None and len(config.layer_types) != config.num_hidden_layers:
        yield f"config.json: layer_types names {len(config.layer_types)} layers, num_hidden_layers is {config.num_hidden_layers}."
    attention_experts = config.num_attention_experts
    for key, chosen, of in (
        ("num_experts", config.num_experts_per_tok, config.num_experts),
        ("num_attention_experts", config.num_attention_experts_per_tok or attention_experts, attention_experts),
    ):
        if of and not 1 <= chosen <= of:
            yield f"config.json: {key}_per_tok is {chosen}, expected 1 to {key} = {of}."
